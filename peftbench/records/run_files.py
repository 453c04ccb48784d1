"""The files of a run beside its record: what was logged in training, and predictions. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from peftbench.utils.files import dumped, write_lines

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints, gone once it is done


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, in the order in which they were written."""
    # the last line may be half written, or torn where the process died
    lines = [values for values in read_lines(folder / METRICS) if values is not None]
    return [values for values in lines if "stage" in values and isinstance(values.get("step"), int)]


def read_lines(file: Path, most: int | None = None) -> Iterator[dict[str, Any] | None]:
    """The objects in the lines of a file, `most` lines at most; None for a line that holds none.

    There are none in a file that is missing.
    """
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in islice(lines, most):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            yield values if isinstance(values, dict) else None


def rewind_metrics(folder: Path, stage: str, step: int) -> None:
    """Drops the lines of `metrics.jsonl` that a training wrote after `step`, from which it now goes on."""
    if (folder / METRICS).is_file():
        kept = (values for values in logged(folder) if values["stage"] != stage or values["step"] <= step)
        write_lines(folder / METRICS, kept)


def append_metrics(folder: Path, values: dict[str, Any]) -> None:
    """Appends one line to `metrics.jsonl`, which can be read while the run goes on."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(dumped(values, ensure_ascii=True) + "\n")


def predictions_file(role: str) -> str:
    """What the file with a role's predictions is called: `predictions.jsonl`, or `predictions.SPLIT.jsonl`."""
    return f"predictions{role.removeprefix('report').replace('_', '.', 1)}.jsonl"


def write_predictions(folder: Path, predictions: Iterable[dict[str, Any]], role: str = "report") -> None:
    """Writes `predictions.jsonl`, one line for each example."""
    write_lines(folder / predictions_file(role), predictions)
