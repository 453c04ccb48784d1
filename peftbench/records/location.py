"""The folder of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peftbench.config.identity import run_hash
from peftbench.config.schema import Run
from peftbench.config.stamps import ends_stamp
from peftbench.records.earlier import is_the_same
from peftbench.records.record import FILE, find


def run_dir(run: Run) -> Path:
    """Return the folder of a run: OUTPUT_DIR/TASK/MODEL/METHOD/HASH, with the earlier hash if it was recorded before
    whole files counted. Raises UserError as `run_hash` does."""
    method = Path(run.output_dir).expanduser() / run.task.name / run.model.name / run.method
    folder = method / run_hash(run)
    if (folder / FILE).is_file():
        return folder
    before = method / run_hash(run, ends_stamp)
    record = None if before == folder else find(before)
    if record is not None and is_the_same(run, record, run_hash(replace(run, seed=0))):
        return before
    return folder
