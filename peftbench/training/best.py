"""Keep the state of the best evaluation so far: `trainer.keep=best`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from peftbench.config.schema import LOSS
from peftbench.modification.state import list_needed, load_tensors, write_tensors
from peftbench.training.checkpoint import Checkpoint

BEST = "best.safetensors"  # in a checkpoint: the trained tensors at the best evaluation so far


class KeepBest(TrainerCallback):
    """Keeps a copy, on the CPU, of the trained tensors at the best evaluation so far.

    Args:
        metric: the score that counts; higher is better, except for a loss.
        patience: ends the training after this many evaluations in a row that are no better; None: never.
    """

    def __init__(self, metric: str, patience: int | None = None) -> None:
        self.metric, self.patience = metric, patience
        self.since = 0  # evaluations since the best one
        self.stopped = False
        self.best: float | None = None
        self.step = 0  # of the last evaluation
        self.tensors: dict[str, Tensor] = {}

    def on_evaluate(
        self, args: object, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self.step = state.global_step
        value = metrics[f"eval_{self.metric}"] * (-1 if self.metric == LOSS else 1)
        if math.isfinite(value) and (self.best is None or value > self.best):
            self.best = value
            # A copy with its autograd graph would keep the parameters' nodes of this look's stream: no step of a new
            # shape could be recorded as a CUDA graph any more.
            kept = list_needed(kwargs["model"])
            self.tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in kept.items()}
            self.since = 0
            return
        self.since += 1
        if self.patience is not None and self.since >= self.patience and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True

    @property
    def notes(self) -> dict[str, float | None]:
        """Return what a checkpoint stores in addition to the tensors."""
        return {"value": self.best, "step": self.step, "since": self.since}

    def save(self, folder: Path) -> None:
        """Write the best tensors to a checkpoint's folder."""
        write_tensors(self.tensors, folder / BEST)

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore this object to its state when the checkpoint was written."""
        self.best, self.step = checkpoint.notes["best"]["value"], checkpoint.notes["best"]["step"]
        self.since = checkpoint.notes["best"].get("since", 0)  # checkpoints of earlier versions lack it
        self.tensors = load_tensors(checkpoint.folder / BEST)

    @torch.no_grad()
    def restore(self, model: PreTrainedModel) -> None:
        """Copy the best state into the model."""
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                parameter.copy_(self.tensors[name])
