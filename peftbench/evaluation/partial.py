"""Generated ids on their way: kept on disk batch by batch, so that a long generation that was stopped can go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Partial:
    """The rows of a prediction that are there already, by example.

    A file with a line for what is predicted and a line for each example. One that was written for anything else is
    begun anew, and a last line that is torn is done again.

    Args:
        stamp: what the rows follow from: model, settings, data.
    """

    def __init__(self, path: Path, stamp: str) -> None:
        self.path = path
        self.rows: dict[int, np.ndarray] = {}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # the last one has no end
        if lines[:1] == [json.dumps(stamp)]:
            for line in lines[1:]:
                index, ids = json.loads(line)
                self.rows[index] = np.array(ids)
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(stamp) + "\n")
        self.add(list(self.rows), list(self.rows.values()))

    def add(self, indices: Sequence[int], rows: Sequence[np.ndarray]) -> None:
        """Keep the rows of these examples."""
        self.rows.update(zip(indices, rows, strict=True))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([i, row.tolist()]) + "\n" for i, row in zip(indices, rows, strict=True))

    def remove(self) -> None:
        """All is done: the file goes."""
        self.path.unlink(missing_ok=True)
