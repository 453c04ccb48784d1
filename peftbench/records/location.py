"""The folder of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peftbench.config.identity import hash_run
from peftbench.config.schema import Run
from peftbench.config.stamps import stamp_ends
from peftbench.records.earlier import is_the_same
from peftbench.records.record import FILE, find_record
from peftbench.utils.files import expand_home


def locate_run(run: Run) -> Path:
    """Return the folder of a run: OUTPUT_DIR/TASK/MODEL/METHOD/HASH, with the earlier hash if it was recorded before
    whole files counted. Raises UserError as `hash_run` does."""
    method = expand_home(run.output_dir) / run.task.name / run.model.name / run.method
    folder = method / hash_run(run)
    if (folder / FILE).is_file() or not method.is_dir():
        return folder
    before = method / hash_run(run, stamp_ends)
    record = None if before == folder else find_record(before)
    if record is not None and is_the_same(run, record, hash_run(replace(run, seed=0))):
        return before
    return folder
