"""Inputs that are longer than a backbone reads: they are read in windows, which overlap, so that nothing is cut off."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.tasks.base import TaskData
from peftbench.tasks.load import Loaded
from peftbench.tasks.rows import take_head
from peftbench.utils.errors import UserError

FIRST = "first"  # a column of the examples: whether it is the first window of its row


class Windowed(TaskData):
    """A task whose rows are read in one window or several. Each window is an example to the model; scores are those of
    rows."""

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"task={loaded.task.name} needs to know which characters each token stands for, and the tokenizer of "
                f"{tokenizer.name_or_path or 'the backbone'}, a {type(tokenizer).__name__}, does not tell; take a "
                "backbone with a tokenizer.json."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
        super().__init__(loaded, tokenizer, model)
        self.notes.extend(self._describe_windows())

    @abstractmethod
    def decode(self, predictions: np.ndarray, role: str = "report") -> list[str]:
        """Return what the model predicted for each row of a role, from what `read_outputs` kept of its windows."""

    def settings(self) -> list[Any]:
        """Return the settings on which `encode` depends."""
        return [*super().settings(), self.task.stride]

    def take_examples(self, encoded: Dataset, rows: int | None) -> Dataset:
        """Return the windows of the first `rows` rows; None: all."""
        if rows is None:
            return encoded
        begins = np.flatnonzero(encoded[FIRST][:])
        return encoded if len(begins) <= rows else take_head(encoded, int(begins[rows]))

    def number_examples(self, role: str) -> list[int]:
        """Return for each window of a role the index of its row."""
        first: np.ndarray = np.array(getattr(self, role)[FIRST][:], dtype=int)
        numbers: list[int] = (first.cumsum() - 1).tolist()
        return numbers

    def _describe_windows(self) -> Iterator[str]:
        told = {}
        for role, split in self.splits.items():
            examples = getattr(self, role)
            rows = sum(examples[FIRST][:])
            if len(examples) > rows:
                told[split["split"]] = f"{len(examples):,} windows for the {rows:,} rows of {split['split']}"
        if told:
            yield (
                f"Inputs of more than {self.limits()['sources']} tokens are read in windows, which share up to "
                f"task.stride={self.task.stride} tokens: {', '.join(told.values())}."
            )


def cut_windows(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Return the first token of each window and the one after its last, for a text of `length` tokens.

    Args:
        room: tokens in a window.
        stride: tokens that two neighbours share; at most half of the room.
    """
    step = max(1, room - min(stride, room // 2))
    starts = [0]
    while starts[-1] + room < length:
        starts.append(starts[-1] + step)
    return [(start, min(start + room, length)) for start in starts]


def choose_windows(windows: Iterable[tuple[int, int]], tokens: Iterable[int]) -> list[int]:
    """Return for each token the window in which it has the most context: the largest distance to the nearer end."""
    spans = list(windows)
    return [
        max(range(len(spans)), key=lambda index: min(token - spans[index][0], spans[index][1] - 1 - token))
        for token in tokens
    ]
