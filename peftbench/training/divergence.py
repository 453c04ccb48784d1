"""A training that has left the finite numbers is stopped: no step after that can bring it back.

The loss and the gradient norm are looked at where Trainer logs them, for which it waits for the GPU anyway, and the
weights before each look at the selection split and at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from peftbench.modification.state import trained_tensors
from peftbench.records.record import Divergence

LOGGED = {"loss": "loss", "grad_norm": "gradient norm"}  # Trainer's words, and ours


def are_finite(model: PreTrainedModel) -> bool:
    """Whether all that is trained of the model is finite. Waits for the GPU once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in trained_tensors(model).values()]).all())


class StopWhereDiverged(TrainerCallback):
    """Ends a training at the first logged step, or the first look, at which something is not finite."""

    def __init__(self) -> None:
        self.found: Divergence | None = None

    def on_log(
        self, args: object, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        for key, what in LOGGED.items():
            if not math.isfinite(float(logs.get(key, 0.0))):
                return self._stop(what, state, control)

    def may_look(self, model: PreTrainedModel, state: TrainerState, control: TrainerControl) -> bool:
        """Whether the model is worth a score: its weights are finite."""
        if self.found is None and not are_finite(model):
            self._stop("weights", state, control)
        return self.found is None

    def _stop(self, what: str, state: TrainerState, control: TrainerControl) -> None:
        self.found = self.found or Divergence(what, state.global_step)
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False
