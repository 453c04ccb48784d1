"""The end of a sweep: one table of all its runs, and whether they all came through."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from peftbench.config import Run
from peftbench.results.identity import run_dir
from peftbench.results.record import load_records
from peftbench.results.table import show


def show_sweep(runs: Sequence[Run]) -> int:
    """Print the table of the runs' records; returns 0 if every run is done, else 1."""
    folders = {run_dir(run) for run in runs}
    records = [record for folder in sorted(folders) if folder.is_dir() for record in load_records(folder)[0]]
    console = Console()
    console.print()
    show(records, console)
    done = sum(record.status == "done" for record in records)
    console.print(f"\n{done} of {len(folders)} runs are done.", highlight=False)
    return 0 if done == len(folders) else 1
