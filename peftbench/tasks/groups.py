"""The groups of a task's examples, such as the domains of its texts: `task.group_column`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from peftbench.config.schema import Task


def list_groups(task: Task, rows: Dataset) -> list[str] | None:
    """Return the group of each row, as text; None if the task names no column of groups, or the rows lack it."""
    if task.group_column is None or task.group_column not in rows.column_names:
        return None
    return ["" if cell is None else str(cell) for cell in rows[task.group_column][:]]


def find_groups(task: Task, report: Dataset, train: Dataset | None) -> dict[str, Any] | None:
    """Return `{"column": "category", "seen": ["Airport", ...]}` for the record: those groups of the reported examples
    of which there are training examples, sorted; None instead of them if that is not known. None without groups.

    Args:
        report: the rows that are reported on.
        train: those that are trained on; None: they were not read.
    """
    reported = list_groups(task, report)
    if reported is None:
        return None
    trained = None if train is None else list_groups(task, train)
    return {"column": task.group_column, "seen": None if trained is None else sorted({*reported} & {*trained})}


def describe_no_groups(task: Task, split: str) -> str:
    """Return the note that the reported rows lack the column of groups."""
    return f"{split} has no column {task.group_column} (task.group_column), so no score of a group can be shown."
