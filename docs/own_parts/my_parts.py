"""Parts of one's own: a functional form, a metric, a task and a callback. README.md in this folder uses them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peftbench.config.schema import Task
from peftbench.tasks.classification import Classification


class Swish2(nn.Module):
    """Δh = f(x W_down) W_up with f(z) = z σ(βz), where β is trained for each unit of the bottleneck."""

    def __init__(
        self, in_width: int, bottleneck: int, out_width: int, bias: bool = False, init: str = "lora", beta: float = 1.0
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_width, bottleneck, bias)
        self.up = nn.Linear(bottleneck, out_width, bias)
        self.beta = nn.Parameter(torch.full((bottleneck,), beta))
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.normal_(self.up.weight, std=0.02 if init == "bert" else 0.0)  # lora: a run begins as the backbone

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        delta: Tensor = self.up(z * torch.sigmoid(self.beta * z))
        return delta


class WithinOne(evaluate.Metric):
    """100 x the share of predicted labels whose length in letters is within one of the right label's."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        near = [abs(len(ours) - len(right)) <= 1 for ours, right in zip(predictions, references, strict=True)]
        return {"within_one": 100 * sum(near) / len(near)}


class Colours(Classification):
    """Which colour does a text name most often? The rows are made here; a task with files leaves read_rows out."""

    @staticmethod
    def read_rows(task: Task, split: str) -> list[dict[str, str]]:
        return list(_make_rows(split, task.labels, task.settings["words"]))


def _make_rows(split: str, colours: list[str], words: int) -> Iterator[dict[str, str]]:
    draw = random.Random(split)  # so that every process makes the same rows
    for _ in range(400):
        named = draw.choices(colours, k=words)
        most = max(colours, key=named.count)
        if sum(named.count(colour) == named.count(most) for colour in colours) == 1:
            yield {"text": " ".join(named), "label": most}


class StopAtLoss(TrainerCallback):
    """End the training once the loss of a logged step is below a limit."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **others: Any) -> None:
        if logs.get("loss", self.loss) < self.loss:
            control.should_training_stop = True
