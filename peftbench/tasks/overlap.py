"""Rows that are scored although they were trained on: the inputs that two splits share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from datasets import Dataset

NOTED = 0.01  # a smaller share is left unsaid: short texts may be equal by chance


def describe_overlap(columns: Sequence[str], train: Dataset, others: Mapping[str, Dataset]) -> Iterator[str]:
    """Yield a sentence for each of the other splits whose inputs are in the training split too.

    Args:
        columns: those of the input.
        others: the rows of the splits, by name.
    """
    known = set(_hash_inputs(columns, train)) if others else set()
    for split, rows in others.items():
        seen = sum(value in known for value in _hash_inputs(columns, rows))
        if seen > NOTED * len(rows):
            yield f"{seen:,} of the {len(rows):,} inputs of {split} ({seen / len(rows):.0%}) are also trained on."


def _hash_inputs(columns: Sequence[str], rows: Dataset) -> Iterator[int]:
    for batch in rows.select_columns(list(columns)).iter(batch_size=1000):
        for cells in zip(*(batch[column] for column in columns), strict=True):
            yield hash(tuple(tuple(cell) if isinstance(cell, list) else cell for cell in cells))
