"""What each example contributed to a run's score: from its predictions, or from the file that is kept in their place.

Predictions contain the data's own references and are large. The statistics of the main score, some small integers for
each example, are enough for the bootstrap.
"""

from __future__ import annotations

import zipfile
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


def has_examples(record: Record) -> bool:
    """Return whether it is known what each reported example contributed to the run's main score."""
    files = (name_predictions_file("report"), FILE)
    return not is_own(record.metric) and any((record.folder / file).is_file() for file in files)


def read_examples(record: Record) -> dict[str, Statistics]:
    """Return the statistics of each score of the report split; of the main one alone if the predictions are not there.

    Raises:
        UserError: neither file is there, or it is damaged.
    """
    if (record.folder / FILE).is_file() and not (record.folder / name_predictions_file("report")).is_file():
        return {record.metric: restore_statistics(record.metric, _read_rows(record), record.data.get("labels", ()))}
    predictions = read_scored_predictions(record, "report")
    ours, right = ([one[side] for one in predictions] for side in ("prediction", "reference"))
    try:
        return compute_statistics(record.metric, ours, right, record.data.get("labels", ()))
    except (TypeError, ValueError) as error:
        file = record.folder / name_predictions_file("report")
        raise UserError(f"{file} holds values that are no predictions of this task ({error}).") from error


def write_examples(rows: np.ndarray, folder: Path) -> None:
    """Write the rows of a run's main score to `examples.npz`, counts as the smallest integers that hold them."""
    if (rows >= 0).all() and (rows == np.floor(rows)).all():
        rows = rows.astype(np.min_scalar_type(int(rows.max(initial=0))))
    with write_beside(folder / FILE) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, rows=np.asfortranarray(rows))  # column after column, which packs better


def _read_rows(record: Record) -> np.ndarray:
    file = record.folder / FILE
    try:
        with zipfile.ZipFile(file) as packed:
            if sum(part.file_size for part in packed.infolist()) > MOST_BYTES:
                raise ValueError("it is too large")
        with np.load(file, allow_pickle=False) as arrays:
            rows = np.asarray(arrays["rows"])
        report = record.scores.get("report")
        if rows.ndim != 2 or rows.dtype.kind not in "uif" or (report is not None and len(rows) != report.examples):
            raise ValueError(f"it holds {rows.dtype} of the shape {rows.shape}")
        return rows.astype(float)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
