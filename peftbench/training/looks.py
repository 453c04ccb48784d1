"""Give a training up by its looks: a search may prune a trial that is worse than others were at the same step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from peftbench.config.schema import LOSS

# From the optimiser steps done and the value of a look, better when higher, to whether the training is given up.
Judge = Callable[[int, float], bool]


class Pruned(KeyboardInterrupt):
    """The search has given the run up. It is recorded as interrupted, and has a checkpoint."""


class _Judged:
    """The judge of the training that this process is at."""

    judge: Judge | None = None


@contextmanager
def judge_looks(judge: Judge) -> Iterator[None]:
    """Have the looks of the run that is trained in the block judged."""
    _Judged.judge = judge
    try:
        yield
    finally:
        _Judged.judge = None


def find_judge() -> Judge | None:
    """Return the judge of the run that is trained now."""
    return _Judged.judge


class PruneByLooks(TrainerCallback):
    """Asks `judge` at each look, and ends the training with a checkpoint if that gives it up."""

    def __init__(self, judge: Judge, metric: str) -> None:
        self.judge, self.metric = judge, metric
        self.pruned = False

    def on_evaluate(
        self, args: object, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        value = metrics[f"eval_{self.metric}"] * (-1 if self.metric == LOSS else 1)
        if math.isfinite(value) and state.global_step < state.max_steps and self.judge(state.global_step, value):
            self.pruned = True
            control.should_save = control.should_training_stop = True

    def stop_if_pruned(self) -> None:
        """Raise `Pruned` if the training was given up."""
        if self.pruned:
            raise Pruned
