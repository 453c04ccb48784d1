"""Fine-tuning: transformers' Trainer with peftbench's evaluation, progress and metrics log.

The paper's settings map onto it one to one (tables 7 and 8): AdamW with decay on all but biases and LayerNorms, linear
decay to zero after the warm-up, gradient clipping, label smoothing over the target tokens. What is reported is the last
state, or the best by the main metric on the selection split.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peftbench.backbones.attention_kernels import no_cudnn_attention
from peftbench.backbones.precision import chosen_device
from peftbench.backbones.sites import configs_of, configured
from peftbench.config import schema
from peftbench.records.record import Divergence
from peftbench.tasks.base import TaskData
from peftbench.training.arithmetic import operations
from peftbench.training.batching import Lengths, batches_of, batches_per_epoch, steps_per_epoch, total_steps
from peftbench.training.best import KeepBest
from peftbench.training.checkpoint import Checkpoint, Checkpoints, SaveByTime
from peftbench.training.divergence import StopWhereDiverged
from peftbench.training.micro_batch import AUTO, MicroBatches
from peftbench.training.pace import Pace
from peftbench.training.paths import FastPaths, collator_of, settled
from peftbench.training.replay import Recorder
from peftbench.training.trainer import Evaluate, FineTuner
from peftbench.utils.progress import Stage

Log = Callable[[dict[str, Any]], None]


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
    replay_bytes: int  # GPU memory of a step that CUDA graphs replay, which is not counted as allocated
    diverged: Divergence | None = None  # it was stopped there

    @property
    def step_s(self) -> float | None:
        """The median of the steps."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    @property
    def tflops(self) -> float | None:
        """10^12 of the operations that the method needs, done in a second of the median step."""
        return self.operations / self.step_s / 1e12 if self.step_s else None


def fit(
    model: PreTrainedModel,
    data: TaskData,
    settings: schema.Trainer,
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
    recorder: Recorder | None = None,
) -> Fitted:
    """Train what of `model` requires gradients, in place.

    Args:
        bf16: train under bfloat16 autocast, see `peftbench.backbones.precision.use_autocast`.
        checkpoints: where Trainer may write.
        evaluate: scores the model as it stands on the selection split.
        metric: the score by which `keep=best` chooses; higher is better, but of a loss lower.
        resume: the checkpoint to go on from; None: from the start.
        log: is given a dict for each logged step and evaluation.
        callbacks: for Trainer, beside our own.
        recorder: what records a step for `settings.graphs`; None: CUDA.

    Raises:
        UserError: `settings.graphs` without a GPU, or for a step that cannot be recorded; `settings.padding_free` for a
            backbone that cannot have it.
    """
    required = settings.graphs is True
    settings = settled(settings, model, bf16=bf16, records=recorder is not None or model.device.type == "cuda")
    steps, lengths, pace = total_steps(data, settings), Lengths.of(data), Pace(model.device)
    keeper = KeepBest(metric) if settings.keep is schema.Keep.best else None
    diverging = StopWhereDiverged()
    watching = [_Report(stage, log), SaveByTime(checkpoints.minutes), diverging, pace]
    own = [*watching, *([] if keeper is None else [keeper])]
    trainer = FineTuner(
        model=model,
        args=_arguments(settings, steps, seed, bf16, checkpoints.folder, data),
        data_collator=collator_of(data, model, settings, lengths),
        train_dataset=data.train,
        eval_dataset=data.selection,
        callbacks=[*own, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.trained = [p for p in model.parameters() if p.requires_grad]
    trainer.scores, trainer.keeper, trainer.diverging = evaluate, keeper, diverging
    trainer.batches = batches_of(data, settings, seed)
    trainer.micro = MicroBatches(settings.micro_batch, settings.batch_size, _longest(data, settings))
    trainer.paths = FastPaths.of(model, settings, lengths)
    if settings.graphs:
        trainer.record_steps(recorder, required=required)
    if settings.gradient_checkpointing:
        # transformers renames it; the re-entrant kind would need inputs with gradients
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    earlier = 0.0
    if resume is not None:
        earlier = resume.notes["seconds"]
        if keeper is not None:
            keeper.load(resume)
        if stage is not None:
            stage.advance(resume.step)
    began = time.perf_counter()
    trainer.notes = lambda: {
        "stamp": checkpoints.stamp,
        "seconds": earlier + time.perf_counter() - began,
        "best": None if keeper is None else keeper.notes,
    }
    no_cache = configured(configs_of(model), "use_cache", False)  # which a decoder would fill and never read
    with no_cache, no_cudnn_attention():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
    replay_bytes = trainer.replay_bytes
    step_seconds = pace.seconds()
    seconds = earlier + time.perf_counter() - began
    taken = trainer.state.global_step
    if keeper is not None and diverging.found is None:
        if keeper.step < taken:  # the last state is a candidate too
            trainer.evaluate()
        keeper.restore(model)
    examples = settings.accumulation * len(data.train) / batches_per_epoch(data, settings)  # of a step
    read = lengths if model.config.is_encoder_decoder else Lengths(data.lengths, [])
    return Fitted(
        steps=taken,
        seconds=seconds,
        earlier_seconds=earlier,
        tokens_per_s=taken * examples * lengths.mean / seconds,
        step_seconds=step_seconds,
        operations=examples * operations(model, *read),
        micro_batch=trainer.micro.notes,
        fast_paths=trainer.paths_taken,
        replay_bytes=replay_bytes,
        diverged=diverging.found,
    )


def _longest(data: TaskData, settings: schema.Trainer) -> list[int]:
    """The training examples of a batch that takes as much memory as any, where it has to be known."""
    if settings.micro_batch != AUTO:
        return []
    by_length = sorted(range(len(data.train)), key=lambda index: -data.lengths[index])
    if settings.batch_tokens is None:
        return by_length[: settings.batch_size]
    return by_length[: max(1, settings.batch_tokens // data.lengths[by_length[0]])]


_SCHEDULES = {  # in transformers' words, whose "constant" knows no warm-up
    schema.Schedule.linear: "linear",
    schema.Schedule.cosine: "cosine",
    schema.Schedule.constant: "constant_with_warmup",
}


def _arguments(
    settings: schema.Trainer, steps: int, seed: int, bf16: bool, folder: Path, data: TaskData
) -> TrainingArguments:
    cuda = chosen_device(settings).type == "cuda"
    arguments = TrainingArguments(
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
        eval_strategy="steps" if settings.keep is schema.Keep.best else "no",
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
    # On a machine with several GPUs Trainer would wrap the model in DataParallel, whose replicas share no hooks.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


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
