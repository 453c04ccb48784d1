"""How a batch is shared among the processes of a run: each takes as many examples, with about as many tokens.

All processes collate the whole batch, because its padding, its number of items and the random numbers that are drawn
for it belong to the whole, and keep their own rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from peftbench.tasks.batch import NO_TOKEN, Collator, get_labels
from peftbench.utils.team import Team

# Columns that are added to a process's rows, one value for each row.
WHOLE = "whole_items"  # the items of the whole batch
COUNTED = "counted"  # false for a row that is there only because a process needs one
CHECK = "whole_check"  # a checksum of the whole batch, by which the processes know that they have the same; a list
ROW, OF = "whole_row", "whole_rows"  # which row of the whole batch it is, and how many that has; lists
ADDED = (WHOLE, COUNTED, CHECK, ROW, OF)


def balance_rows(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the rows of each process, in ascending order.

    Each gets at most its share of the number of rows, rounded up. The longest are dealt first, each to the process that
    has the fewest tokens so far and still has room.
    """
    rows: list[list[int]] = [[] for _ in range(size)]
    tokens, room = [0] * size, -(-len(lengths) // size)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        taker = min((rank for rank in range(size) if len(rows[rank]) < room), key=tokens.__getitem__)
        rows[taker].append(row)
        tokens[taker] += lengths[row]
    return [sorted(each) for each in rows]


def share_batches(collator: Collator, team: Team, *, next_token: bool) -> Collator:
    """Return the collator that keeps this process's rows of a batch, and adds the columns above.

    Without an example left for a process, it takes the first one, whose loss then counts nothing.

    Args:
        next_token: see `count_items`.
    """
    if team.size == 1:
        return collator

    def collate(examples: list[dict[str, Any]]) -> Mapping[str, Any]:
        batch = dict(collator(examples))
        own = balance_rows([_count_tokens(example) for example in examples], team.size)[team.rank]
        rows, counts = own or [0], bool(own)
        kept = {name: _take_rows(column, rows) for name, column in batch.items() if column is not None}
        labels = get_labels(batch)
        if not counts and labels.dim() > 1:
            kept["labels"] = torch.full_like(kept["labels"], NO_TOKEN)
        kept[WHOLE] = count_items(labels, next_token).expand(len(rows)).clone()
        kept[COUNTED] = torch.full((len(rows),), counts)
        kept[CHECK] = [crc32(batch["input_ids"].numpy().tobytes())] * len(rows)
        kept[ROW], kept[OF] = rows, [len(examples)] * len(rows)
        return kept

    return collate


def count_items(labels: Tensor, next_token: bool) -> Tensor:
    """Return the number of items of a batch: tokens with a label, or examples with one label each.

    Args:
        next_token: see `predicts_next`; nothing predicts the label of the first token.
    """
    if labels.dim() == 1:
        return torch.full((), len(labels), device=labels.device)
    return (labels[:, 1:] if next_token else labels).ne(NO_TOKEN).sum()


def _count_tokens(example: Mapping[str, Any]) -> int:
    labels = example.get("labels")
    return len(example["input_ids"]) + (len(labels) if isinstance(labels, list) else 0)


def _take_rows(column: Any, rows: Sequence[int]) -> Any:
    return column[list(rows)] if isinstance(column, Tensor) else [column[row] for row in rows]
