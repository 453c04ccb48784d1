"""Batches by tokens: every example once an epoch, none too large, like lengths together, a new order each epoch."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset

from peftbench.config.schema import Batching
from peftbench.modification.attach import attach
from peftbench.tasks.completion import PromptCollator
from peftbench.training.batching import TokenBatches
from tests.families import PRESETS, build
from tests.fitting import Rows, fitted, one_step

LENGTHS = random.Random(0).choices(range(3, 60), k=500)


def batches(sampler: TokenBatches, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_example_once_and_no_batch_too_large(epoch: int) -> None:
    sampler = TokenBatches(LENGTHS, 256, seed=3)
    found = batches(sampler, epoch)
    assert sorted(index for batch in found for index in batch) == list(range(len(LENGTHS)))
    assert all(len(batch) * max(LENGTHS[index] for index in batch) <= 256 for batch in found)
    assert len(found) == len(sampler)


def test_padding_is_a_small_share() -> None:
    found = batches(TokenBatches(LENGTHS, 256, seed=3), 0)
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in found)
    assert sum(LENGTHS) / padded > 0.9
    ascending = sorted(_ranges(found))
    assert all(before[1] <= after[0] for before, after in pairwise(ascending))  # no batch reaches into the next


def _ranges(found: list[list[int]]) -> list[tuple[int, int]]:
    return [(min(LENGTHS[i] for i in batch), max(LENGTHS[i] for i in batch)) for batch in found]


def test_each_epoch_has_its_own_batches_in_its_own_order() -> None:
    sampler = TokenBatches(LENGTHS, 256, seed=3)
    first, second = batches(sampler, 0), batches(sampler, 1)
    assert first == batches(TokenBatches(LENGTHS, 256, seed=3), 0)
    assert first != batches(TokenBatches(LENGTHS, 256, seed=4), 0)
    assert _ranges(first) != _ranges(second)  # another order
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}  # other neighbours


def test_an_example_that_is_too_long_stands_alone() -> None:
    found = batches(TokenBatches([5, 300, 5, 400], 256, seed=0), 0)
    assert sorted(map(sorted, found)) == [[0, 2], [1], [3]]


@pytest.mark.parametrize(("count", "width"), [(64, 64), (40, 35)])
def test_no_batch_is_padded_beyond_the_backbones_positions(count: int, width: int, tmp_path: Path) -> None:
    data = Rows({}, [35, 20])
    data.train = Dataset.from_dict({"input_ids": [[7] * 30, [8] * 15], "labels": [[9] * 5] * 2})
    data.collator = PromptCollator(1)  # type: ignore[method-assign]  # a method of the stand-in for a task
    model, widths = build("gpt2", n_positions=count), []
    attach(model, PRESETS["lora"])
    model.transformer.h[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    fitted(model, data, one_step(batching=Batching.bucketed), tmp_path)
    assert widths == [width]
