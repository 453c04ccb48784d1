"""The rows of a task of the user's own: `task._target_=mypkg.Anagrams`, a class derived from that of `task.kind`.

What it defines comes before what peftbench's class has: `read_rows` makes the rows, `encode` the tokens, `decode` the
texts that are scored, `references` what they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from peftbench.config.own_parts import TASK, load_class
from peftbench.config.schema import Task
from peftbench.utils.errors import UserError


class RowMaker:
    """What may make rows by itself: every `TaskData`."""

    @staticmethod
    def read_rows(task: Task, split: str) -> Sequence[Mapping[str, Any]] | Dataset | None:
        """Return the rows of a split that a task of the user's own makes by itself, with the task's columns.

        None: they are read from the task's files, or the hub.
        """
        return None


def read_own_rows(task: Task, split: str) -> Dataset | None:
    """Return the rows that a task of the user's own makes for a split; None: it makes none.

    Raises:
        UserError: the task is no class of a task, fails, or returns no rows.
    """
    assert task._target_ is not None
    typed = f"{TASK}={task._target_}"
    made = load_class(TASK, task._target_, RowMaker)
    try:
        rows = made.read_rows(task, split)
        return rows if rows is None or isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{typed}: read_rows(task, {split!r}) fails or returns no rows: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
