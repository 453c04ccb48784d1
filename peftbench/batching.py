"""Training batches of like lengths, as many examples to a batch as fit a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class TokenBatches(Sampler[list[int]]):
    """Batches of at most `max_tokens` tokens, padding included: examples x the longest of them.

    In every epoch examples of equal length are shuffled, neighbours in length are put together, and the batches come in
    a new random order, which follows from `seed` and the epoch. (The paper's code, as fairseq, makes the batches once
    and gives them in one order, the longest first.) An example longer than `max_tokens` is a batch of its own.

    Args:
        lengths: of each example, the longer of source and target in tokens.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int, seed: int) -> None:
        self.lengths = torch.tensor(list(lengths))
        self.seed = seed
        self.epoch = 0
        # The sorted lengths are the same in every epoch, so the cuts between batches are too.
        self.cuts = _cuts(self.lengths.sort().values.tolist(), max_tokens)

    def set_epoch(self, epoch: int) -> None:
        """Number the epoch whose batches `__iter__` gives; the data loader does this."""
        self.epoch = epoch

    @property
    def sampler(self) -> TokenBatches:
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


def _cuts(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """The number of examples in each batch, for lengths in ascending order."""
    cuts = [0]
    for length in lengths:
        if cuts[-1] and (cuts[-1] + 1) * length > max_tokens:
            cuts.append(0)
        cuts[-1] += 1
    return cuts
