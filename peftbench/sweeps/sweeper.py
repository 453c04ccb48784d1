"""Trains the runs of a sweep, one after the other or side by side. Torch is imported only with the first run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from peftbench.config.compose import Point
from peftbench.config.schema import Run, by_key
from peftbench.records.record import find, finished
from peftbench.sweeps import mps
from peftbench.sweeps.live import LiveSweep
from peftbench.sweeps.plan import FOLDER, Member, Sweep
from peftbench.sweeps.workers import Ended, Job, Workers, attempt
from peftbench.tables.columns import duration
from peftbench.utils.console import say, terminal
from peftbench.utils.differences import distinctive
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.progress import Display, is_live

INTERRUPTED = 130  # the exit code

display: Display | None = None  # of the run that goes on, where the sweep is shown as a table
put_off: list[tuple[Run, list[str]]] = []  # runs that another process was at, with what was typed


@contextmanager
def shown(sweep: Sweep) -> Iterator[None]:
    """The sweep as a table that grows, on a terminal; elsewhere each run prints its own lines."""
    global display
    console = terminal()
    if not is_live(console):
        yield
        return
    display = Display(console, within_another=True)
    try:
        with LiveSweep(sweep, console, below=display.progress):
            yield
    finally:
        display = None


def places_of(runs: Sequence[Run]) -> list[dict[str, str]]:
    """`places.places`, which is imported only where several runs may go on at once.

    Raises:
        UserError: as there, or `mps` cannot be had.
    """
    if all(run.jobs == "1" for run in runs):
        return [{}]
    from peftbench.sweeps.places import places

    found = places(runs)
    mps.wanted(_mps(runs), found)  # refused before anything is written
    return found


def train_all(
    points: Sequence[Point], members: Sequence[Member], places: Sequence[dict[str, str]], before: int = 0
) -> None:
    """Train runs, and wait for those that another process is at.

    Args:
        members: where the runs lie.
        places: of the runs that go on at once, see `places.places`.
        before: the number of runs of the sweep before these.
    """
    if len(places) > 1:
        _side_by_side(_jobs(points, [member.folder for member in members]), places)
    else:
        for number, (overrides, run) in enumerate(points, start=before + 1):
            train_one(number, run, overrides)
    wait_for_others()


def train_one(number: int, run: Run, overrides: list[str], selecting: bool = False) -> float:
    """Train one run in this process. One that fails is recorded as failed and ends nothing.

    Args:
        selecting: a sweeper of Hydra's decides on its next runs by this one. It is then waited for, where another
            process is at it.

    Returns:
        What such a sweeper is given (`results.choice.objective`).
    """
    if display is None:
        say(f"\nrun {number}: {' '.join(overrides)}")
    return _attempt(run, overrides, selecting, selecting)


def wait_for_others() -> None:
    """Go on with the runs that other processes were at, once these have ended."""
    while put_off:
        run, overrides = put_off.pop(0)
        say(f"\nwaiting for the other process: {' '.join(overrides)}")
        _attempt(run, overrides, wait=True)


def _attempt(run: Run, overrides: list[str], wait: bool = False, selecting: bool = False) -> float:
    try:
        ended = attempt(run, overrides, wait, display, selecting)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    return _take(ended, run, overrides)


def _take(ended: Ended, run: Run, overrides: list[str]) -> float:
    """Print why a run failed, and put off one that another process is at; returns its objective."""
    if ended.busy:
        put_off.append((run, overrides))
    if ended.faults and display is not None:  # elsewhere this line is printed before the run starts
        print(f"peftbench: {' '.join(overrides)}", file=sys.stderr)
    print_faults(ended.faults)
    if ended.given:
        say(ended.given)
    return ended.objective


def _mps(runs: Sequence[Run]) -> bool | str:
    """The `mps` of a sweep. Raises UserError where it differs from run to run."""
    asked = {str(run.mps).lower(): run.mps for run in runs}
    if len(asked) > 1:
        raise UserError(f"mps={','.join(sorted(asked))}: a sweep has one way to share its GPUs, not several.")
    (mode,) = asked.values()
    return mode


def _jobs(points: Sequence[Point], folders: Sequence[Path]) -> list[Job]:
    """What a worker must know of each run.

    Args:
        points: the runs, with the overrides that make them.
        folders: of the runs, with budgets solved: a folder's name depends on the bottlenecks.
    """
    typed = [[word for word in overrides if not word.startswith(("hydra.", "hydra/"))] for overrides, _ in points]
    given = [by_key(words) for words in typed]
    keys = distinctive(given)
    settings = [" ".join(f"{key}={value}" for key, value in values.items() if key in keys) for values in given]
    return [
        Job(number, words, told, run, folder)
        for number, (words, told, (_, run), folder) in enumerate(zip(typed, settings, points, folders, strict=True), 1)
    ]


def _side_by_side(jobs: Sequence[Job], places: Sequence[dict[str, str]]) -> None:
    """Runs in workers, a line for each that ends. Those that are done need no worker.

    Args:
        places: of the workers, see `places.places`.
    """
    # What a search has chosen is noted in the record of a run that is done.
    waiting = [job for job in jobs if job.run.rerun or job.run.search is not None or finished(job.folder) is None]
    if not waiting:
        return
    places = places[: len(waiting)]
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"  # two processes may start on a sweep in one second
    logs = Path(waiting[0].run.output_dir).expanduser() / FOLDER / name
    with (
        mps.shared(_mps([job.run for job in waiting]), places, logs) as shared,
        Workers(shared, logs) as workers,
    ):
        through = " through MPS" if any(mps.PIPES in place for place in shared) else ""
        say(f"{len(waiting)} runs, {len(places)} at once{through}; what they print is in {logs}")
        for count, (job, ended) in enumerate(workers.run(waiting), start=1):
            if display is None:
                say(f"{count} of {len(waiting)}: {job.settings}: {_result(job)}")
            _take(ended, job.run, job.overrides)


def _result(job: Job) -> str:
    """How a run ended, by its record."""
    record = find(job.folder)
    if record is None:
        return "missing"
    if record.status != "done" or record.score is None:
        return record.outcome
    return f"{record.metric} {record.score:.2f}, {duration(record.timings['total_s'])}"
