"""Fine-tuning: transformers' Trainer with peftbench's evaluation, progress and metrics log.

The paper's settings map onto it one to one (tables 7 and 8): AdamW with decay on all but biases and LayerNorms, linear
decay to zero after the warm-up, gradient clipping, label smoothing over the target tokens. What is reported is the last
state, or the best by the main metric on the selection split.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peftbench import config
from peftbench.modification.state import trained_tensors, write_tensors
from peftbench.precision import chosen_device
from peftbench.progress import Stage
from peftbench.sites import configs_of, configured
from peftbench.tasks.base import TaskData
from peftbench.tasks.tokens import positions
from peftbench.training.arithmetic import operations
from peftbench.training.batching import LengthBatches, TokenBatches, padded_to
from peftbench.training.checkpoint import Checkpoint, Checkpoints, Resumable, SaveByTime
from peftbench.training.compiled import CompiledLayers
from peftbench.training.micro_batch import AUTO, MicroBatched, MicroBatches
from peftbench.training.pace import Pace
from peftbench.training.padding_free import PaddingFree, row_step, with_lengths
from peftbench.training.paths import settled
from peftbench.training.replay import Record, Replayed
from peftbench.training.token_loss import TokenLoss, output_layer


@dataclass(frozen=True)
class Fitted:
    """What the training cost."""

    steps: int  # optimiser steps
    seconds: float  # interrupted tries counted up to the checkpoint that this one went on from
    earlier_seconds: float  # of these, what the interrupted tries took
    tokens_per_s: float  # source and target tokens, padding not counted
    step_seconds: list[float]  # of each optimiser step of this try, but those with an evaluation or a checkpoint
    operations: float  # that an optimiser step needs, see `arithmetic`
    micro_batch: dict[str, Any]  # into how many parts a batch went, and where memory ran out
    fast_paths: list[str]  # those taken, by their keys

    @property
    def step_s(self) -> float | None:
        """The median of the steps."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    @property
    def tflops(self) -> float | None:
        """10^12 of the operations that the method needs, done in a second of the median step."""
        return self.operations / self.step_s / 1e12 if self.step_s else None


WIDTH = 32  # bucketed batches are padded to multiples of so many tokens, if the backbone has positions for them
ITEMS = "items"  # beside a batch's tensors: by how many target tokens or examples the optimiser step divides
BEST = "best.safetensors"  # in a checkpoint: the trained tensors at the best evaluation so far

Log = Callable[[dict[str, Any]], None]
Evaluate = Callable[[], dict[str, float]]


def fit(
    model: PreTrainedModel,
    data: TaskData,
    settings: config.Trainer,
    *,
    seed: int,
    bf16: bool,
    checkpoints: Checkpoints,
    evaluate: Evaluate,
    metric: str,
    resume: Checkpoint | None = None,
    stage: Stage | None = None,
    log: Log = lambda values: None,
    callbacks: Sequence[TrainerCallback] = (),
    record: Record | None = None,
) -> Fitted:
    """Train what of `model` requires gradients, in place.

    Args:
        bf16: train under bfloat16 autocast, see `peftbench.precision.use_autocast`.
        checkpoints: where Trainer may write.
        evaluate: scores the model as it stands on the selection split.
        metric: the score by which `keep=best` chooses; higher is better, but of a loss lower.
        resume: the checkpoint to go on from; None: from the start.
        log: is given a dict for each logged step and evaluation.
        callbacks: for Trainer, beside our own.
        record: what records a step for `settings.graphs`; None: CUDA.

    Raises:
        UserError: `settings.graphs` without a GPU, or for a step that cannot be recorded; `settings.padding_free` for a
            backbone that cannot have it.
    """
    typed = settings
    settings = settled(settings, model, bf16=bf16, records=record is not None or model.device.type == "cuda")
    steps = total_steps(data, settings)
    pace = Pace(model.device)
    callbacks = [_Report(stage, log), SaveByTime(checkpoints.minutes), pace, *callbacks]
    keeper = _KeepBest(metric) if settings.keep is config.Keep.best else None
    if keeper is not None:
        callbacks.append(keeper)
    sources, targets = _lengths(data)
    longest = max(sources), max(targets, default=0)
    collator = data.collator
    if settings.padding_free:
        pad = model.config.pad_token_id or 0
        collator = with_lengths(collator, longest, pad) if settings.graphs else with_lengths(collator)
    elif settings.graphs or settings.batching is config.Batching.bucketed:
        limit = positions(model)
        fits = limit is None or -(-max(data.lengths) // WIDTH) * WIDTH <= limit
        collator = padded_to(collator, WIDTH if fits else 1)
    arguments = _arguments(settings, steps, seed, bf16, checkpoints.folder, data)
    # On a machine with several GPUs Trainer would wrap the model in DataParallel, whose replicas share no hooks.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = _Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=data.selection,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.scores = evaluate
    trainer.keeper = keeper
    if settings.batch_tokens is not None:
        trainer.batches = TokenBatches(data.lengths, settings.batch_tokens, seed)
    elif settings.batching is config.Batching.bucketed:
        trainer.batches = LengthBatches(data.lengths, settings.batch_size, seed)
    if settings.padding_free:
        size = min(len(data.train), settings.batch_size)
        multiples = (row_step(sources, size), row_step(targets or sources, size)) if settings.graphs else (1, 1)
        trainer.padding_free = PaddingFree(model, *longest, multiples)
    if settings.fused_loss and (layer := output_layer(model)) is not None:
        compiled = settings.compile is not config.Compile.none
        pack = None if trainer.padding_free is None else trainer.padding_free.targets
        trainer.token_loss = TokenLoss(model, layer, settings.label_smoothing, compiled=compiled, pack=pack)
    if settings.compile is not config.Compile.none:
        trainer.layers = CompiledLayers(model)
    if settings.graphs:
        trained = [p for p in model.parameters() if p.requires_grad]
        trainer.replayed = Replayed(trainer.whole_batch, trained, record, required=typed.graphs is True)
    trainer.micro = MicroBatches(settings.micro_batch, settings.batch_size, _longest(data, settings))
    earlier = 0.0
    if resume is not None:
        earlier = resume.notes["seconds"]
        if keeper is not None:
            keeper.load(resume)
        if stage is not None:
            stage.advance(resume.step)
    if settings.gradient_checkpointing:
        # transformers renames it; the re-entrant kind would need inputs with gradients
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    began = time.perf_counter()
    trainer.notes = lambda: {
        "stamp": checkpoints.stamp,
        "seconds": earlier + time.perf_counter() - began,
        "best": None if keeper is None else {"value": keeper.best, "step": keeper.step},
    }
    no_cache = configured(configs_of(model), "use_cache", False)  # which a decoder would fill and never read
    with no_cache, no_cudnn_attention():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
    if torch.cuda.is_available() and model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = earlier + time.perf_counter() - began
    if keeper is not None:
        if keeper.step < steps:  # the last state is a candidate too
            trainer.evaluate()
        keeper.restore(model)
    examples = settings.accumulation * len(data.train) / batches_per_epoch(data, settings)  # of a step
    tokens = (sum(sources) + sum(targets)) / max(1, len(data.train))  # of an example
    needed = operations(model, *((data.lengths, []) if not model.config.is_encoder_decoder else (sources, targets)))
    micro = {"parts": trainer.micro.parts, "halved_at": trainer.micro.halved_at} if trainer.micro.splits else {}
    taken = {
        "padding_free": trainer.padding_free,
        "fused_loss": trainer.token_loss,
        "compile": trainer.layers,
        "graphs": trainer.replayed and trainer.replayed.record,
    }
    fast_paths = [key for key, path in taken.items() if path is not None]
    pace_s = pace.seconds()
    return Fitted(
        steps, seconds, earlier, steps * examples * tokens / seconds, pace_s, examples * needed, micro, fast_paths
    )


@contextmanager
def no_cudnn_attention() -> Iterator[None]:
    """Train inside without cuDNN's kernel of scaled_dot_product_attention.

    Its gradient of the queries is NaN for some batches with a mask whose width is 64 modulo 128, and torch takes it by
    default on Hopper from 2.11 on (pytorch#196678; one batch in 460 of `scripts/pretrain.py`). The others are right.
    """
    enabled: Callable[[], bool] = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def total_steps(data: TaskData, settings: config.Trainer) -> int:
    """The number of optimiser steps: `max_steps`, or `epochs` passes over the training examples."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, round(settings.epochs * steps_per_epoch(data, settings)))


def steps_per_epoch(data: TaskData, settings: config.Trainer) -> int:
    """Optimiser steps in one pass; the last one of a pass may see fewer examples."""
    return -(-batches_per_epoch(data, settings) // settings.accumulation)


def batches_per_epoch(data: TaskData, settings: config.Trainer) -> int:
    """Batches in one pass over the training examples."""
    if settings.batch_tokens is not None:
        return len(TokenBatches(data.lengths, settings.batch_tokens, seed=0))
    return -(-len(data.train) // settings.batch_size)


def _longest(data: TaskData, settings: config.Trainer) -> list[int]:
    """The training examples of a batch that takes as much memory as any, where it has to be known."""
    if settings.micro_batch != AUTO:
        return []
    by_length = sorted(range(len(data.train)), key=lambda index: -data.lengths[index])
    if settings.batch_tokens is None:
        return by_length[: settings.batch_size]
    return by_length[: max(1, settings.batch_tokens // data.lengths[by_length[0]])]


_SCHEDULES = {  # in transformers' words, whose "constant" knows no warm-up
    config.Schedule.linear: "linear",
    config.Schedule.cosine: "cosine",
    config.Schedule.constant: "constant_with_warmup",
}


def _arguments(
    settings: config.Trainer, steps: int, seed: int, bf16: bool, folder: Path, data: TaskData
) -> TrainingArguments:
    cuda = chosen_device(settings).type == "cuda"
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        label_smoothing_factor=settings.label_smoothing,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.epsilon,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        logging_nan_inf_filter=False,  # it waits for the GPU at every step
        bf16=bf16,
        eval_strategy="steps" if settings.keep is config.Keep.best else "no",
        eval_steps=settings.evaluate_every or steps_per_epoch(data, settings),
        logging_strategy="steps",
        logging_steps=max(1, steps // 200),
        save_strategy="no",  # SaveByTime asks for checkpoints
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        accelerator_config={"non_blocking": cuda},
        use_cpu=not cuda,
        seed=seed,
        log_level="error",
    )


def _lengths(data: TaskData) -> tuple[list[int], list[int]]:
    """Tokens of each training example, without padding: of its input and, where it is text, of its target."""
    texts = len(data.train) > 0 and isinstance(data.train[0]["labels"], list)
    return [len(ids) for ids in data.train["input_ids"]], [len(ids) for ids in data.train["labels"]] if texts else []


class _Trainer(MicroBatched, Resumable):
    """Trainer whose evaluation is peftbench's own, the same as that of the report."""

    scores: Evaluate
    keeper: _KeepBest | None
    batches: TokenBatches | LengthBatches | None = None
    layers: CompiledLayers | None = None
    padding_free: PaddingFree | None = None
    token_loss: TokenLoss | None = None
    replayed: Replayed | None = None
    control: TrainerControl

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.keeper is not None and output_dir is not None:
            write_tensors(self.keeper.tensors, Path(output_dir) / BEST)

    def get_train_dataloader(self) -> Any:  # accelerate's shard of a DataLoader
        if self.batches is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with ExitStack() as stack:
            for path in (self.layers, self.padding_free):
                if path is not None:
                    stack.enter_context(path.active())
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def _add_gradients(self, model: PreTrainedModel, batch: Any, items: Any) -> Tensor:
        if self.replayed is None:
            return super()._add_gradients(model, batch, items)
        inputs = self._prepare_inputs(batch)
        if self.padding_free is not None:
            inputs = self.padding_free.rows(inputs)
        if items is not None:
            inputs = {**inputs, ITEMS: torch.as_tensor(items, device=self.args.device)}
        return self.replayed(inputs)

    def whole_batch(self, inputs: dict[str, Any]) -> Tensor:
        """Add a batch's gradients; returns its loss. What is recorded where `settings.graphs`."""
        return super()._add_gradients(self.model, inputs, inputs.pop(ITEMS, None))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.padding_free is not None:
            inputs = self.padding_free.load(inputs)
        if self.token_loss is None or return_outputs or inputs["labels"].dim() < 2:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.token_loss(inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not Trainer's estimate, which walks through all modules at every step; `arithmetic` has what is recorded."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {f"eval_{name}": value for name, value in self.scores().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Report(TrainerCallback):
    """Moves the bar and passes on what Trainer logs."""

    def __init__(self, stage: Stage | None, log: Log) -> None:
        self.stage, self.write = stage, log

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stage is not None:
            self.stage.advance()

    def on_log(
        self, args: object, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "train_runtime" in logs:  # Trainer's closing line speaks of this try only; the record has the whole times
            return
        self.write({"step": state.global_step, **logs})
        if self.stage is not None and "loss" in logs:
            self.stage.say(f"loss {float(logs['loss']):.3f}")


class _KeepBest(TrainerCallback):
    """Keeps a copy, on the CPU, of the trained tensors at the best evaluation so far."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.best: float | None = None
        self.step = 0  # of the last evaluation
        self.tensors: dict[str, Tensor] = {}

    def on_evaluate(
        self, args: object, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self.step = state.global_step
        value = metrics[f"eval_{self.metric}"] * (-1 if self.metric == config.LOSS else 1)
        if self.best is None or value > self.best:
            self.best = value
            self.tensors = {name: tensor.cpu().clone() for name, tensor in trained_tensors(kwargs["model"]).items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up what was kept when the checkpoint was written."""
        self.best, self.step = checkpoint.notes["best"]["value"], checkpoint.notes["best"]["step"]
        self.tensors = load_file(checkpoint.folder / BEST)

    @torch.no_grad()
    def restore(self, model: PreTrainedModel) -> None:
        """Put the best state back."""
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                parameter.copy_(self.tensors[name])
