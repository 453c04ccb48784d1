"""Train the runs of a sweep, one after the other or side by side. Torch is imported only with the first run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from peftbench.config.compose import TypedRun
from peftbench.config.schema import Run, index_by_key
from peftbench.records.record import find_finished, find_record
from peftbench.sweeps import mps
from peftbench.sweeps.live import LiveSweep
from peftbench.sweeps.plan import FOLDER, Member, Sweep
from peftbench.sweeps.workers import Ended, Job, Workers, train_attempt
from peftbench.tables.columns import format_duration
from peftbench.utils.console import make_console, say
from peftbench.utils.differences import find_distinctive
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.progress import Display, is_live

INTERRUPTED = 130  # the exit code


class Sweeper:
    """Trains the runs of a sweep, those that another process is at last.

    Args:
        sweep: on a terminal it is shown as a table that grows; elsewhere each run prints its own lines.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.display: Display | None = None  # of the run that is trained, while the sweep is shown as a table
        self.put_off: list[TypedRun] = []  # runs that another process is at

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the sweep as a table during the block, if it is on a terminal."""
        console = make_console()
        if not is_live(console):
            yield
            return
        self.display = Display(console, within_another=True)
        try:
            with LiveSweep(self.sweep, console, below=self.display.progress):
                yield
        finally:
            self.display = None

    def train_all(
        self, points: Sequence[TypedRun], members: Sequence[Member], places: Sequence[dict[str, str]], before: int = 0
    ) -> None:
        """Train runs, and wait for those that another process is at.

        Args:
            members: where the runs lie.
            places: of the runs that are trained at once, see `find_places`.
            before: the number of runs of the sweep before these.
        """
        if len(places) > 1:
            self._train_side_by_side(_build_jobs(points, [member.folder for member in members]), places)
        else:
            for number, (overrides, run) in enumerate(points, start=before + 1):
                if self.display is None:
                    say(f"\nrun {number}: {' '.join(overrides)}")
                self._train_one(run, overrides)
        while self.put_off:
            overrides, run = self.put_off.pop(0)
            say(f"\nwaiting for the other process: {' '.join(overrides)}")
            self._train_one(run, overrides, wait=True)

    def _train_one(self, run: Run, overrides: list[str], wait: bool = False) -> None:
        try:
            self._take(train_attempt(run, overrides, wait=wait, display=self.display), run, overrides)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None

    def _take(self, ended: Ended, run: Run, overrides: list[str]) -> None:
        """Print why a run failed, and put off one that another process is at."""
        if ended.busy:
            self.put_off.append((overrides, run))
        if ended.faults and self.display is not None:  # elsewhere this line is printed before the run starts
            print_faults([" ".join(overrides)])
        print_faults(ended.faults)

    def _train_side_by_side(self, jobs: Sequence[Job], places: Sequence[dict[str, str]]) -> None:
        """Train runs in workers, and print a line for each that ends. Those that are done need no worker.

        Args:
            places: of the workers, see `find_places`.
        """
        # What a search has chosen is noted in the record of a run that is done.
        waiting = [
            job for job in jobs if job.run.rerun or job.run.search is not None or find_finished(job.folder) is None
        ]
        if not waiting:
            return
        places = places[: len(waiting)]
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"  # two processes may start on a sweep in one second
        logs = Path(waiting[0].run.output_dir).expanduser() / FOLDER / name
        with (
            mps.share_gpus(_get_mps([job.run for job in waiting]), places, logs) as shared,
            Workers(shared, logs) as workers,
        ):
            through = " through MPS" if any(mps.PIPES in place for place in shared) else ""
            say(f"{len(waiting)} runs, {len(places)} at once{through}; what they print is in {logs}")
            for count, (job, ended) in enumerate(workers.run(waiting), start=1):
                if self.display is None:
                    say(f"{count} of {len(waiting)}: {job.settings}: {_describe_result(job)}")
                self._take(ended, job.run, job.overrides)


def train_for_hydra(number: int, run: Run, overrides: list[str], selecting: bool) -> float:
    """Train one run that a sweeper or launcher of Hydra's has started; a run that fails is recorded and ends nothing.

    A run that another process is at is waited for, since nobody comes back to it.

    Args:
        selecting: the sweeper decides on its next runs by this one.

    Returns:
        What such a sweeper may maximise (`records.choice.compute_objective`).
    """
    say(f"\nrun {number}: {' '.join(overrides)}")
    try:
        ended = train_attempt(run, overrides, wait=True, selecting=selecting)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    print_faults(ended.faults)
    if ended.given:
        say(ended.given)
    return ended.objective


def find_places(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the environment of each worker that `jobs` asks for; one empty one if runs are trained in this process.

    Raises:
        UserError: the runs ask for different numbers of jobs, or `mps` cannot be had.
    """
    if all(run.jobs == "1" for run in runs):
        return [{}]
    from peftbench.sweeps.places import assign_places  # imports joblib and psutil

    found = assign_places(runs)
    mps.is_wanted(_get_mps(runs), found)  # refused before anything is written
    return found


def _get_mps(runs: Sequence[Run]) -> bool | str:
    """The `mps` of a sweep. Raises UserError where it differs from run to run."""
    asked = {str(run.mps).lower(): run.mps for run in runs}
    if len(asked) > 1:
        raise UserError(f"mps={','.join(sorted(asked))}: a sweep has one way to share its GPUs, not several.")
    (mode,) = asked.values()
    return mode


def _build_jobs(points: Sequence[TypedRun], folders: Sequence[Path]) -> list[Job]:
    """What a worker must know of each run.

    Args:
        points: the runs, with the overrides that make them.
        folders: of the runs, with budgets solved: a folder's name depends on the bottlenecks.
    """
    typed = [[word for word in overrides if not word.startswith(("hydra.", "hydra/"))] for overrides, _ in points]
    given = [index_by_key(words) for words in typed]
    keys = find_distinctive(given)
    settings = [" ".join(f"{key}={value}" for key, value in values.items() if key in keys) for values in given]
    return [
        Job(number, words, told, run, folder)
        for number, (words, told, (_, run), folder) in enumerate(zip(typed, settings, points, folders, strict=True), 1)
    ]


def _describe_result(job: Job) -> str:
    """How a run ended, by its record."""
    record = find_record(job.folder)
    if record is None:
        return "missing"
    if record.status != "done" or record.score is None:
        return record.outcome
    return f"{record.metric} {record.score:.2f}, {format_duration(record.timings['total_s'])}"
