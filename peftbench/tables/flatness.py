"""How flat the curves of trainings have become: what the last third of the steps gained on the selection split."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from peftbench.config.schema import LOSS
from peftbench.records.record import Record
from peftbench.records.run_files import read_metrics


def measure_last_gain(record: Record) -> float | None:
    """Return the gain of the selection score, or of the loss downwards, in the last third of the steps of a run.

    None if there was no look at the selection split before.
    """
    lines = [line for line in read_metrics(record.folder) if line["stage"] == f"train {record.method}"]
    for metric, sign in ((record.metric, 1), (LOSS, -1)):
        looks = [(line["step"], line[f"eval_{metric}"]) for line in lines if f"eval_{metric}" in line]
        if looks:
            last, value = looks[-1]
            before = [earlier for step, earlier in looks if 3 * step <= 2 * last]
            return sign * (value - before[-1]) if before else None
    return None


def find_steepest(records: Sequence[Record]) -> tuple[float, float, str] | None:
    """Return the median gain of runs, the largest one, and the method that has it; None if no gain is known."""
    gains = sorted((gain, record.method) for record in records if (gain := measure_last_gain(record)) is not None)
    return (statistics.median(gain for gain, _ in gains), *gains[-1]) if gains else None
