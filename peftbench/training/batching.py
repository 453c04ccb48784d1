"""Training batches: their number, and batches of examples of similar length, by examples or by tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from peftbench.config import schema
from peftbench.tasks.base import TaskData
from peftbench.tasks.batch import Collator
from peftbench.tasks.completion import LEARNED


class LengthBatches(Sampler[list[int]]):
    """Batches of `batch_size` examples of similar length; the batch of the longest examples may be smaller.

    In every epoch, examples of equal length are shuffled, neighbours in length are put together, and the batches come
    in a new random order, which is determined by `seed` and the epoch.

    Args:
        lengths: for each example, the longer of source and target in tokens.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(list(lengths))
        self.seed = seed
        self.epoch = 0
        # The sorted lengths are the same in every epoch, so the cuts between batches are too.
        self.cuts = self._cuts(self.lengths.sort().values.tolist(), batch_size)

    @staticmethod
    def _cuts(lengths: Sequence[int], size: int) -> list[int]:
        """Return the number of examples in each batch, for lengths in ascending order."""
        return [min(size, len(lengths) - start) for start in range(0, len(lengths), size)]

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch whose batches `__iter__` yields; the data loader calls this."""
        self.epoch = epoch

    @property
    def sampler(self) -> LengthBatches:
        """Return this object: accelerate looks here for `set_epoch` when it skips the batches before a checkpoint.

        Newer versions of transformers call it too. Without either, a resumed training would continue with the batches
        of the first epoch.
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
    """Batches with a maximum number of tokens, padding included: number of examples x length of the longest.

    The paper's code, like fairseq, makes the batches once and uses them in one order, the longest first. Here their
    order is that of `LengthBatches`. An example that is longer than the maximum is a batch by itself.
    """

    @staticmethod
    def _cuts(lengths: Sequence[int], size: int) -> list[int]:
        cuts = [0]
        for length in lengths:
            if cuts[-1] and (cuts[-1] + 1) * length > size:
                cuts.append(0)
            cuts[-1] += 1
        return cuts


def pad_to_multiple(collator: Collator, multiple: int) -> Collator:
    """Return the collator with widths that are multiples of `multiple`, if it has transformers' option for it."""
    if not hasattr(collator, "pad_to_multiple_of"):
        return collator
    wider = copy(collator)
    wider.pad_to_multiple_of = multiple
    return wider


class Lengths(NamedTuple):
    """The numbers of tokens of the training examples, without padding."""

    sources: list[int]  # for each example's input; if `joined`, with its target
    targets: list[int]  # for each example's target, or what of it is learned, if that is text; else empty
    joined: bool  # a decoder alone reads source and target as one text

    @classmethod
    def of(cls, data: TaskData, *, encoder_decoder: bool) -> Lengths:
        """Return the lengths of a task's training examples for a model that is an encoder-decoder, or is not."""
        texts = len(data.train) > 0 and isinstance(data.train[0].get("labels"), list)
        if LEARNED in data.train.column_names:
            targets = [sum(learned) for learned in data.train[LEARNED]]
        else:
            targets = [len(ids) for ids in data.train["labels"]] if texts else []
        joined = texts and not encoder_decoder
        return cls(list(data.lengths) if joined else [len(ids) for ids in data.train["input_ids"]], targets, joined)

    @property
    def longest(self) -> tuple[int, int]:
        """Return the maximum of the sources and of the targets; 0 if there are none."""
        return max(self.sources), max(self.targets, default=0)

    @property
    def mean(self) -> float:
        """Return the mean number of tokens that a model reads of an example."""
        read = sum(self.sources) + (0 if self.joined else sum(self.targets))
        return read / max(1, len(self.sources))


def make_batches(data: TaskData, settings: schema.Trainer, seed: int) -> LengthBatches | None:
    """Return batches of similar length if the settings ask for them; None: random batches of `batch_size`."""
    if settings.batch_tokens is not None:
        return TokenBatches(data.lengths, settings.batch_tokens, seed)
    if settings.batching is schema.Batching.bucketed:
        return LengthBatches(data.lengths, settings.batch_size, seed)
    return None


def count_steps(data: TaskData, settings: schema.Trainer) -> int:
    """Return the number of optimiser steps: `max_steps`, or `epochs` passes over the training examples."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, round(settings.epochs * count_steps_per_epoch(data, settings)))


def count_steps_per_epoch(data: TaskData, settings: schema.Trainer) -> int:
    """Return the optimiser steps in one pass; the last step of a pass may see fewer examples."""
    return -(-count_batches_per_epoch(data, settings) // settings.accumulation)


def count_batches_per_epoch(data: TaskData, settings: schema.Trainer) -> int:
    """Return the batches in one pass over the training examples."""
    batches = make_batches(data, settings, seed=0)
    return -(-len(data.train) // settings.batch_size) if batches is None else len(batches)
