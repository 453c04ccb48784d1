"""Train the runs of a sweep, one after the other or side by side. Torch is imported only with the first run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from peftbench.config.launchers import HydraLauncher
from peftbench.config.schema import Run, index_by_key
from peftbench.records.record import find_record, get_time
from peftbench.records.wording import describe_selection
from peftbench.sweeps import mps
from peftbench.sweeps.executors import start_executor
from peftbench.sweeps.jobs import Ended, Job, train_attempt
from peftbench.sweeps.left import Left, find_left
from peftbench.sweeps.live import LiveSweep
from peftbench.sweeps.plan import FOLDER, Member, Sweep
from peftbench.sweeps.queue import Queue
from peftbench.sweeps.workers import Workers
from peftbench.tables.columns import format_duration
from peftbench.utils.console import make_console, say
from peftbench.utils.differences import find_distinctive
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.files import expand_home
from peftbench.utils.progress import Display, hide_progress, is_live
from peftbench.utils.text import format_count

INTERRUPTED = 130  # the exit code


class Sweeper:
    """Trains the runs of a sweep and the trials of its searches, in the order of `Queue`.

    Args:
        sweep: on a terminal it is shown as a table that grows; elsewhere each run prints its own lines.
        launcher: where runs are trained, see `config.launchers`; None: on this machine.
        places: of the runs that are trained at once on this machine, see `find_places`.
    """

    def __init__(self, sweep: Sweep, launcher: Any, places: Sequence[dict[str, str]]) -> None:
        self.sweep, self.launcher, self.places = sweep, launcher, places
        self.began = get_time()
        self.display: Display | None = None  # of the run that is trained, while the sweep is shown as a table
        self.given: dict[int, Member] = {}  # the runs that were handed out, by their number
        self.keys = find_distinctive([index_by_key(_list_typed(one)) for one in (*sweep.trials, *sweep.members)])

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Show the sweep as a table during the block, if it is on a terminal.

        Runs of a launcher of Hydra's may print to the same terminal, so there is no table then.
        """
        console = make_console()
        with ExitStack() as stack:
            if is_live(console) and not isinstance(self.launcher, HydraLauncher):
                self.display = Display(console, within_another=True)
                stack.enter_context(LiveSweep(self.sweep, console, below=self.display.progress))
            yield

    def train(self) -> None:
        """Train all runs that must be trained, those that another process is at last."""
        if self.launcher is not None:
            self._train_elsewhere(Queue(self.sweep, find_left))
        elif len(self.places) > 1:
            self._train_side_by_side(Queue(self.sweep, find_left))
        else:
            self._train_in_turn(Queue(self.sweep, lambda _: Left.training))

    def _train_in_turn(self, queue: Queue) -> None:
        """Train one run after the other in this process; each says what it is, also where nothing is left to do."""
        for job in iter(self._choose_jobs(queue).__next__, None):
            if self.display is None:
                say(f"\nrun {job.number}: {' '.join(job.overrides)}")
            try:
                ended = train_attempt(job.run, job.overrides, wait=job.wait, display=self.display)
            except KeyboardInterrupt:
                raise SystemExit(INTERRUPTED) from None
            member = self.given.pop(job.number)
            queue.end(member, ended.busy)
            self._print_faults(ended, member)

    def _train_side_by_side(self, queue: Queue) -> None:
        """Train runs in workers on this machine, as many at a time as there are places."""
        jobs = self._choose_jobs(queue)
        first = next(jobs)
        if first is None:
            return
        number, logs = queue.count(), _name_logs(first.run)
        with (
            mps.share_gpus(first.run.mps, self.places, logs) as sharing,
            Workers(self.places, logs, sharing) as workers,
        ):
            say(f"{format_count(number, 'run')}, {min(number, len(self.places))} at once; what they print is in {logs}")
            self._take_each(workers.run(chain([first], jobs)), queue)

    def _train_elsewhere(self, queue: Queue) -> None:
        """Train runs through the launcher."""
        self._take_each(self._run_batches(self._choose_jobs(queue)), queue)

    def _run_batches(self, jobs: Iterator[Job | None]) -> Iterator[tuple[Job, Ended]]:
        """Give the launcher what can be trained now, and once all of it has ended, what can be trained then."""
        while batch := list(iter(jobs.__next__, None)):
            with start_executor(self.launcher, _name_logs(batch[0].run)) as executor:
                yield from executor.run(batch)

    def _choose_jobs(self, queue: Queue) -> Iterator[Job | None]:
        """Yield the run that is to be trained next, or None while there is none, without end.

        When there is none, the records of runs that are done are told what a search has chosen.
        """
        for number in count(1):
            while (member := queue.take()) is None:
                if queue.noting:
                    self._note(queue)
                else:
                    yield None
            self.given[number] = member
            yield self._make_job(number, member, wait=member in queue.awaited)

    def _make_job(self, number: int, member: Member, wait: bool) -> Job:
        """Return what a worker must know of a run."""
        words = _list_typed(member)
        if wait:
            say(f"\nwaiting for the other process: {' '.join(words)}")
        typed = index_by_key(words)
        settings = " ".join(f"{key}={typed[key]}" for key in self.keys if key in typed) or f"method={member.run.method}"
        return Job(number, words, settings, member.run, member.folder, wait, since=self.began)

    def _note(self, queue: Queue) -> None:
        """Write into the records of runs that are done what a search has chosen, or say why it cannot choose."""
        noting, queue.noting = queue.noting, []
        for member in noting:
            ended = train_attempt(member.run, _list_typed(member), display=hide_progress())
            queue.end(member, ended.busy)
            self._print_faults(ended, member)

    def _take_each(self, ending: Iterator[tuple[Job, Ended]], queue: Queue) -> None:
        """Print a line for each run that ends, with its number among those that are known to be trained by then."""
        number = 0
        for job, ended in ending:
            member = self.given.pop(job.number)
            queue.end(member, ended.busy)
            number += not ended.busy
            if self.display is None and not ended.busy:
                say(f"{number} of {number + queue.count()}: {job.settings}: {_describe_result(job)}")
            self._print_faults(ended, member)

    def _print_faults(self, ended: Ended, member: Member) -> None:
        """Print why a run failed, or that another process is at it."""
        if ended.faults and self.display is not None:  # elsewhere this line is printed before the run starts
            print_faults([" ".join(_list_typed(member))])
        print_faults(ended.faults)


def _list_typed(member: Member) -> list[str]:
    """Return what was typed for a run, without Hydra's own keys."""
    return [word for word in member.overrides if not word.startswith(("hydra.", "hydra/"))]


def _name_logs(run: Run) -> Path:
    """Return the folder for what the processes of a sweep print."""
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"  # two processes may start on a sweep in one second
    return expand_home(run.output_dir) / FOLDER / name


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


def _describe_result(job: Job) -> str:
    """How a run ended, by its record."""
    record = find_record(job.folder)
    if record is None:
        return "missing"
    took = format_duration(record.timings.get("total_s", 0.0))
    if record.status == "trained" and record.selection is not None and record.selection.value is not None:
        return f"{describe_selection(record.selection)}, {took}"
    if record.status != "done" or record.score is None:
        return record.outcome
    return f"{record.metric} {record.score:.2f}, {took}"
