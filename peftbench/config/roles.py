"""The roles that splits of the data have in a run. Imports no torch."""

from __future__ import annotations

from peftbench.config.schema import Task

FURTHER = "report_"  # and the split: the role of one that is reported on beside the report split
Roles = dict[str, tuple[str, int | None]]  # the split of each role, and how many rows at most; null: all


def roles(task: Task) -> Roles:
    """The roles that data has in a run: to train on, to select a state, to report on, and to report on further."""
    return {
        "train": (task.train_split, task.max_train),
        "selection": (task.selection_split, task.max_selection),
        "report": (task.report_split, task.max_eval),
        **{f"{FURTHER}{other}": (other, task.max_eval) for other in task.further_splits if other != task.report_split},
    }


def is_reported(role: str) -> bool:
    """Whether the role is that of the report split or of a further one."""
    return role == "report" or role.startswith(FURTHER)


def splits(task: Task) -> list[str]:
    """The splits that the task reads, each named once."""
    return list(limits_of(roles(task)))


def limits_of(wanted: Roles) -> dict[str, int | None]:
    """How many rows of each split its roles need; null: all of them."""
    found: dict[str, int | None] = {}
    for split, limit in wanted.values():
        before = found.get(split, 0)
        found[split] = None if limit is None or before is None else max(before, limit)
    return found
