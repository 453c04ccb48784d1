"""A training that a search gives up at a look stops there, with a checkpoint from which it could go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftbench.config.schema import LOSS, Device, Keep, Trainer
from peftbench.modification.attach import attach
from peftbench.training.checkpoint import Checkpoints
from peftbench.training.fit import Criterion, Recipe, Resuming, fit_model
from peftbench.training.looks import Judge, Pruned
from tests.families import PRESETS, build
from tests.training.test_checkpoint import Noted


def train(folder: Path, judge: Judge) -> None:
    settings = Trainer(learning_rate=1e-2, batch_size=4, max_steps=6, evaluate_every=2, keep=Keep.best)
    settings.device = Device.cpu
    model = build("roberta")
    torch.manual_seed(5)
    attach(model, PRESETS["mam"])
    values = iter((0.5, 0.25, float("nan"), 0.1))
    criterion = Criterion(lambda: {LOSS: next(values)}, LOSS, judge)
    resuming = Resuming(Checkpoints(folder, minutes=60, stamp=""), None)
    fit_model(model, Noted(), Recipe(settings, seed=1, autocast_dtype=None), criterion, resuming)  # type: ignore[arg-type]  # Noted has what fit reads


def test_a_judge_is_asked_at_each_look_and_may_give_the_training_up(tmp_path: Path) -> None:
    """Of a loss it is given the negative, so that higher is better; at the last step there is nothing to save."""
    seen: list[tuple[int, float]] = []

    def judge(step: int, value: float) -> bool:
        seen.append((step, value))
        return step == 4

    with pytest.raises(Pruned):
        train(tmp_path / "pruned", judge)
    assert seen == [(2, -0.5), (4, -0.25)]
    checkpoint = Checkpoints(tmp_path / "pruned", minutes=60, stamp="").take_up()
    assert checkpoint is not None and checkpoint.step == 4

    seen.clear()
    train(tmp_path / "kept", lambda step, value: bool(seen.append((step, value))))  # type: ignore[func-returns-value]
    assert seen == [(2, -0.5), (4, -0.25)]
