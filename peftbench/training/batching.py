"""Training batches: how many there are, and those of like lengths, by examples or by tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from peftbench.config import schema
from peftbench.tasks.base import TaskData

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


class LengthBatches(Sampler[list[int]]):
    """Batches of `batch_size` examples; the longest examples may be fewer.

    In every epoch examples of equal length are shuffled, neighbours in length are put together, and the batches come in
    a new random order, which follows from `seed` and the epoch.

    Args:
        lengths: of each example, the longer of source and target in tokens.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(list(lengths))
        self.seed = seed
        self.epoch = 0
        # The sorted lengths are the same in every epoch, so the cuts between batches are too.
        self.cuts = self._cuts(self.lengths.sort().values.tolist(), batch_size)

    @staticmethod
    def _cuts(lengths: Sequence[int], size: int) -> list[int]:
        """The number of examples in each batch, for lengths in ascending order."""
        return [min(size, len(lengths) - start) for start in range(0, len(lengths), size)]

    def set_epoch(self, epoch: int) -> None:
        """Number the epoch whose batches `__iter__` gives; the data loader does this."""
        self.epoch = epoch

    @property
    def sampler(self) -> LengthBatches:
        """Itself: accelerate looks there for `set_epoch` where it skips the batches before a checkpoint.

        Newer versions of transformers call it besides. Without either a training would go on with the batches of the
        first epoch.
        """
        return self

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        order = shuffled[self.lengths[shuffled].sort(stable=True).indices]
        batches = torch.split(order, self.cuts)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index].tolist()


class TokenBatches(LengthBatches):
    """Batches of at most so many tokens, padding included: examples x the longest of them.

    The paper's code, as fairseq, makes the batches once and gives them in one order, the longest first; here they come
    as those of `LengthBatches`. An example longer than the number of tokens is a batch of its own.
    """

    @staticmethod
    def _cuts(lengths: Sequence[int], size: int) -> list[int]:
        cuts = [0]
        for length in lengths:
            if cuts[-1] and (cuts[-1] + 1) * length > size:
                cuts.append(0)
            cuts[-1] += 1
        return cuts


def padded_to(collator: Collator, multiple: int) -> Collator:
    """The collator with widths that are multiples of `multiple`, for one that knows transformers' option for it."""
    if not hasattr(collator, "pad_to_multiple_of"):
        return collator
    wider = copy(collator)
    wider.pad_to_multiple_of = multiple
    return wider


class Lengths(NamedTuple):
    """Tokens of each training example, without padding."""

    sources: list[int]  # of its input
    targets: list[int]  # of its target, where that is text; else empty

    @classmethod
    def of(cls, data: TaskData) -> Lengths:
        """Those of a task's training examples."""
        texts = len(data.train) > 0 and isinstance(data.train[0]["labels"], list)
        sources = [len(ids) for ids in data.train["input_ids"]]
        return cls(sources, [len(ids) for ids in data.train["labels"]] if texts else [])

    @property
    def longest(self) -> tuple[int, int]:
        """Of the sources and of the targets; 0 where there are none."""
        return max(self.sources), max(self.targets, default=0)

    @property
    def mean(self) -> float:
        """Of source and target together."""
        return (sum(self.sources) + sum(self.targets)) / max(1, len(self.sources))


def batches_of(data: TaskData, settings: schema.Trainer, seed: int) -> LengthBatches | None:
    """Batches of like lengths where the settings ask for them; None: random ones of `batch_size`."""
    if settings.batch_tokens is not None:
        return TokenBatches(data.lengths, settings.batch_tokens, seed)
    if settings.batching is schema.Batching.bucketed:
        return LengthBatches(data.lengths, settings.batch_size, seed)
    return None


def total_steps(data: TaskData, settings: schema.Trainer) -> int:
    """The number of optimiser steps: `max_steps`, or `epochs` passes over the training examples."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, round(settings.epochs * steps_per_epoch(data, settings)))


def steps_per_epoch(data: TaskData, settings: schema.Trainer) -> int:
    """Optimiser steps in one pass; the last one of a pass may see fewer examples."""
    return -(-batches_per_epoch(data, settings) // settings.accumulation)


def batches_per_epoch(data: TaskData, settings: schema.Trainer) -> int:
    """Batches in one pass over the training examples."""
    batches = batches_of(data, settings, seed=0)
    return -(-len(data.train) // settings.batch_size) if batches is None else len(batches)
