#!/usr/bin/env python
"""Measures how fast models with modifications generate, compared with the bare backbone. Prints a table of ratios.

    python scripts/benchmark_generation.py                                BART-large's shape on one CUDA device
    python scripts/benchmark_generation.py --shape llama_1b --beams 1     a decoder alone
    python scripts/benchmark_generation.py --shape tiny --device cpu      checks that it runs
    python scripts/benchmark_generation.py --profile mam                  where one variant spends its time

All variants generate in one process, in turns, from the same sources, by `peftbench.evaluation.predict` as runs do
(bfloat16 autocast, beams). The first rows are transformers' own `generate` of the untouched backbone, under autocast
and entirely in bfloat16. Weights are random, trained tensors too (none is zero), and every text has the same number of
tokens, so all variants do the same work. The time is that of one pass over the sources. Folding, merging and rounding
the weights happens once for all batches of a data set and has its own column. A variant that fails is reported, and
the others continue.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from peftbench.backbones.precision import autocast
from peftbench.config import schema
from peftbench.config.compose import compose_run
from peftbench.evaluation import inference
from peftbench.evaluation import predict as predict_module
from peftbench.evaluation.predict import predict
from peftbench.modification.attach import attach
from peftbench.modification.state import fold
from peftbench.tasks.completion import PromptCollator
from peftbench.utils.memory import pause_collection

DECODERS: dict[str, dict[str, Any]] = {
    "llama_1b": {  # Llama-3.2-1B, without the scaling of its positions
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "smollm_135m": {  # SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny_llama": {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    **DECODERS,
    "bart_large": {},  # transformers' defaults are BART-large's
    "tiny": {
        "vocab_size": 99,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
}
PAD = 1


@dataclass(frozen=True)
class Variant:
    """A row of the table: overrides of `peftbench train`, or None for the bare backbone."""

    name: str
    overrides: tuple[str, ...] | None
    merge: bool = True
    plain: bool = False  # by transformers alone
    whole: bool = False  # in bfloat16, without autocast


VARIANTS = (
    Variant("bare, transformers", None, plain=True),
    Variant("bare, all bfloat16", None, plain=True, whole=True),
    Variant("bare", None),
    Variant("mam", ("method=mam", "bottleneck=512", "mix.attention.bottleneck=30", "composition_function.scale=4")),
    Variant("lora_ffn", ("method=lora_ffn", "bottleneck=102"), merge=False),
    Variant("lora_ffn, merged", ("method=lora_ffn", "bottleneck=102")),
    Variant("lora, merged", ("method=lora", "bottleneck=200")),
    Variant("prefix", ("method=prefix", "bottleneck=200")),
    Variant("adapter", ("method=adapter", "bottleneck=100")),
)


@dataclass
class Measured:
    """Seconds of each pass and of the preparation, and the memory of one pass, without the weights."""

    seconds: list[float] = field(default_factory=list)
    prepare: float = 0.0
    memory: int = 0
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def build(shape: str, device: torch.device) -> PreTrainedModel:
    """Build the backbone with random weights, the same in each call."""
    torch.manual_seed(0)
    model: PreTrainedModel
    with device:
        if shape in DECODERS:
            ends = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True}
            model = LlamaForCausalLM(LlamaConfig(**DECODERS[shape], **ends))
        else:
            model = BartForConditionalGeneration(BartConfig(**SHAPES[shape]))
    return model.eval()


def build_variant(variant: Variant, shape: str, device: torch.device) -> PreTrainedModel:
    """Build a model as it is after training: attached, folded, no trained tensor zero."""
    model = build(shape, device)
    if variant.plain:
        return model.bfloat16() if variant.whole else model
    modifications: dict[str, schema.Modification] = {}
    if variant.overrides is not None:
        overrides = ["task=xsum", "model=bart_large", *variant.overrides]
        run = compose_run(overrides)
        modifications = schema.list_modifications(run)
    attach(model, modifications)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    fold(model)
    return model.eval()


def sources(count: int, longest: int, vocabulary: int) -> Dataset:
    """Random ids; the lengths are between half of the longest and the longest."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()
    lengths[0] = longest
    ids = [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def collate_right(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": PAD, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in filled.items()
    }


def generation(beams: int, tokens: int, alone: bool) -> GenerationConfig:
    """The settings of a run of task=xsum, but with exactly `tokens` tokens after the start token or the prompt."""
    own = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    lengths = {"min_length": tokens + 1, "max_length": tokens + 1}
    if alone:
        lengths = {"min_new_tokens": tokens + 1, "max_new_tokens": tokens + 1}
    return GenerationConfig(**own, **lengths, num_beams=beams, no_repeat_ngram_size=3, length_penalty=1.0)


def one_pass(
    variant: Variant, model: PreTrainedModel, data: Dataset, options: GenerationConfig, arguments: Namespace
) -> Any:
    """Generate once from all sources; returns the ids."""
    collate = PromptCollator(PAD) if arguments.shape in DECODERS else collate_right
    if not variant.plain:
        return predict(model, data, collate, len(data), generation=options, autocast_dtype=torch.bfloat16)
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]), reverse=True)
    batch = {name: tensor.to(model.device) for name, tensor in collate([data[i] for i in order]).items()}
    with torch.no_grad(), autocast(model.device, None if variant.whole else torch.bfloat16):
        ids = model.generate(**batch, generation_config=options).cpu().numpy()
        return ids[:, batch["input_ids"].shape[1] :] if arguments.shape in DECODERS else ids


@contextmanager
def ready(variant: Variant, model: PreTrainedModel) -> Iterator[None]:
    """Do in advance what `predict` does before the first batch; nothing is merged if `variant.merge` is false."""
    with ExitStack() as stack:
        if not variant.merge:
            stack.enter_context(patch.object(inference, "merge_temporarily", lambda model: nullcontext()))
        if not variant.plain:
            stack.enter_context(inference.prepare_inference(model, torch.bfloat16))
            stack.enter_context(patch.object(predict_module, "prepare_inference", lambda model, dtype: nullcontext()))
        yield


def measure(
    models: dict[Variant, PreTrainedModel], data: Dataset, beams: int, arguments: Namespace, found: dict[str, Measured]
) -> None:
    """Run the passes of all variants in turns; the first pass of each is not counted."""
    options = generation(beams, arguments.tokens, arguments.shape in DECODERS)
    for turn in range(arguments.rounds + 1):
        for variant, model in models.items():
            measured = found[variant.name]
            if measured.error is not None:
                continue
            try:
                gc.collect()
                with pause_collection():  # as timeit does
                    began = clock(model.device)
                    with ready(variant, model):
                        prepared = clock(model.device)
                        before = reset_memory(model.device)
                        ids = one_pass(variant, model, data, options, arguments)
                        ended = clock(model.device)
                assert ids.shape == (len(data), arguments.tokens + 1), ids.shape
            except Exception as error:  # the other variants are still measured
                traceback.print_exc()
                measured.error = f"{type(error).__name__}: {error}"
                continue
            if turn:
                measured.seconds.append(ended - prepared)
                measured.prepare = prepared - began
                measured.memory = max(measured.memory, peak_memory(model.device) - before)


def clock(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_memory(device: torch.device) -> int:
    """Reset the peak; returns the bytes in use."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device: torch.device) -> int:
    """The most bytes in use since the last reset."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def profile(variant: Variant, model: PreTrainedModel, data: Dataset, beams: int, arguments: Namespace) -> None:
    """Print the kernels of one pass that take longest, and what launching them costs the CPU."""
    from torch.profiler import ProfilerActivity

    options = generation(beams, arguments.tokens, arguments.shape in DECODERS)
    cuda = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with ready(variant, model):
        one_pass(variant, model, data, options, arguments)
        with torch.profiler.profile(activities=activities) as profiler:
            began = clock(model.device)
            one_pass(variant, model, data, options, arguments)
            wall = clock(model.device) - began
    events = profiler.key_averages()
    print(f"\n{variant.name}, {beams} beams: {wall:.3f} s with the profiler on")
    print(events.table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=arguments.rows))
    if cuda:
        print(events.table(sort_by="self_cpu_time_total", row_limit=arguments.rows))
        launches = [event for event in events if "LaunchKernel" in event.key]
        count, spent = sum(e.count for e in launches), sum(e.self_cpu_time_total for e in launches) / 1e6
        busy = sum(event.self_device_time_total for event in events) / 1e6
        steps = arguments.tokens
        print(f"kernel launches: {count} ({count / steps:.0f} for each token), {spent:.3f} s of the CPU in them")
        print(f"kernels ran for {busy:.3f} s of {wall:.3f} s, {1e3 * busy / steps:.2f} ms for each token")


def table(found: dict[str, dict[str, Measured]]) -> str:
    """One line for each variant: for each search the median, its ratio to both bare rows, preparation and memory."""
    head = f"{'':20}" + "".join(f"| {search:>8} s | x transf. | x bare | prep. s | GiB   " for search in found)
    lines = [head]
    for variant in VARIANTS:
        cells = []
        for search in found.values():
            measured = search.get(variant.name)
            if measured is None or not measured.seconds:
                cells.append(f"| {'failed' if measured else '-':>10} |           |        |         |       ")
                continue
            ratios = [
                f"{measured.median / base.median:.3f}" if (base := search.get(name)) and base.seconds else "-"
                for name in ("bare, transformers", "bare")
            ]
            cells.append(
                f"| {measured.median:10.3f} | {ratios[0]:>9} | {ratios[1]:>6} | {measured.prepare:7.3f} "
                f"| {measured.memory / 2**30:5.1f} "
            )
        lines.append(f"{variant.name:20}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="bart_large")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sources", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest source; the shortest has half")
    parser.add_argument("--tokens", type=int, default=60, help="of each generated text")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--rounds", type=int, default=5, help="counted passes of each variant")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants; all by default")
    parser.add_argument("--profile", metavar="NAME", help="profile this variant instead, for each number of beams")
    parser.add_argument("--rows", type=int, default=25, help="of the profile")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.shape.startswith("tiny"):
        arguments.longest = min(arguments.longest, 64)
    device = torch.device(arguments.device)
    names = [arguments.profile] if arguments.profile else arguments.only or [v.name for v in VARIANTS]
    chosen = [variant for variant in VARIANTS if variant.name in names]
    if len(chosen) < len(set(names)):
        parser.error(f"the variants are: {', '.join(variant.name for variant in VARIANTS)}")
    models, broken = {}, {}
    for variant in chosen:
        try:
            models[variant] = build_variant(variant, arguments.shape, device)
        except Exception as error:  # as in `measure`
            traceback.print_exc()
            broken[variant.name] = f"{type(error).__name__}: {error}"
    gc.freeze()  # as commands do (`utils.quick_imports`): the collector skips what torch made on import
    vocabulary = int(next(iter(models.values())).config.vocab_size)
    data = sources(arguments.sources, arguments.longest, vocabulary)
    if arguments.profile:
        for beams in arguments.beams:
            profile(chosen[0], models[chosen[0]], data, beams, arguments)
        return
    found: dict[str, dict[str, Measured]] = {}
    for beams in arguments.beams:
        search = "greedy" if beams == 1 else f"{beams} beams"
        found[search] = {variant.name: Measured(error=broken.get(variant.name)) for variant in chosen}
        measure(models, data, beams, arguments, found[search])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    setup = (
        f"{arguments.shape}, {arguments.sources} sources of {arguments.longest // 2} to {arguments.longest} tokens, "
        f"{arguments.tokens} tokens each, bfloat16 autocast, {where}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, median of {arguments.rounds} passes in turns"
    )
    if arguments.out is not None:
        figures = {search: {name: vars(m) for name, m in rows.items()} for search, rows in found.items()}
        arguments.out.write_text(json.dumps({"setup": setup, "figures": figures}, indent=2) + "\n")
    for search, rows in found.items():
        for name, measured in rows.items():
            if measured.error is not None:
                print(f"{name}, {search}: {measured.error}")
    print(f"\n{setup}\n\n{table(found)}")


if __name__ == "__main__":
    main()
