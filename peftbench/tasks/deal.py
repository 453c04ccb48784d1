"""Makes splits out of one file of rows, if the user has no files for them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence

from datasets import Dataset

from peftbench.utils.errors import UserError

SHARE = 10  # each dealt split gets one in this many texts
ROW = "row of the file"  # the column that `number_rows` adds


def number_rows(rows: Dataset) -> Dataset:
    """Add a column with each row's index in its file, from 0, which stays right after rows are selected."""
    return rows if ROW in rows.column_names else rows.add_column(ROW, range(len(rows)))


def deal_rows(
    rows: Dataset, columns: Sequence[str], train: str, others: Sequence[str], source: str
) -> dict[str, Dataset]:
    """Deal `rows` to the split `train` and to `others`, each of which gets a tenth of the different inputs.

    An input is the content of `columns`. Equal inputs go to the same split, so that no input is both trained on and
    scored. Inputs are dealt in the order of the sha256 of their content: neither the order of the rows nor a seed
    matters. Raises UserError if there are too few inputs for every split to get one.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for index, cells in enumerate(zip(*(rows[column][:] for column in columns), strict=True)):
        places[hashlib.sha256(json.dumps(cells).encode()).hexdigest()].append(index)
    if len(places) <= len(others):
        raise UserError(
            f"{source} has {len(places)} different inputs, too few for the splits {', '.join([train, *others])}; add "
            "rows, or give each split a file of its own: task.train_file, task.validation_file, task.test_file."
        )
    share = max(1, len(places) // SHARE)
    groups = [places[key] for key in sorted(places)]
    rows = number_rows(rows)
    dealt: dict[str, Dataset] = {}
    for number, split in enumerate(others):
        dealt[split] = _take_groups(rows, groups[number * share : (number + 1) * share])
    dealt[train] = _take_groups(rows, groups[len(others) * share :])
    return dealt


def _take_groups(rows: Dataset, groups: Sequence[Sequence[int]]) -> Dataset:
    return rows.select(sorted(index for group in groups for index in group))
