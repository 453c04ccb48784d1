"""Store generated ids on disk, batch by batch, so that a long generation that was interrupted can resume."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peftbench.utils.files import open_unlinked, parse_json


class Partial:
    """The rows of a prediction that have been computed, by example.

    They are stored in a file with a line for the stamp and a line for each example, with a checksum of its ids. A file
    with another stamp is overwritten, and so is all that follows a damaged line.

    Args:
        stamp: states what the rows depend on: model, settings, data.
    """

    def __init__(self, path: Path, stamp: str) -> None:
        self.path = path
        self.rows: dict[int, np.ndarray] = {}
        lines = (
            path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []
        )  # without the last one, which is empty or torn
        if lines[:1] == [json.dumps(stamp)]:
            for line in lines[1:]:
                if (row := _parse_row(line)) is None:
                    break
                self.rows[row[0]] = row[1]
        with open_unlinked(path, "w") as file:
            file.write(json.dumps(stamp) + "\n")
        self.add(list(self.rows), list(self.rows.values()))

    def add(self, indices: Sequence[int], rows: Sequence[np.ndarray]) -> None:
        """Store the rows of these examples."""
        self.rows.update(zip(indices, rows, strict=True))
        with open_unlinked(self.path, "a") as file:
            for index, row in zip(indices, rows, strict=True):
                file.write(json.dumps([index, row.tolist(), _sum_up(index, row.tolist())]) + "\n")

    def remove(self) -> None:
        """Delete the file, which is not needed once all rows are there."""
        self.path.unlink(missing_ok=True)


def _parse_row(line: str) -> tuple[int, np.ndarray] | None:
    """Return the example and the ids of a line; None if it is damaged."""
    try:
        index, ids, checksum = parse_json(line)
    except (ValueError, TypeError):
        return None
    return (index, np.array(ids)) if checksum == _sum_up(index, ids) else None


def _sum_up(index: int, ids: list[int]) -> int:
    return zlib.crc32(json.dumps([index, ids]).encode())
