"""A training that goes on from a checkpoint sees the batches that it would have seen, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from peftbench.config.schema import LOSS, Device, Keep, Trainer
from peftbench.modification.attach import attach
from peftbench.training.batching import count_batches_per_epoch
from peftbench.training.checkpoint import Checkpoints, SaveByTime
from tests.families import PRESETS, batch, build
from tests.fitting import Rows, fitted, trained


class Killed(Exception):
    pass


class Noted(Rows):
    """A few rows of ids, with a note of each batch; `lengths` say how many of the ids count."""

    def __init__(self) -> None:
        super().__init__(batch("roberta", (9,) * 12), [3 + i % 6 for i in range(12)])
        self.seen: list[int] = []

    def collator(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.seen.append(sum(sum(example["input_ids"]) for example in examples))
        return super().collator(examples)


def gone_on(folder: Path, settings: Trainer, data: Noted, resume: bool) -> dict[str, Tensor]:
    """The trained tensors after a training, in which a state is the better the smaller the first of them is."""
    model = build("roberta", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    torch.manual_seed(5)
    attach(model, PRESETS["mam"])
    torch.manual_seed(3)
    checkpoints = Checkpoints(folder, minutes=0, stamp="")
    taken = checkpoints.take_up() if resume else None
    assert not resume or (taken is not None and taken.step == 8)
    weight = next(p for p in model.parameters() if p.requires_grad)

    def evaluate() -> dict[str, float]:
        return {LOSS: float(weight.detach().abs().sum())}

    fitted(model, data, settings, folder, checkpoints=checkpoints, evaluate=evaluate, resume=taken)
    return trained(model)


@pytest.mark.parametrize(
    ("keep", "batch_tokens"),
    [
        (Keep.best, 20),
        pytest.param(Keep.best, None, marks=pytest.mark.slow),
        pytest.param(Keep.last, 20, marks=pytest.mark.slow),
        pytest.param(Keep.last, None, marks=pytest.mark.slow),
    ],
)
def test_the_batches_go_on(
    batch_tokens: int | None, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 8, in the second epoch of batches by tokens or the third of batches of 4."""
    settings = Trainer(learning_rate=1e-2, batch_size=4, max_steps=11, evaluate_every=2, keep=keep)
    settings.device, settings.batch_tokens = Device.cpu, batch_tokens
    whole, parts = Noted(), Noted()
    assert 1 < 8 / count_batches_per_epoch(whole, settings) < 11 / count_batches_per_epoch(whole, settings)  # type: ignore[arg-type]  # Noted is all they read
    expected = gone_on(tmp_path / "whole", settings, whole, resume=False)

    def killed(self: TrainerCallback, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == 8:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SaveByTime, "on_save", killed)
        gone_on(tmp_path / "parts", settings, parts, resume=False)
    parts.seen.clear()
    found = gone_on(tmp_path / "parts", settings, parts, resume=True)
    assert parts.seen[-3:] == whole.seen[-3:]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
