"""Fine-tuning: transformers' Trainer with peftbench's evaluation, progress and metrics log.

The paper's settings map onto Trainer's one to one (tables 7 and 8): AdamW with decay on all but biases and LayerNorms,
linear decay to zero after the warm-up, gradient clipping, label smoothing over the target tokens. The result is the
last state, or the best by the main metric on the selection split.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftbench.backbones.attention_kernels import avoid_cudnn_attention
from peftbench.backbones.precision import choose_device
from peftbench.backbones.sites import list_configs, set_configs
from peftbench.config import schema
from peftbench.records.record import Divergence
from peftbench.tasks.base import TaskData
from peftbench.tasks.batch import predicts_next
from peftbench.training.arithmetic import count_operations
from peftbench.training.batching import (
    Lengths,
    count_batches_per_epoch,
    count_steps,
    count_steps_per_epoch,
    make_batches,
)
from peftbench.training.best import KeepBest
from peftbench.training.checkpoint import Checkpoint, Checkpoints, SaveByTime, StopWhenAsked
from peftbench.training.class_weights import WeightedLoss, scale_class_weights
from peftbench.training.looks import Judge, PruneByLooks
from peftbench.training.micro_batch import AUTO, MicroBatches
from peftbench.training.noise import choose_noise
from peftbench.training.paths import FastPaths, make_collator, resolve_auto
from peftbench.training.replay import Recorder
from peftbench.training.sharding import is_sharded
from peftbench.training.shares import share_batches
from peftbench.training.trainer import Evaluate, FineTuner, Recording
from peftbench.utils.errors import UserError
from peftbench.utils.progress import Stage
from peftbench.utils.stopping import defer_stop, stop_if_asked
from peftbench.utils.team import ALONE, Team

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    settings: schema.Trainer
    seed: int
    autocast_dtype: torch.dtype | None = None  # see `peftbench.backbones.precision.choose_autocast_dtype`
    recorder: Recorder | None = None  # records a step for `settings.graphs`; None: CUDA


@dataclass(frozen=True)
class Criterion:
    """What `keep=best` compares the states of a training by, and what may give the training up."""

    evaluate: Evaluate  # scores the model in its current state on the selection split
    metric: str  # the score that counts; higher is better, except for a loss
    judge: Judge | None = None  # gives a training up by a look


@dataclass(frozen=True)
class Resuming:
    """Where a training writes checkpoints, and the checkpoint from which it resumes."""

    checkpoints: Checkpoints
    resume: Checkpoint | None = None  # None: from the start

    @property
    def earlier_seconds(self) -> float:
        """Return the seconds of training up to the checkpoint."""
        return 0.0 if self.resume is None else float(self.resume.notes["seconds"])


@dataclass(frozen=True)
class Monitor:
    """What follows a training."""

    stage: Stage | None = None  # its bar advances at each optimiser step
    log: Log = lambda values: None  # takes a dict for each logged step and evaluation
    callbacks: Sequence[TrainerCallback] = ()  # Trainer's, in addition to our own

    @property
    def all_callbacks(self) -> list[TrainerCallback]:
        """Return all that Trainer has to call."""
        return [_Report(self.stage, self.log), *self.callbacks]


NO_MONITOR = Monitor()


@dataclass(frozen=True)
class Fitted:
    """What the training cost."""

    steps: int  # optimiser steps
    seconds: float  # including interrupted attempts, up to the checkpoint from which this one resumed
    earlier_seconds: float  # the part of `seconds` that the interrupted attempts took
    tokens_per_s: float  # source and target tokens, without padding
    step_seconds: list[float]  # each optimiser step of this attempt without an evaluation or a checkpoint
    operations: float  # that an optimiser step needs, see `arithmetic`
    micro_batch: dict[str, Any]  # into how many parts a batch was split, and where memory ran out
    fast_paths: list[str]  # keys of those taken
    replay_bytes: int  # GPU memory of a step that CUDA graphs replay, which is not counted as allocated
    replay_failure: str | None  # why steps were no longer recorded as CUDA graphs
    diverged: Divergence | None = None  # where the training was stopped because it diverged
    stopped_early: bool = False  # by `trainer.early_stopping`

    @property
    def step_s(self) -> float | None:
        """Return the median of the steps."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    @property
    def tflops(self) -> float | None:
        """Return the operations that the method needs, in 10^12, per second of the median step."""
        return self.operations / self.step_s / 1e12 if self.step_s else None


def fit_model(
    model: PreTrainedModel,
    data: TaskData,
    recipe: Recipe,
    criterion: Criterion,
    resuming: Resuming,
    monitor: Monitor = NO_MONITOR,
    team: Team = ALONE,
) -> Fitted:
    """Train the parameters of `model` that require gradients, in place, together with the other processes of `team`.

    Raises:
        Pruned: the search gave the training up.
        Stopped: a scheduler asked this process to end, and the training has a checkpoint.
        UserError: `recipe.settings.graphs` without a GPU, or for a step that cannot be recorded; `padding_free` for a
            backbone that cannot have it.
    """
    settings = recipe.settings
    lengths = Lengths.of(data, encoder_decoder=model.config.is_encoder_decoder)
    pruner = None if criterion.judge is None else PruneByLooks(criterion.judge, criterion.metric)
    if pruner is not None:
        monitor = replace(monitor, callbacks=[*monitor.callbacks, pruner])
    trainer = _build_trainer(model, data, lengths, recipe, criterion, resuming, monitor, team)
    if settings.gradient_checkpointing:
        checkpoint_gradients(model)
    _train(trainer, resuming.resume, monitor.stage)
    if trainer.state.global_step < trainer.state.max_steps and trainer.diverging.found is None:
        stop_if_asked()  # there is a checkpoint; a training that has ended is first saved
    if pruner is not None:
        pruner.stop_if_pruned()
    step_seconds = trainer.pace.seconds()  # waits for the GPU, so the clock is read after it
    seconds, replay_bytes = trainer.clock.seconds, trainer.replay_bytes
    trainer.restore_best()  # may evaluate, which takes time, and releases graphs
    examples = settings.accumulation * len(data.train) / count_batches_per_epoch(data, settings)  # of a step
    return Fitted(
        steps=trainer.state.global_step,
        seconds=seconds,
        earlier_seconds=resuming.earlier_seconds,
        tokens_per_s=trainer.state.global_step * examples * lengths.mean / seconds,
        step_seconds=step_seconds,
        operations=examples * count_operations(model, lengths),
        micro_batch=trainer.micro.notes,
        fast_paths=trainer.paths_taken,
        replay_bytes=replay_bytes,
        replay_failure=trainer.replay_failure,
        diverged=trainer.diverging.found,
        stopped_early=trainer.keeper is not None and trainer.keeper.stopped,
    )


def _build_trainer(
    model: PreTrainedModel,
    data: TaskData,
    lengths: Lengths,
    recipe: Recipe,
    criterion: Criterion,
    resuming: Resuming,
    monitor: Monitor,
    team: Team,
) -> FineTuner:
    """Replace `auto` in the settings, and build the trainer with its fast paths and callbacks."""
    can_record = (recipe.recorder is not None or model.device.type == "cuda") and not is_sharded(model)
    longest = lengths.longest[0]
    half = recipe.autocast_dtype is not None or model.dtype is torch.bfloat16
    settings = resolve_auto(recipe.settings, model, half=half, records=can_record, longest=longest)
    required = recipe.settings.graphs is True
    checkpoints = resuming.checkpoints
    examples = -(-settings.batch_size // team.size)  # of a process
    collator = make_collator(data, model, settings, lengths)
    return FineTuner(
        model,
        scores=criterion.evaluate,
        keeper=_make_keeper(settings, criterion, resuming.resume),
        batches=make_batches(data, settings, recipe.seed),
        paths=FastPaths.of(model, replace(settings, batch_size=examples), lengths),
        micro=MicroBatches(settings.micro_batch, examples, _find_longest(data, settings)),
        team=team,
        lockstep=is_sharded(model),
        noise=choose_noise(model, settings, recipe.seed, team),
        recording=Recording(recipe.recorder, required) if settings.graphs else None,
        lora_plus=settings.lora_plus,
        stamp=checkpoints.stamp,
        earlier_seconds=resuming.earlier_seconds,
        callbacks=[SaveByTime(checkpoints.minutes), StopWhenAsked(team), *monitor.all_callbacks],
        args=_build_arguments(recipe, checkpoints.folder, data),
        data_collator=share_batches(collator, team, next_token=predicts_next(model)),
        compute_loss_func=_make_weighted_loss(model, data, settings),
        train_dataset=data.train,
        eval_dataset=data.selection,
    )


def _make_keeper(settings: schema.Trainer, criterion: Criterion, resume: Checkpoint | None) -> KeepBest | None:
    """Return what keeps the best state, with the one from the checkpoint; None: the last state is the result."""
    if settings.keep is not schema.Keep.best:
        return None
    keeper = KeepBest(criterion.metric, settings.early_stopping)
    if resume is not None:
        keeper.load(resume)
    return keeper


def _make_weighted_loss(model: PreTrainedModel, data: TaskData, settings: schema.Trainer) -> WeightedLoss | None:
    """Return the loss with class weights; None: the model's own."""
    if settings.class_weights is None:
        return None
    weights = scale_class_weights(settings.class_weights, data.label_codes(), data.task.labels)
    return WeightedLoss(weights, settings.label_smoothing, model.device)


def checkpoint_gradients(model: PreTrainedModel, reentrant: bool = False) -> None:
    """Have the model compute activations again in the backward pass. If re-entrant, its inputs need gradients."""
    # transformers 5.24 deprecates the older name, and says that version 6 will have the newer one alone.
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def _train(trainer: FineTuner, resume: Checkpoint | None, stage: Stage | None) -> None:
    """Train from the start, or from a checkpoint."""
    if resume is not None and stage is not None:
        stage.advance(resume.step)
    no_cache = set_configs(list_configs(trainer.model), "use_cache", False)  # a decoder would fill it and never read it
    with no_cache, avoid_cudnn_attention(), defer_stop():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))


def _find_longest(data: TaskData, settings: schema.Trainer) -> list[int]:
    """Return the indices of a batch that takes as much memory as any, if that has to be tried."""
    if settings.micro_batch != AUTO:
        return []
    by_length = sorted(range(len(data.train)), key=lambda index: -data.lengths[index])
    if settings.batch_tokens is None:
        return by_length[: settings.batch_size]
    return by_length[: max(1, settings.batch_tokens // data.lengths[by_length[0]])]


_SCHEDULES = {  # transformers' names; its "constant" has no warm-up
    schema.Schedule.linear: "linear",
    schema.Schedule.cosine: "cosine",
    schema.Schedule.constant: "constant_with_warmup",
}


def _choose_optimizer(name: str, cuda: bool) -> str:
    """Return transformers' name of the optimiser."""
    if name != "adamw":
        return name
    return "adamw_torch_fused" if cuda else "adamw_torch"


def require_optimizer(name: str) -> None:
    """Raise a UserError if the package of an optimiser is missing."""
    package = schema.OPTIMIZERS.get(name)
    if package is not None and find_spec(package) is None:
        pip = "peftbench[quant]" if package == "bitsandbytes" else package
        raise UserError(f"trainer.optimizer={name} needs {package}, which is not installed: pip install {pip}.")


def _build_arguments(recipe: Recipe, folder: Path, data: TaskData) -> TrainingArguments:
    """Return Trainer's arguments; `folder` is for its checkpoints."""
    settings, steps = recipe.settings, count_steps(data, recipe.settings)
    cuda = choose_device(settings).type == "cuda"
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
        optim=_choose_optimizer(settings.optimizer, cuda),
        logging_nan_inf_filter=False,  # the filter waits for the GPU at every step
        bf16=recipe.autocast_dtype is torch.bfloat16,
        fp16=recipe.autocast_dtype is torch.float16,
        eval_strategy="steps" if settings.keep is schema.Keep.best else "no",
        eval_steps=settings.evaluate_every or count_steps_per_epoch(data, settings),
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
        seed=recipe.seed,
        log_level="error",
    )
    # With several GPUs Trainer would wrap the model in DataParallel, whose replicas share no hooks.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _Report(TrainerCallback):
    """Advances the bar and passes on what Trainer logs."""

    def __init__(self, stage: Stage | None, log: Log) -> None:
        self.stage, self.write = stage, log

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stage is not None:
            self.stage.advance()

    def on_log(
        self, args: object, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "train_runtime" in logs:  # Trainer's last line covers this attempt only; the record has the whole times
            return
        self.write({"step": state.global_step, **logs})
        if self.stage is not None and "loss" in logs:
            self.stage.say(f"loss {float(logs['loss']):.3f}")
