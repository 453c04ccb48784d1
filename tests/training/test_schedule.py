"""The learning rate of each optimiser step, by the formula of its schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from peftbench.config.schema import Schedule
from tests.fitting import Targets, fitted, model_of, one_step

STEPS = 10
BEHIND = {  # the warm-up, of the share of the steps behind it that are done
    Schedule.linear: lambda done: 1 - done,
    Schedule.cosine: lambda done: (1 + math.cos(math.pi * done)) / 2,
    Schedule.constant: lambda done: 1.0,
}


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *args: object, optimizer: Any, **kwargs: object) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("warmup", [0.0, 0.3])
@pytest.mark.parametrize("schedule", Schedule)
def test_rates(schedule: Schedule, warmup: float, tmp_path: Path) -> None:
    rates, first = Rates(), round(warmup * STEPS)
    settings = one_step(learning_rate=0.5, max_steps=STEPS, schedule=schedule, warmup=warmup)
    fitted(model_of("roberta", "lora"), Targets("roberta"), settings, tmp_path, callbacks=[rates])
    of = BEHIND[schedule]
    expected = [step / first if step < first else of((step - first) / (STEPS - first)) for step in range(STEPS)]
    assert rates.seen == pytest.approx([0.5 * rate for rate in expected])
