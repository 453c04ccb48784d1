"""The roles of the data's splits in a run."""

from __future__ import annotations

from peftbench.config.schema import Task

FURTHER = "report_"  # with the split's name: the role of a further split on which scores are reported
VALIDATION = "validation"  # the split that a file called dev, valid or val has too
HELD_OUT = "held_out"  # a split that is always dealt from the training rows, unless a file is named for it
Roles = dict[str, tuple[str, int | None]]  # the split of each role, and its maximum number of rows; None: all


def assign_roles(task: Task) -> Roles:
    """Return the roles of data in a run: training, selection of a state, report, and further reports."""
    return {
        "train": (task.train_split, task.max_train),
        "selection": (task.selection_split, task.max_selection),
        "report": (task.report_split, task.max_eval),
        **{f"{FURTHER}{other}": (other, task.max_eval) for other in task.further_splits if other != task.report_split},
    }


def is_reported(role: str) -> bool:
    """Return whether the role is that of the report split or of a further one."""
    return role == "report" or role.startswith(FURTHER)


def list_splits(task: Task) -> list[str]:
    """Return the splits that the task reads, each once."""
    return list(limit_splits(assign_roles(task)))


def limit_splits(wanted: Roles) -> dict[str, int | None]:
    """Return how many rows of each split its roles need; None: all of them."""
    found: dict[str, int | None] = {}
    for split, limit in wanted.values():
        before = found.get(split, 0)
        found[split] = None if limit is None or before is None else max(before, limit)
    return found
