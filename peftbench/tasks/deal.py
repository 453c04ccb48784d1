"""Makes splits out of one file of rows, if the user has no files for them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from peftbench.utils.errors import UserError
from peftbench.utils.text import format_count, list_first

SHARE = 10  # each dealt split gets one in this many texts
MOST_NAMED = 5  # groups in a note
ROW = "row of the file"  # the column that `number_rows` adds


def number_rows(rows: Dataset) -> Dataset:
    """Add a column with each row's index in its file, from 0, which stays right after rows are selected."""
    return rows if ROW in rows.column_names else rows.add_column(ROW, range(len(rows)))


def deal_rows(
    rows: Dataset, columns: Sequence[str], train: str, others: Sequence[str], source: str, by: str | None = None
) -> dict[str, Dataset]:
    """Deal `rows` to the split `train` and to `others`, each of which gets a tenth of the different inputs.

    An input is the content of `columns`. Equal inputs go to the same split, so that no input is both trained on and
    scored. They are dealt in the order of the sha256 of their content: neither the order of the rows nor a seed
    matters.

    Args:
        source: what the rows are called in an error.
        by: a column of groups, such as domains: whole groups go to one split, as near to a tenth as they fit.

    Raises:
        UserError: there are too few inputs or groups for every split to get one, or there is no such column.
    """
    parts = _gather_inputs(rows, columns)
    what = "inputs"
    if by is not None:
        if by not in rows.column_names:
            known = ", ".join(name for name in rows.column_names if name != ROW)
            raise UserError(f"task.deal_by={by}: {source} has no column {by}; its columns are {known}.")
        parts, what = _join_groups(parts, list(map(str, rows[by][:]))), f"groups by {by}"
    if len(parts) <= len(others):
        raise UserError(
            f"{source} has {len(parts)} different {what}, too few for the splits {', '.join([train, *others])}; add "
            "rows, or give each split a file of its own: task.train_file, task.validation_file, task.test_file."
        )
    share = max(1, sum(len(part) for part in parts) // SHARE)
    rows = number_rows(rows)
    dealt: dict[str, Dataset] = {}
    for split in others:
        taken = _choose_share([len(part) for part in parts], share)
        dealt[split] = _select_parts(rows, [part for place, part in enumerate(parts) if place in taken])
        parts = [part for place, part in enumerate(parts) if place not in taken]
    dealt[train] = _select_parts(rows, parts)
    return dealt


def describe_deal(dealt: Mapping[str, Dataset], others: Sequence[str], source: str, by: str | None) -> str:
    """Return the note on how `deal_rows` has dealt."""
    if by is None:
        each = "each have" if len(others) > 1 else "has"
        dealt_to = f"{' and '.join(others)} {each}"
        return f"{source} is split by a hash of the input: {dealt_to} one in ten of the different inputs."
    said = []
    for split in others:
        groups = sorted(set(map(str, dealt[split][by][:])))
        said.append(f"{split} has {list_first(groups, MOST_NAMED)} ({format_count(len(dealt[split]), 'row')})")
    return f"{source} is split by {by}: {'; '.join(said)}."


# The rows of each of its different inputs: of one input, or of those of a group.
Part = list[list[int]]


def _gather_inputs(rows: Dataset, columns: Sequence[str]) -> list[Part]:
    """Return the rows of each input, in the order in which they are dealt."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, cells in enumerate(zip(*(rows[column][:] for column in columns), strict=True)):
        places[_hash_cells(cells)].append(index)
    return [[places[key]] for key in sorted(places)]


def _join_groups(inputs: Sequence[Part], groups: Sequence[str]) -> list[Part]:
    """Return the inputs of each group, in the order in which they are dealt; groups that share an input are one."""
    order = {group: _hash_cells(group) for group in groups}
    joined = {group: group for group in order}  # with which it is dealt, or with which that one is

    def find(group: str) -> str:
        while joined[group] != group:
            joined[group] = group = joined[joined[group]]
        return group

    for (places,) in inputs:
        first, *others = sorted({find(groups[place]) for place in places}, key=order.__getitem__)
        for other in others:
            joined[other] = first
    parts: dict[str, Part] = defaultdict(list)
    for (places,) in inputs:
        parts[find(groups[places[0]])].append(places)
    return [parts[group] for group in sorted(parts, key=order.__getitem__)]


def _choose_share(sizes: Sequence[int], share: int) -> set[int]:
    """Return the places of the first parts that come to `share` inputs, without those that would exceed it by half; at
    least of the smallest part."""
    taken, number = set[int](), 0
    for place, size in enumerate(sizes):
        if number < share and number + size <= 1.5 * share:
            taken.add(place)
            number += size
    return taken or {min(range(len(sizes)), key=sizes.__getitem__)}


def _select_parts(rows: Dataset, parts: Sequence[Part]) -> Dataset:
    return rows.select(sorted(index for part in parts for places in part for index in places))


def _hash_cells(cells: Any) -> str:
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()
