"""Store generated ids on disk, batch by batch, so that a long generation that was interrupted can resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peftbench.utils.files import open_unlinked


class Partial:
    """The rows of a prediction that have been computed, by example.

    They are stored in a file with a line for the stamp and a line for each example. A file with another stamp is
    overwritten, and an incomplete last line is ignored.

    Args:
        stamp: states what the rows depend on: model, settings, data.
    """

    def __init__(self, path: Path, stamp: str) -> None:
        self.path = path
        self.rows: dict[int, np.ndarray] = {}
        lines = (
            path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        )  # without the last one, which is empty or torn
        if lines[:1] == [json.dumps(stamp)]:
            for line in lines[1:]:
                index, ids = json.loads(line)
                self.rows[index] = np.array(ids)
        with open_unlinked(path, "w") as file:
            file.write(json.dumps(stamp) + "\n")
        self.add(list(self.rows), list(self.rows.values()))

    def add(self, indices: Sequence[int], rows: Sequence[np.ndarray]) -> None:
        """Store the rows of these examples."""
        self.rows.update(zip(indices, rows, strict=True))
        with open_unlinked(self.path, "a") as file:
            file.writelines(json.dumps([i, row.tolist()]) + "\n" for i, row in zip(indices, rows, strict=True))

    def remove(self) -> None:
        """Delete the file, which is not needed once all rows are there."""
        self.path.unlink(missing_ok=True)
