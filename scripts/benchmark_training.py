"""Measures training steps of peftbench, peft, full fine-tuning and a bare frozen backbone: seconds and memory.

All variants train on the same random examples in one process, in turn, for several rounds, with random weights and
without the hub. A decoder's examples have log-normal lengths, and the last 40% of their tokens have labels. Ours use
`peftbench.training.fit.fit_model`, the others transformers' Trainer as their users run it. A variant that fails is
reported with its error, and the others continue.

    python scripts/benchmark_training.py --shape bart_large --out training.json
    python scripts/benchmark_training.py --shape roberta_base --only "mam,lora,peft"
    python scripts/benchmark_training.py --shape llama_1b --variants defaults,on
    python scripts/benchmark_training.py --shape tiny --device cpu
    python scripts/benchmark_training.py --only mam --variants all --profile mam
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peftbench.backbones.precision import choose_autocast_dtype
from peftbench.config.compose import compose_run
from peftbench.config.schema import Batching, Compile, Device, DType, Keep, Precision, Run, Unfreeze, list_modifications
from peftbench.modification.attach import attach
from peftbench.tasks.completion import PromptCollator
from peftbench.training.batching import pad_to_multiple
from peftbench.training.checkpoint import Checkpoints
from peftbench.training.fit import Criterion, Monitor, Recipe, Resuming, fit_model
from peftbench.training.pace import Pace

WARM_UP = 10  # uncounted steps at the start of each round: kernels are loaded and graphs recorded
PROFILED = 45  # kernels listed in a profile
RUN = 2000  # planned steps of each round, which stops early: it logs as rarely as a real run


@dataclass(frozen=True)
class Shape:
    """A backbone's architecture and the lengths of its inputs."""

    model: Callable[[], PreTrainedModel]
    task: str  # its preset sizes and trainer settings are used
    batch: int
    source: tuple[int, int]  # lengths are uniform between the two; a decoder's are log-normal, cut at the two
    target: int | None  # tokens; None: a class
    targets: str | list[str]  # of peft's LoRA: the FFN's weights
    alone: bool = False  # a decoder alone: a source and its target are one text of a length of `source`


def _bart(**sizes: Any) -> PreTrainedModel:
    # The dropout rates are those of facebook/bart-large.
    return BartForConditionalGeneration(BartConfig(**{"activation_dropout": 0.1, "attention_dropout": 0.1, **sizes}))


def _tiny_bart() -> PreTrainedModel:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return _bart(vocab_size=500, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, **layers)


def _roberta(**sizes: Any) -> PreTrainedModel:
    config = RobertaConfig(**{"vocab_size": 50265, "max_position_embeddings": 514, "num_labels": 2, **sizes})
    return RobertaForSequenceClassification(config)


def _tiny_roberta() -> PreTrainedModel:
    return _roberta(vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def _llama(**sizes: Any) -> PreTrainedModel:
    # Llama-3.2-1B, without the scaling of its positions
    sizes = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        **sizes,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=1, bos_token_id=0, eos_token_id=2))


def _llama_8b() -> PreTrainedModel:
    # Llama-3.1-8B
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}
    return _llama(**sizes)


def _smollm2() -> PreTrainedModel:
    # SmolLM2-135M
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    return _llama(**sizes, num_attention_heads=9, num_key_value_heads=3)


def _tiny_llama() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 500}
    return _llama(**sizes, num_attention_heads=4, num_key_value_heads=2)


GATED = ["gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "llama_8b": Shape(_llama_8b, "webnlg", 16, (64, 1024), None, GATED, alone=True),
    "llama_1b": Shape(_llama, "webnlg", 16, (64, 1024), None, GATED, alone=True),
    "smollm_135m": Shape(_smollm2, "webnlg", 16, (64, 1024), None, GATED, alone=True),
    "tiny_llama": Shape(_tiny_llama, "webnlg", 4, (8, 64), None, GATED, alone=True),
    "bart_large": Shape(_bart, "xsum", 64, (256, 512), 64, ["fc1", "fc2"]),
    "roberta_base": Shape(
        _roberta,
        "sst2",
        32,
        (5, 128),
        None,
        r".*layer\.\d+\.(intermediate|output)\.dense",
    ),
    "tiny_roberta": Shape(_tiny_roberta, "sst2", 4, (5, 64), None, r".*layer\.\d+\.(intermediate|output)\.dense"),
    "tiny": Shape(_tiny_bart, "xsum", 4, (16, 64), 8, ["fc1", "fc2"]),
}

# The changes of each variant, by name, starting from all fast paths on.
WITHOUT: dict[str, dict[str, Any]] = {
    "on": {},
    "no_graphs": {"graphs": False},
    "no_compile": {"compile": Compile.none},
    "bucketed": {"padding_free": False, "batching": Batching.bucketed},
    "padded": {"padding_free": False},
    "no_fused_loss": {"fused_loss": False},
    "no_bf16_backbone": {"dtype": DType.float32},
    "defaults": {"compile": Compile.none, "dtype": DType.float32},
    "padded_defaults": {"compile": Compile.none, "dtype": DType.float32, "padding_free": False},
    "off": {
        "compile": Compile.none,
        "padding_free": False,
        "fused_loss": False,
        "graphs": False,
        "dtype": DType.float32,
    },
}


class Data:
    """The part of a TaskData that `fit_model` reads: random token ids, the same in every variant."""

    def __init__(self, shape: Shape, examples: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def text(length: int) -> list[int]:
            ids: list[int] = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
            return [0, *ids[2:], 2]

        low, high = shape.source
        if shape.alone:
            # the mean of 16 Llama examples is 322 tokens
            whole = torch.randn(examples, generator=generator).mul(0.8).add(math.log((low * high) ** 0.5)).exp()
            self.lengths = whole.round().int().clamp(low, high).tolist()
            prompts = [text(round(0.6 * length)) for length in self.lengths]
            targets = [text(length - len(prompt)) for length, prompt in zip(self.lengths, prompts, strict=True)]
            self.train = self.selection = Dataset.from_dict({"input_ids": prompts, "labels": targets})
            self.collator: Any = PromptCollator(1)
            return
        sources = [text(int(torch.randint(low, high + 1, (), generator=generator))) for _ in range(examples)]
        labels: list[Any] = [text(shape.target) if shape.target else index % 2 for index in range(examples)]
        self.train = self.selection = Dataset.from_dict({"input_ids": sources, "labels": labels})
        self.lengths = [len(source) for source in sources]
        self.collator = PaddingCollator(1)


@dataclass
class PaddingCollator:
    """Pads sources with `pad`; the decoder's input is </s> and then the labels, shifted by one."""

    pad: int
    pad_to_multiple_of: int = 1

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [example["input_ids"] for example in examples]
        multiple = self.pad_to_multiple_of
        width = -(-max(map(len, rows)) // multiple) * multiple
        batch = {
            "input_ids": torch.tensor([row + [self.pad] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }
        if batch["labels"].dim() == 2:
            batch["decoder_input_ids"] = batch["labels"].roll(1, dims=1)
            batch["decoder_input_ids"][:, 0] = 2
        return batch


@dataclass
class Result:
    """All measurements of a variant."""

    name: str
    trained: int = 0
    seconds: list[float] = field(default_factory=list)  # of each step counted
    first_s: float = 0.0  # of the first round as a whole, compilation included
    peak_bytes: int | None = None  # of tensors
    reserved_bytes: int | None = None  # also of what torch keeps for later tensors, and of CUDA graphs
    loss: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Variant:
    """A model and a function that trains it for some steps and returns the seconds of each and the logged losses."""

    name: str
    build: Callable[[], PreTrainedModel]
    train: Callable[[PreTrainedModel, int], tuple[list[float], list[float]]]
    model: PreTrainedModel | None = None
    own_bytes: int = 0


class StopAfter(TrainerCallback):
    """Ends a training after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.steps:
            control.should_training_stop = True


class Bench:
    """The variants of one shape on one device."""

    def __init__(self, shape: Shape, device: torch.device, steps: int, scratch: Path) -> None:
        self.shape, self.device, self.scratch = shape, device, scratch
        vocabulary = 500 if shape.batch < 16 else 49000
        # enough that one round sees no example twice, and that buckets have neighbours
        self.data = Data(shape, shape.batch * max(40, WARM_UP + steps), vocabulary)

    def ours(self, name: str, method: str, **changes: Any) -> Variant:
        """A preset of peftbench, trained by its own `fit_model`."""
        changes = dict(changes)
        dtype = changes.pop("dtype", DType.bfloat16)
        run = self.run(method)
        if run.unfreeze is not Unfreeze.none:
            dtype = DType.float32
        run.model.dtype = dtype

        def build() -> PreTrainedModel:
            model = self.shape.model().to(torch.bfloat16 if dtype is DType.bfloat16 else torch.float32)
            attach(model, list_modifications(run), run.unfreeze, untrained=[])
            return model.to(self.device)

        def train(model: PreTrainedModel, steps: int) -> tuple[list[float], list[float]]:
            return self.fit(model, run, steps, changes)

        return Variant(name, build, train)

    def limit(self, name: str, **changes: Any) -> Variant:
        """The frozen backbone with all fast paths, which only passes gradients down to a vector at its embeddings."""
        run = self.run("mam")
        run.model.dtype = changes.pop("dtype", DType.bfloat16)

        def build() -> PreTrainedModel:
            model = self.shape.model()
            model.requires_grad_(False)
            model.to(torch.bfloat16 if run.model.dtype is DType.bfloat16 else torch.float32)
            for module in list(model.modules()):
                if isinstance(module, nn.Embedding) and module.weight.shape[0] > 400 and module.weight.shape[1] > 2:
                    module.register_parameter("added", nn.Parameter(torch.zeros(module.embedding_dim)))
                    module.register_forward_hook(lambda m, args, out: out + m.added.to(out.dtype))
            return model.to(self.device)

        return Variant(name, build, lambda model, steps: self.fit(model, run, steps, changes))

    def run(self, method: str) -> Run:
        """The preset as in `peftbench train`, for the shape's task."""
        words = [f"method={method}", f"task={self.shape.task}"]
        run = compose_run([*words, "task.data_dir=.", "task.hub_id=null"])
        return run

    def fit(
        self, model: PreTrainedModel, run: Run, steps: int, changes: dict[str, Any]
    ) -> tuple[list[float], list[float]]:
        """Train by `peftbench.training.fit.fit_model` for `steps` steps with all fast paths except for `changes`."""
        fast = {
            "compile": Compile.layers,
            "padding_free": True,
            "fused_loss": True,
            "graphs": self.device.type == "cuda",
        }
        settings = replace(
            run.trainer,
            **{**fast, **changes},
            batch_size=self.shape.batch,
            batch_tokens=None,
            accumulation=1,
            max_steps=RUN,
            keep=Keep.last,
            evaluate_every=None,
            warmup=0.0,
            precision=Precision.bf16,
            device=Device.cuda if self.device.type == "cuda" else Device.cpu,
        )
        losses: list[float] = []
        model.train()
        fitted = fit_model(
            model,
            self.data,  # type: ignore[arg-type]  # it has what fit reads of a TaskData
            Recipe(settings, seed=1, autocast_dtype=choose_autocast_dtype(settings, run.model, model)),
            Criterion(evaluate=dict, metric="loss"),
            Resuming(Checkpoints(self.scratch, 1e9, "")),
            Monitor(
                log=lambda values: losses.append(values["loss"]) if "loss" in values else None,
                callbacks=[StopAfter(steps)],
            ),
        )
        return fitted.step_seconds, losses

    def peer(
        self, name: str, prepare: Callable[[PreTrainedModel], Any], *, compiled: bool, flat: bool = False
    ) -> Variant:
        """transformers' Trainer as its users run it: bfloat16 autocast, fused AdamW, random batches.

        With `flat`, it trains without padding, with its flattening collator and Liger's kernels.
        """

        def build() -> PreTrainedModel:
            model: PreTrainedModel = prepare(self.shape.model()).to(self.device)
            return model

        def train(model: PreTrainedModel, steps: int) -> tuple[list[float], list[float]]:
            pace = Pace(self.device)
            model.train()
            arguments = self.arguments(TrainingArguments, torch_compile=compiled, use_liger_kernel=flat)
            # If the widths changed at every batch, a compiled model would be compiled again and again.
            collator = pad_to_multiple(self.data.collator, 64) if compiled else self.data.collator
            if flat:
                collator = self.flatten()
            trainer = Trainer(
                model=model,
                args=arguments,
                data_collator=collator,
                train_dataset=self.data.train,
                callbacks=[pace, StopAfter(steps)],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return pace.seconds(), losses

        return Variant(name, build, train)

    def arguments(self, kind: type[TrainingArguments], **others: Any) -> TrainingArguments:
        """Trainer's arguments that all peers have, and `others`."""
        cuda = self.device.type == "cuda"
        arguments = kind(
            output_dir=str(self.scratch),
            max_steps=RUN,
            per_device_train_batch_size=self.shape.batch,
            learning_rate=1e-4,
            label_smoothing_factor=self.run("mam").trainer.label_smoothing,
            optim="adamw_torch_fused",
            bf16=True,
            dataloader_num_workers=2 if cuda else 0,
            logging_steps=RUN // 200,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not cuda,
            seed=1,
            log_level="error",
            **others,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments

    def trl(self, name: str, prepare: Callable[[PreTrainedModel], Any]) -> Variant:
        """TRL's SFTTrainer without padding, with Liger's kernels, on the same examples. Measure it in its own process:
        Liger patches the model's class."""

        def train(model: PreTrainedModel, steps: int) -> tuple[list[float], list[float]]:
            from tokenizers import Tokenizer, models
            from trl import SFTConfig, SFTTrainer

            pace = Pace(self.device)
            words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
            trainer = SFTTrainer(
                model=model,
                args=self.arguments(
                    SFTConfig,
                    padding_free=True,
                    use_liger_kernel=self.device.type == "cuda",
                    max_length=None,
                    dataset_kwargs={"skip_prepare_dataset": True},
                ),
                train_dataset=Dataset.from_list([self.join(example) for example in self.data.train]),
                processing_class=transformers.PreTrainedTokenizerFast(
                    tokenizer_object=words, pad_token="<pad>", eos_token="<end>"
                ),
                callbacks=[pace, StopAfter(steps)],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            return pace.seconds(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

        def build() -> PreTrainedModel:
            model: PreTrainedModel = prepare(self.shape.model()).to(self.device)
            return model

        return Variant(name, build, train)

    def flatten(self) -> Callable[[list[dict[str, Any]]], Any]:
        """transformers' collator that puts a batch in one row, with the prompts' labels left out."""
        flattening = DataCollatorWithFlattening()

        def collate(examples: list[dict[str, Any]]) -> Any:
            return flattening([self.join(example) for example in examples])

        return collate

    def join(self, example: dict[str, Any]) -> dict[str, list[int]]:
        """A prompt and its completion as one text, of which the prompt has no labels."""
        prompt, completion = example["input_ids"], example["labels"]
        return {"input_ids": [*prompt, *completion], "labels": [*[-100] * len(prompt), *completion]}

    def peft(self, model: PreTrainedModel) -> Any:
        """peft's LoRA at the FFN, of the same size as ours."""
        from peft import LoraConfig, get_peft_model

        run = self.run("lora_ffn")
        assert run.bottleneck is not None
        lora = LoraConfig(
            r=run.bottleneck,
            lora_alpha=round(run.composition_function.scale * run.bottleneck),
            lora_dropout=run.input_dropout,
            target_modules=self.shape.targets,
            modules_to_save=None if self.shape.target or self.shape.alone else ["classifier"],
        )
        return get_peft_model(model, lora)

    def variants(self, ablations: list[str]) -> Iterator[Variant]:
        """All variants: peft, ours with each of the ablations, the frozen limit, full fine-tuning by Trainer."""
        yield self.peer("peft lora eager", self.peft, compiled=False)
        for change in ablations:
            for name, method in (("mam", "mam"), ("lora", "lora_ffn"), ("full", "full")):
                yield self.ours(f"{name} {change}", method, **WITHOUT[change])
        yield self.limit("limit on")
        yield self.limit("limit off", **WITHOUT["off"])
        yield self.peer("full Trainer eager", lambda model: model, compiled=False)
        yield self.peer("peft lora compiled", self.peft, compiled=True)
        yield self.peer("full Trainer compiled", lambda model: model, compiled=True)
        if self.shape.alone:  # last, because Liger patches the classes of models

            def rounded(model: PreTrainedModel) -> Any:
                return self.peft(model.to(torch.bfloat16))

            yield self.peer("peft lora bf16", rounded, compiled=False)
            yield self.peer("peft lora bf16 flat liger", rounded, compiled=False, flat=True)
            yield self.trl("trl lora bf16 flat liger", rounded)


def measure(bench: Bench, variant: Variant, steps: int, result: Result) -> None:
    """Run one round of a variant, and add the measurements to its result."""
    cuda = bench.device.type == "cuda"
    if variant.model is None:
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated() if cuda else 0
        variant.model = variant.build()
        result.trained = sum(p.numel() for p in variant.model.parameters() if p.requires_grad)
        variant.own_bytes = torch.cuda.memory_allocated() - before if cuda else 0
    others = torch.cuda.memory_allocated() - variant.own_bytes if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    seconds, losses = variant.train(variant.model, WARM_UP + steps)
    if not result.seconds:
        result.first_s = time.perf_counter() - began
    result.seconds += seconds[WARM_UP - 1 :]  # a step's time begins with the end of the one before
    result.loss += losses
    if cuda:
        result.peak_bytes = max(result.peak_bytes or 0, torch.cuda.max_memory_allocated() - others)
        result.reserved_bytes = max(result.reserved_bytes or 0, torch.cuda.max_memory_reserved() - others)


def clean(device: torch.device) -> None:
    """Free a variant's memory before the next one begins."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(results: list[Result]) -> str:
    """Rows of medians, fastest and slowest steps, memory, and ratios to peft as its users run it and compiled."""
    done = {result.name: result for result in results if result.seconds}
    lines = [
        f"{'variant':<28}{'trained':>9}{'ms':>9}{'min':>8}{'max':>8}{'x peft':>8}{'x comp.':>8}{'GiB':>8}{'x peft':>8}"
        f"{'reserved':>9}{'first s':>9}{'loss':>8}"
    ]
    eager, compiled = done.get("peft lora eager"), done.get("peft lora compiled")

    def ratio(value: float | None, base: float | None) -> str:
        return f"{value / base:>8.2f}" if value and base else f"{'-':>8}"

    def gib(count: int | None) -> str:
        return f"{count / 2**30:.2f}" if count else "-"

    for result in results:
        if not result.seconds:
            lines.append(f"{result.name:<28}{result.error or 'not run'}"[:150])
            continue
        peak = result.peak_bytes
        lines.append(
            f"{result.name:<28}{result.trained / 1e6:>8.1f}M{1000 * result.median:>9.1f}"
            f"{1000 * min(result.seconds):>8.1f}{1000 * max(result.seconds):>8.1f}"
            f"{ratio(result.median, eager and eager.median)}{ratio(result.median, compiled and compiled.median)}"
            f"{gib(peak):>8}{ratio(peak, eager and eager.peak_bytes)}{gib(result.reserved_bytes):>9}"
            f"{result.first_s:>9.1f}{result.loss[-1] if result.loss else float('nan'):>8.3f}"
            f"{' FAILED LATER: ' + result.error if result.error else ''}"
        )
    return "\n".join(lines)


def profile(bench: Bench, variant: Variant, steps: int) -> str:
    """The CUDA kernels of a few steps by time, after a warm-up."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    if variant.model is None:
        variant.model = variant.build()
    variant.train(variant.model, WARM_UP)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])
    with profiler(activities=activities) as found:
        variant.train(variant.model, steps)
    key = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key, 0))
    if bench.device.type == "cuda":
        events = [event for event in events if "CUDA" in str(event.device_type)] or events
    total = sum(getattr(event, key, 0) for event in events) or 1
    lines = [f"profile of {variant.name}, {steps} steps: {total / 1000 / steps:.1f} ms of kernels a step"]
    for event in events[:PROFILED]:
        spent = getattr(event, key, 0)
        share = f"{spent / 1000 / steps:>9.2f} ms {100 * spent / total:>5.1f}%"
        lines.append(f"{share} {event.count / steps:>7.0f} x {event.key[:100]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bart_large")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10, help="steps counted in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60, help="start no further variant after this time")
    parser.add_argument("--only", help="only variants with one of these words, separated by commas, in their names")
    parser.add_argument(
        "--variants", default="on,off", help=f"of ours, separated by commas: all, or some of {', '.join(WITHOUT)}"
    )
    parser.add_argument("--profile", help="print the kernels of the first variant whose name contains this")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    transformers.logging.set_verbosity_error()
    began = time.perf_counter()
    ablations = list(WITHOUT) if args.variants == "all" else args.variants.split(",")

    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(SHAPES[args.shape], device, args.steps, Path(scratch))
        variants = [
            variant
            for variant in bench.variants(ablations)
            if args.only is None or any(word.strip() in variant.name for word in args.only.split(","))
        ]
        results = {variant.name: Result(variant.name) for variant in variants}

        def write() -> None:
            about = {
                "shape": args.shape,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "date": time.strftime("%Y-%m-%d"),
            }
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({**about, "results": [asdict(r) for r in results.values()]}, indent=1))

        for index in range(args.rounds):
            for variant in variants:
                result = results[variant.name]
                if result.error or time.perf_counter() - began > 60 * args.minutes:
                    continue
                try:
                    measure(bench, variant, args.steps, result)
                except Exception as error:
                    result.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    traceback.print_exc()
                    variant.model = None
                clean(device)
                if result.seconds:
                    print(
                        f"[{time.perf_counter() - began:6.1f} s] round {index + 1} {variant.name}: "
                        f"{1000 * result.median:.1f} ms",
                        flush=True,
                    )
                write()
        if args.profile:
            chosen = next((v for v in variants if args.profile in v.name), None)
            try:
                print(
                    profile(bench, chosen, 12) if chosen else f"no variant has {args.profile} in its name", flush=True
                )
            except Exception:
                traceback.print_exc()
        print(f"\n{args.shape}, {args.rounds} rounds of {args.steps} steps, torch {torch.__version__}")
        print(table(list(results.values())), flush=True)


if __name__ == "__main__":
    sys.exit(main())
