"""trainer.early_stopping: counted in evaluations on the selection split, and carried on by a resumed training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench.config.schema import LOSS, Keep
from peftbench.modification.attach import attach
from peftbench.training.checkpoint import Checkpoints, SaveByTime
from tests.families import PRESETS, build, dropout
from tests.fitting import Targets, fitted, one_step, trained

LOSSES = [5.0, 3.0, 4.0, 3.0, 2.0, 6.0, float("nan"), 7.0, 1.0]  # of the evaluations, one after each step


def make_model() -> Any:
    model = build("roberta", **dropout("roberta"))
    torch.manual_seed(5)
    attach(model, PRESETS["parallel_adapter"])
    return model.train()


def read_out(values: list[float]) -> Callable[[], dict[str, float]]:
    rest = iter(values)
    return lambda: {LOSS: next(rest)}


@pytest.mark.parametrize(
    ("patience", "steps", "stopped"),
    [(1, 3, True), (2, 4, True), (3, 8, True), (4, 9, False), (None, 9, False)],
)
def test_a_training_ends_after_looks_that_are_no_better(
    patience: int | None, steps: int, stopped: bool, tmp_path: Path
) -> None:
    """An equal value is no better, nor is one that is no number; what is kept is the best state."""
    settings = one_step(max_steps=9, keep=Keep.best, evaluate_every=1, early_stopping=patience, learning_rate=1e-2)
    model, data = make_model(), Targets("roberta")
    done = fitted(model, data, settings, tmp_path, evaluate=read_out(LOSSES), metric=LOSS)
    assert (done.steps, done.stopped_early) == (steps, stopped)
    if not stopped:
        return
    best = 1 + min(range(steps), key=lambda index: (LOSSES[index] != LOSSES[index], LOSSES[index]))
    shorter = make_model()
    fitted(shorter, data, one_step(max_steps=best, learning_rate=1e-2), tmp_path / "shorter")
    for name, tensor in trained(shorter).items():
        torch.testing.assert_close(trained(model)[name], tensor, msg=name)


def test_a_resumed_training_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = one_step(max_steps=9, keep=Keep.best, evaluate_every=1, early_stopping=3)
    checkpoints = Checkpoints(tmp_path, minutes=0, stamp="")

    class Killed(BaseException):
        pass

    def kill(self: object, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == 6:  # one evaluation after the best
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SaveByTime, "on_save", kill)
        fitted(make_model(), Targets("roberta"), settings, tmp_path, evaluate=read_out(LOSSES), checkpoints=checkpoints)
    taken = checkpoints.take_up()
    assert taken is not None and taken.step == 6
    rest = read_out(LOSSES[6:])
    done = fitted(
        make_model(), Targets("roberta"), settings, tmp_path, evaluate=rest, checkpoints=checkpoints, resume=taken
    )
    assert (done.steps, done.stopped_early) == (8, True)
