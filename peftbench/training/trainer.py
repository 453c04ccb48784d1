"""transformers' Trainer with peftbench's evaluation, batches and fast paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl

from peftbench.backbones.quantisation import present_as_adapted
from peftbench.training.adaptive_rank import PruneRanks, is_adaptive, make_penalty
from peftbench.training.answer_loss import POSITIONS, compute_answer_loss
from peftbench.training.batching import LengthBatches
from peftbench.training.best import KeepBest
from peftbench.training.checkpoint import Resumable
from peftbench.training.divergence import StopWhereDiverged
from peftbench.training.loraplus import raise_up_rate
from peftbench.training.micro_batch import MicroBatched
from peftbench.training.pace import Clock, Pace
from peftbench.training.paths import FastPaths
from peftbench.training.replay import Recorder, Replayed
from peftbench.training.shares import CHECK, OF, ROW

ITEMS = "items"  # added to a batch's tensors: the target tokens or examples by which the optimiser step divides

Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Recording:
    """How the step of each shape of batch is recorded; see `Replayed`."""

    recorder: Recorder | None  # None: CUDA
    required: bool  # a step that cannot be recorded is an error


class FineTuner(MicroBatched, Resumable):
    """Trainer that scores the model with peftbench's own evaluation, which is also that of the report.

    It trains those parameters of the model that require gradients.

    Args:
        scores: scores the model in its current state on the selection split.
        keeper: keeps the best state; None: the last state is the result.
        batches: batches of similar length; None: random batches.
        paths: the fast paths of the forward pass.
        recording: how steps are recorded and replayed; None: they are not.
        lora_plus: the ratio of the learning rate of W_up to that of W_down; None: they are the same.
        stamp: see `Checkpoints.stamp`; each checkpoint notes it.
        earlier_seconds: see `Clock.earlier`.
        callbacks: Trainer's, in addition to those of this class.
        others: the arguments of `MicroBatched` and Trainer.
    """

    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        scores: Evaluate,
        keeper: KeepBest | None,
        batches: LengthBatches | None,
        paths: FastPaths,
        recording: Recording | None,
        lora_plus: float | None,
        stamp: str,
        earlier_seconds: float,
        callbacks: Sequence[TrainerCallback],
        **others: Any,
    ) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.scores, self.keeper, self.batches, self.paths, self.stamp = scores, keeper, batches, paths, stamp
        self.replayed: Replayed | None = None
        if recording is not None:
            required = recording.required
            self.replayed = Replayed(self._whole_batch, self.trained, recording.recorder, required=required)
        self.clock, self.pace = Clock(earlier_seconds), Pace(model.device)
        self.diverging = StopWhereDiverged(self._get_loss_scale)
        self.lora_plus, self.penalty = lora_plus, make_penalty(model)
        self.pruning = PruneRanks(model) if is_adaptive(model) else None
        own = [self.diverging, self.pace, *filter(None, (keeper, self.pruning))]
        with present_as_adapted(model):
            super().__init__(model=model, notes=self._notes, callbacks=[*own, *callbacks], **others)
        self.remove_callback(PrinterCallback)

    @property
    def paths_taken(self) -> list[str]:
        """Return the keys of the fast paths that the training takes."""
        replays = self.replayed is not None and self.replayed.recorder is not None
        return [*self.paths.taken, *(["graphs"] if replays else [])]

    @property
    def replay_failure(self) -> str | None:
        """Return why steps were no longer recorded as CUDA graphs; None: they were, or it was not asked for."""
        return None if self.replayed is None else self.replayed.failure

    @property
    def replay_bytes(self) -> int:
        """Return the GPU memory of a replayed step: what is allocated between steps and what its graphs hold.

        It is 0 without graphs.
        """
        recorder = None if self.replayed is None else self.replayed.recorder
        if recorder is None or recorder.memory == 0:
            return 0
        allocated: int = torch.cuda.memory_allocated(self.args.device)
        return allocated + recorder.memory

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.start()
        return super().train(*args, **kwargs)

    def restore_best(self) -> None:
        """Restore the best state, after the training; the last state is a candidate too.

        Without a keeper, and after a divergence, the model stays as it is.
        """
        if self.keeper is None or self.diverging.found is not None:
            return
        if self.keeper.step < self.state.global_step:
            self.evaluate()
        self.keeper.restore(self.model)

    def _get_loss_scale(self) -> float:
        """Return the scale by which fp16's gradients stay within range. Waits for the GPU."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _notes(self) -> dict[str, Any]:
        """Return what a checkpoint stores in addition to the tensors."""
        best = None if self.keeper is None else self.keeper.notes
        return {"stamp": self.stamp, "seconds": self.clock.seconds, "best": best}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.team.leads:
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        parts: tuple[KeepBest | PruneRanks | None, ...] = (self.keeper, self.pruning)
        for part in parts:
            if part is not None and output_dir is not None:
                part.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.pruning is not None:
            self.pruning.load(Path(resume_from_checkpoint))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.lora_plus is not None:
            raise_up_rate(optimizer, self.model, self.lora_plus)
        return optimizer

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
        with self.paths.active():
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def _add_gradients(self, model: PreTrainedModel, batch: Any, items: Any) -> Tensor:
        if self.replayed is None:
            return super()._add_gradients(model, batch, items)
        lists = (CHECK, ROW, OF)
        inputs = {name: column for name, column in self._prepare_inputs(batch).items() if name not in lists}
        if self.paths.padding_free is not None:
            inputs = self.paths.padding_free.rows(inputs)
        if items is not None:
            inputs = {**inputs, ITEMS: torch.as_tensor(items, device=self.args.device)}
        return self.replayed(inputs)

    def _whole_batch(self, inputs: dict[str, Any]) -> Tensor:
        """Add a batch's gradients and return its loss. This is the function that is recorded."""
        return super()._add_gradients(self.model, inputs, inputs.pop(ITEMS, None))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = self.paths.inputs(inputs)
        token_loss = self.paths.token_loss
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if POSITIONS[0] in inputs:
            loss = compute_answer_loss(model, inputs)
        elif token_loss is None or inputs["labels"].dim() < 2:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        else:
            loss = token_loss(inputs, num_items_in_batch)
        return loss if self.penalty is None else loss + self.penalty()

    def _clip_grad_norm(self, model: PreTrainedModel) -> Any:
        """Clip the gradients of `trained`: to search all tensors of a backbone takes milliseconds at every step."""
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: Trainer's estimate walks through all modules at every step. The record has that of `arithmetic`."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not self.diverging.may_look(self.model, self.state, self.control):
            return {}
        if self.replayed is not None and _is_crowded(self.args.device):
            self.replayed.release()  # nothing but graphs can use their memory
        metrics = {f"eval_{name}": value for name, value in self.scores().items()}  # the same in all processes
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()  # runs that share the GPU may need the memory that a generation took
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _is_crowded(device: torch.device) -> bool:
    """Return whether less than half of a GPU's memory is free."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < total / 2
