"""A training that goes on from a checkpoint sees the batches that it would have seen, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from peftbench.checkpoint import Checkpoints, SaveByTime
from peftbench.config import LOSS, Device, Keep, Trainer
from peftbench.fit import batches_per_epoch, fit
from peftbench.modification.attach import attach
from tests.families import PRESETS, batch, build


class Killed(Exception):
    pass


class Data:
    """What `fit` takes of a task: a few rows of ids, padded; `lengths` say how many of them count."""

    def __init__(self) -> None:
        rows = batch("roberta", (9,) * 12)
        self.train = self.selection = Dataset.from_dict({name: tensor.tolist() for name, tensor in rows.items()})
        self.lengths = [3 + i % 6 for i in range(12)]
        self.seen: list[int] = []

    def collator(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.seen.append(sum(sum(example["input_ids"]) for example in examples))
        return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}


def trained(folder: Path, settings: Trainer, data: Data, resume: bool) -> dict[str, Tensor]:
    """The trained tensors after a training, in which a state is the better the smaller the first of them is."""
    model = build("roberta", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    torch.manual_seed(5)
    attach(model, PRESETS["mam"])
    torch.manual_seed(3)
    checkpoints = Checkpoints(folder, minutes=0, stamp="")
    taken = checkpoints.take_up() if resume else None
    assert not resume or (taken is not None and taken.step == 8)
    weight = next(p for p in model.parameters() if p.requires_grad)
    fit(
        model,
        data,  # type: ignore[arg-type]  # what of a TaskData fit reads
        settings,
        seed=1,
        bf16=False,
        checkpoints=checkpoints,
        evaluate=lambda: {LOSS: float(weight.detach().abs().sum())},
        metric=LOSS,
        resume=taken,
    )
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("batch_tokens", [None, 20])
@pytest.mark.parametrize("keep", Keep)
def test_the_batches_go_on(
    batch_tokens: int | None, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 8, in the second epoch of batches by tokens or the third of batches of 4."""
    settings = Trainer(learning_rate=1e-2, batch_size=4, max_steps=11, evaluate_every=2, keep=keep)
    settings.device, settings.batch_tokens = Device.cpu, batch_tokens
    whole, parts = Data(), Data()
    assert 1 < 8 / batches_per_epoch(whole, settings) < 11 / batches_per_epoch(whole, settings)  # type: ignore[arg-type]  # Data is all they read
    expected = trained(tmp_path / "whole", settings, whole, resume=False)

    def killed(self: TrainerCallback, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == 8:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SaveByTime, "on_save", killed)
        trained(tmp_path / "parts", settings, parts, resume=False)
    parts.seen.clear()
    found = trained(tmp_path / "parts", settings, parts, resume=True)
    assert parts.seen[-3:] == whole.seen[-3:]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
