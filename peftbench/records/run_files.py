"""The files of a run other than its record: the metrics logged in training, and the predictions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from peftbench.utils.files import UNFINISHED, clear_unfinished, dump_json, open_unlinked, parse_json, write_lines

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints, deleted once the run is done
ENDED = "ended.json"  # in it: that the training has ended, and its cost
TRACKED = "trackers.json"  # in it: which runs of trackers the run is
OF_TRIAL = (ENDED, TRACKED)  # with which a trial that is trained goes on if it is chosen: all that it keeps there


def has_leftovers(folder: Path, trained: bool = False) -> bool:
    """Return whether a run that has ended still has its checkpoints, or half a file: its process died before it deleted
    them, or while it wrote.

    Args:
        trained: the run is a trial with the status trained, and has not ended.
    """
    try:
        names = os.listdir(folder)
        if CHECKPOINTS in names and not (trained and set(os.listdir(folder / CHECKPOINTS)) <= set(OF_TRIAL)):
            return True
        return any(name.endswith(UNFINISHED) for name in names)
    except OSError:  # it is no folder, or nobody may list it
        return False


def clear_leftovers(folder: Path, trained: bool = False) -> None:
    """Delete them. For the process that holds the run's lock, since others' files would be half written."""
    clear_checkpoints(folder, trained)
    clear_half_files(folder)


def clear_checkpoints(folder: Path, trained: bool = False) -> None:
    """Delete a run's checkpoints; of a trial that is `trained`, all but what it goes on with."""
    if not trained:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return
    for place in (folder / CHECKPOINTS).glob("*"):
        if place.name in OF_TRIAL:
            continue
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def clear_half_files(folder: Path) -> None:
    """Delete what killed processes have left of files that they were writing, in a run's folder and one level below."""
    for place in (folder, *(below for below in folder.glob("*") if below.is_dir())):
        clear_unfinished(place)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`, in the order in which they were written."""
    # the last line may be half written, because it is being written or because the process died
    lines = [values for values in read_lines(folder / METRICS_FILE) if values is not None]
    return [values for values in lines if "stage" in values and isinstance(values.get("step"), int)]


def read_lines(file: Path, most: int | None = None) -> Iterator[dict[str, Any] | None]:
    """Yield the objects in the lines of a file, `most` lines at most; None for a line without an object.

    A missing file has no lines.
    """
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in islice(lines, most):
            try:
                values = parse_json(line)
            except ValueError:
                values = None
            yield values if isinstance(values, dict) else None


def rewind_metrics(folder: Path, stage: str, step: int) -> None:
    """Delete the lines of `metrics.jsonl` that a training wrote after `step`, from which it now resumes."""
    if (folder / METRICS_FILE).is_file():
        kept = (values for values in read_metrics(folder) if values["stage"] != stage or values["step"] <= step)
        write_lines(folder / METRICS_FILE, kept)


def append_metrics(folder: Path, values: dict[str, Any]) -> None:
    """Append one line to `metrics.jsonl`, which can be read during the run."""
    with open_unlinked(folder / METRICS_FILE, "a") as file:
        file.write(dump_json(values, ensure_ascii=True) + "\n")


def name_predictions_file(role: str) -> str:
    """Return the name of the file with a role's predictions: `predictions.jsonl`, or `predictions.SPLIT.jsonl`."""
    return f"predictions{role.removeprefix('report').replace('_', '.', 1)}.jsonl"


def write_predictions(folder: Path, predictions: Iterable[dict[str, Any]], role: str = "report") -> None:
    """Write `predictions.jsonl`, one line for each example."""
    write_lines(folder / name_predictions_file(role), predictions)
