"""The folder of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from peftbench.config.identity import hash_run
from peftbench.config.schema import Run
from peftbench.config.stamps import stamp_content, stamp_ends
from peftbench.records.earlier import is_the_same
from peftbench.records.record import FILE, find_record
from peftbench.utils.files import expand_home


def locate_run(run: Run, stamp: Callable[..., str] = stamp_content) -> Path:
    """Return the folder of a run: OUTPUT_DIR/TASK/MODEL/METHOD/HASH, with the earlier hash if it was recorded before
    whole files counted. Raises UserError as `hash_run` does, which takes `stamp`."""
    method = expand_home(run.output_dir) / run.task.name / run.model.name / run.method
    folder = method / hash_run(run, stamp)
    # A run with a search is never recorded itself, and where there is no folder there is no earlier name.
    if (folder / FILE).is_file() or run.search is not None or not method.is_dir():
        return folder
    before = method / hash_run(run, stamp_ends)
    record = None if before == folder else find_record(before)
    if record is not None and is_the_same(run, record, hash_run(replace(run, seed=0))):
        return before
    return folder
