"""What each example contributed to a run's score: from its predictions, or from the file that is kept in their place.

Predictions contain the data's own references and are large. The statistics of the main score, some small integers for
each example, are enough for the bootstrap.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peftbench.config.own_parts import is_own
from peftbench.metrics.measure import compute_statistics, restore_statistics
from peftbench.metrics.statistics import Statistics
from peftbench.records.record import Record
from peftbench.records.run_files import name_predictions_file
from peftbench.records.saved import read_scored_predictions
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_beside

FILE = "examples.npz"
MOST_BYTES = 1 << 28  # of the unpacked rows


@dataclass(frozen=True)
class Restricted:
    """What a record knows whose score is that of some of its examples."""

    chosen: list[bool]  # for each example of the report split
    statistics: dict[str, Statistics]  # of each score of the chosen ones


def has_examples(record: Record) -> bool:
    """Return whether it is known what each reported example contributed to the run's main score."""
    if record.restricted is not None:
        return True
    files = (name_predictions_file("report"), FILE)
    return not is_own(record.metric) and any((record.folder / file).is_file() for file in files)


def read_examples(record: Record) -> dict[str, Statistics]:
    """Return the statistics of each score of the report split; of the main one alone if the predictions are not there.

    Of a record that was restricted to groups of the examples, those of these examples.

    Raises:
        UserError: neither file is there, or it is damaged.
    """
    if record.restricted is not None:
        return dict(record.restricted.statistics)
    if _has_rows_alone(record):
        return {record.metric: restore_statistics(record.metric, _read_rows(record), record.data.get("labels", ()))}
    predictions = read_scored_predictions(record, "report")
    ours, right = ([one[side] for one in predictions] for side in ("prediction", "reference"))
    try:
        return compute_statistics(record.metric, ours, right, record.data.get("labels", ()))
    except (TypeError, ValueError) as error:
        file = record.folder / name_predictions_file("report")
        raise UserError(f"{file} holds values that are no predictions of this task ({error}).") from error


def read_groups(record: Record) -> list[str]:
    """Return the group of each example of the report split (`task.group_column`), in their order; none if that is not
    known.

    Raises:
        UserError: the file that says so is damaged.
    """
    if _has_rows_alone(record):
        arrays = _read_arrays(record)
        if not {"groups", "names"} <= arrays.keys():
            return []
        codes, names = arrays["groups"], arrays["names"]
        if codes.dtype.kind != "u" or names.dtype.kind != "U" or codes.shape != (len(_read_rows(record)),):
            held = f"{codes.dtype} of the shape {codes.shape}, of {names.dtype}"
            raise UserError(f"{record.folder / FILE} cannot be read: its groups are {held}.")
        if codes.max(initial=0) >= len(names):
            raise UserError(f"{record.folder / FILE} cannot be read: a group has no name.")
        return [str(name) for name in names[codes]]
    predictions = read_scored_predictions(record, "report")
    return [str(one["group"]) for one in predictions] if all("group" in one for one in predictions) else []


def write_examples(rows: np.ndarray, folder: Path, groups: Sequence[str] = ()) -> None:
    """Write the rows of a run's main score to `examples.npz`, counts as the smallest integers that hold them.

    Args:
        groups: that of each row, if it is known: they are written as `names`, and as `groups` that count these.
    """
    if (rows >= 0).all() and (rows == np.floor(rows)).all():
        rows = rows.astype(np.min_scalar_type(int(rows.max(initial=0))))
    rows = np.asfortranarray(rows)  # column after column, which packs better
    with write_beside(folder / FILE) as unfinished, unfinished.open("wb") as file:
        if groups:
            names, codes = np.unique(np.array(groups), return_inverse=True)
            codes = codes.astype(np.min_scalar_type(len(names)))
            np.savez_compressed(file, rows=rows, names=names, groups=codes)
        else:
            np.savez_compressed(file, rows=rows)


def _has_rows_alone(record: Record) -> bool:
    """Return whether the file with the rows of the main score is there, and the predictions are not."""
    return (record.folder / FILE).is_file() and not (record.folder / name_predictions_file("report")).is_file()


def _read_rows(record: Record) -> np.ndarray:
    arrays, report = _read_arrays(record), record.scores.get("report")
    rows = arrays.get("rows", np.empty(0))
    if rows.ndim != 2 or rows.dtype.kind not in "uif" or (report is not None and len(rows) != report.examples):
        held = f"it holds {rows.dtype} of the shape {rows.shape}" if "rows" in arrays else "it holds no rows"
        raise UserError(f"{record.folder / FILE} cannot be read: {held}.")
    return rows.astype(float)


def _read_arrays(record: Record) -> dict[str, np.ndarray]:
    """Return the arrays of a record's `examples.npz`. Raises UserError if it is damaged."""
    file = record.folder / FILE
    try:
        with zipfile.ZipFile(file) as packed:
            if sum(part.file_size for part in packed.infolist()) > MOST_BYTES:
                raise ValueError("it is too large")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
