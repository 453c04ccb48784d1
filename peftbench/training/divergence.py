"""Stop a training whose numbers are no longer finite, because no later step can make them finite again.

The loss and the gradient norm are checked when Trainer logs them, which waits for the GPU anyway. The weights are
checked before each evaluation on the selection split and at the end.

Loss scaling (`trainer.precision=fp16`) finds its scale by trial: a step whose gradient overflows is skipped, and the
scale is halved. Such a gradient norm means something only if it does not become finite at a small scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from peftbench.modification.state import list_trained
from peftbench.records.record import Divergence

SMALL = 1.0  # loss scale at which a gradient that overflows in float16 is no fault of the scale, which starts at 2^16
LOGGED = {"loss": "loss", "grad_norm": "gradient norm"}  # Trainer's names, and those of the messages


def are_finite(model: PreTrainedModel) -> bool:
    """Return whether all trained tensors of the model are finite. Waits for the GPU once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in list_trained(model).values()]).all())


class StopWhereDiverged(TrainerCallback):
    """Ends a training at the first logged step, or the first evaluation, at which something is not finite.

    Args:
        loss_scale: returns the number by which the loss is multiplied; 1 without loss scaling.
    """

    def __init__(self, loss_scale: Callable[[], float] = lambda: 1.0) -> None:
        self.found: Divergence | None = None
        self.loss_scale = loss_scale

    def on_log(
        self, args: object, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        for key, what in LOGGED.items():
            finite = math.isfinite(float(logs.get(key, 0.0)))
            if not finite and not (key == "grad_norm" and self.loss_scale() > SMALL):
                return self._stop(what, state, control)

    def may_look(self, model: PreTrainedModel, state: TrainerState, control: TrainerControl) -> bool:
        """Return whether to evaluate the model; end the training if its weights are not finite."""
        if self.found is None and not are_finite(model):
            self._stop("weights", state, control)
        return self.found is None

    def _stop(self, what: str, state: TrainerState, control: TrainerControl) -> None:
        self.found = self.found or Divergence(what, state.global_step)
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False
