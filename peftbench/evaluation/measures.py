"""What is measured of a run where it is asked for: `retention=` and `speed=true`. Neither changes a result."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peftbench.config.schema import Run
from peftbench.evaluation.retention import is_measured, measure_after, measure_before
from peftbench.evaluation.speed import measure_speed
from peftbench.records.record import Record
from peftbench.utils.progress import Display


def lacks_measures(run: Run, record: Record) -> bool:
    """Return whether a run asks for what its record lacks; one that diverged has nothing to measure."""
    if record.diverged is not None:
        return False
    return not is_measured(run, record.retention) or (run.speed and record.speed is None)


def measure_backbone(run: Run, record: Record, display: Display) -> None:
    """Record what must be measured before the training. Raises UserError if that cannot be done."""
    if run.retention is not None:
        with display.stage("measure the backbone"), _add_time(record):
            record.retention = measure_before(run)


def measure_trained(run: Run, record: Record, display: Display) -> None:
    """Record what is asked for of a finished run, as far as its record lacks it."""
    if not lacks_measures(run, record):
        return
    gc.collect()  # the model of the training
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not is_measured(run, record.retention):
        before = record.retention
        if before is None or before.after is not None:  # the run is done, and was not measured on this text
            measure_backbone(run, record, display)
            before = record.retention
        assert before is not None
        with display.stage("measure retention"), _add_time(record):
            record.retention = measure_after(run, record.folder, before)
    if run.speed and record.speed is None:
        with display.stage("measure speed"), _add_time(record):
            record.speed = measure_speed(run, record.folder)


@contextmanager
def _add_time(record: Record) -> Iterator[None]:
    """Record the seconds that the block takes, in addition to those of earlier ones."""
    began = time.perf_counter()
    yield
    record.timings["measure_s"] = round(record.timings.get("measure_s", 0.0) + time.perf_counter() - began, 3)
