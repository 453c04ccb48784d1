"""Train the runs of a sweep, one after the other or side by side. Torch is imported only with the first run."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from peftbench.config.launchers import HydraLauncher
from peftbench.config.schema import Run, index_by_key
from peftbench.records.choice import NoChoice, settle_search
from peftbench.records.noted import is_cleared, is_noted, is_over, lacks_selection
from peftbench.records.record import Record, find_record, get_time
from peftbench.records.run_files import has_leftovers
from peftbench.records.wording import describe_selection
from peftbench.sweeps import mps
from peftbench.sweeps.executors import start_executor
from peftbench.sweeps.jobs import Ended, Job, train_attempt
from peftbench.sweeps.live import LiveSweep
from peftbench.sweeps.plan import FOLDER, Member, Sweep
from peftbench.sweeps.superseded import mark_superseded
from peftbench.sweeps.workers import Workers
from peftbench.tables.columns import format_duration
from peftbench.utils.console import make_console, say
from peftbench.utils.differences import find_distinctive
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.files import expand_home
from peftbench.utils.progress import Display, hide_progress, is_live

INTERRUPTED = 130  # the exit code


class Sweeper:
    """Trains the runs of a sweep, those that another process is at last.

    Args:
        sweep: on a terminal it is shown as a table that grows; elsewhere each run prints its own lines.
        launcher: where runs are trained, see `config.launchers`; None: on this machine.
    """

    def __init__(self, sweep: Sweep, launcher: Any = None) -> None:
        self.sweep, self.launcher = sweep, launcher
        self.number = 0  # of the runs so far
        self.display: Display | None = None  # of the run that is trained, while the sweep is shown as a table
        self.put_off: list[Job] = []  # runs that another process is at
        self.workers: Workers | None = None  # once there is a run for them
        self.ended_with_it = ExitStack()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Show the sweep as a table during the block, if it is on a terminal, and end its workers after it.

        Runs of a launcher of Hydra's may print to the same terminal, so there is no table then.
        """
        console = make_console()
        with ExitStack() as stack:
            if is_live(console) and not isinstance(self.launcher, HydraLauncher):
                self.display = Display(console, within_another=True)
                stack.enter_context(LiveSweep(self.sweep, console, below=self.display.progress))
            stack.enter_context(self.ended_with_it)
            yield

    def train_phases(self, places: Sequence[dict[str, str]]) -> None:
        """Train the trials of the sweep's searches, then its own runs.

        While a search tries further values (`search.extend`), those of a round are trained together, and beside them
        the runs whose searches are settled.

        Args:
            places: of the runs that are trained at once on this machine, see `find_places`.
        """
        if self.sweep.trials:
            self._train_all(self.sweep.trials, places)
            self.sweep.settle()
        waiting, tried = self.sweep.members, set[Member]()
        while due := self._find_due(tried):
            ready = [member for member in waiting if self._is_ready(member, tried)]
            self._train_all([*due, *ready], places)
            waiting = [member for member in waiting if member not in ready]
            tried.update(due)
            self.sweep.settle()
        self._train_all(waiting, places)

    def _find_due(self, tried: Collection[Member]) -> list[Member]:
        """Return the trials of further values that are to be trained next.

        Where runs are trained anew, the records that call for later values are out of date.
        """
        found: dict[Member, None] = {}
        for member in self.sweep.members:
            new = [trial for trial in self.sweep.list_further(member) if trial not in tried]
            found |= dict.fromkeys(new[:1] if member.run.rerun else new)
        return list(found)

    def _is_ready(self, member: Member, tried: Collection[Member]) -> bool:
        """Return whether a run has its final values; a trial may have a record and yet be trained again."""
        return member.comes_to.search is None and all(trial in tried for trial in self.sweep.list_further(member))

    def _train_all(self, members: Sequence[Member], places: Sequence[dict[str, str]]) -> None:
        """Train runs, and wait for those that another process is at.

        Args:
            places: of the runs that are trained at once on this machine, see `find_places`.
        """
        mark_superseded(members, self.sweep.compared)
        jobs = _build_jobs(members, self.number)
        self.number += len(jobs)
        if self.launcher is not None:
            self._train_elsewhere(jobs)
        elif len(places) > 1:
            self._train_side_by_side(jobs, places)
        else:
            for job in jobs:
                if self.display is None:
                    say(f"\nrun {job.number}: {' '.join(job.overrides)}")
                self._train_one(job)
        while self.put_off:
            waiting, self.put_off = [replace(job, wait=True) for job in self.put_off], []
            if self.launcher is not None:
                self._train_elsewhere(waiting)
                continue
            for job in waiting:
                say(f"\nwaiting for the other process: {' '.join(job.overrides)}")
                self._train_one(job)

    def _train_one(self, job: Job) -> None:
        try:
            self._take(train_attempt(job.run, job.overrides, wait=job.wait, display=self.display), job)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None

    def _take(self, ended: Ended, job: Job) -> None:
        """Print why a run failed, and put off one that another process is at."""
        if ended.busy:
            self.put_off.append(job)
        if ended.faults and self.display is not None:  # elsewhere this line is printed before the run starts
            print_faults([" ".join(job.overrides)])
        print_faults(ended.faults)

    def _train_side_by_side(self, jobs: Sequence[Job], places: Sequence[dict[str, str]]) -> None:
        """Train runs in workers on this machine, which stay for the sweep's next runs.

        Args:
            places: of the workers, see `find_places`.
        """
        noting, waiting = self._sort_out(jobs)
        if not waiting:
            self._note(noting)
            return
        if self.workers is None:
            logs, mode = _name_logs(waiting[0].run), _get_mps([job.run for job in waiting])
            sharing = self.ended_with_it.enter_context(mps.share_gpus(mode, places, logs))
            self.workers = self.ended_with_it.enter_context(Workers(places, logs, sharing))
        number = self.workers.start(len(waiting))
        self._note(noting)  # while the workers import torch
        say(f"{len(waiting)} runs, {number} at once; what they print is in {self.workers.logs}")
        self._take_each(self.workers.run(waiting), len(waiting))

    def _train_elsewhere(self, jobs: Sequence[Job]) -> None:
        """Train runs through the launcher."""
        noting, waiting = self._sort_out(jobs)
        self._note(noting)
        if not waiting:
            return
        with start_executor(self.launcher, _name_logs(waiting[0].run)) as executor:
            self._take_each(executor.run(waiting), len(waiting))

    def _sort_out(self, jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
        """Return the jobs for which nothing must be computed, but their records do not say all, and those to train.

        The first are runs that are done, for which a search has chosen; and those for which a search cannot choose,
        because its trials failed.
        """
        noting: list[Job] = []
        waiting: list[Job] = []
        for job in jobs:
            try:
                _, search = settle_search(job.run, self.sweep.compared)
            except UserError as error:  # without a choice, the run is refused here
                (noting if isinstance(error, NoChoice) else waiting).append(job)
                continue
            record, is_trial = find_record(job.folder), search is not None and search.role == "trial"
            if record is None or job.run.rerun:
                waiting.append(job)
            elif not record.has_ended and is_over(job.run, record):  # a trial that is trained
                if not is_cleared(record):
                    waiting.append(job)
            elif not record.has_ended or has_leftovers(job.folder) or _lacks_scores(job.run, record, is_trial):
                waiting.append(job)
            elif not is_noted(record, search, is_trial):
                noting.append(job)
        return noting, waiting

    def _note(self, jobs: Sequence[Job]) -> None:
        """Write into the records of runs that are done what a search has chosen."""
        for job in jobs:
            self._take(train_attempt(job.run, job.overrides, wait=job.wait, display=hide_progress()), job)

    def _take_each(self, ending: Iterator[tuple[Job, Ended]], number: int) -> None:
        """Print a line for each run that ends."""
        for count, (job, ended) in enumerate(ending, start=1):
            if self.display is None:
                say(f"{count} of {number}: {job.settings}: {_describe_result(job)}")
            self._take(ended, job)


def _lacks_scores(run: Run, record: Record, is_trial: bool) -> bool:
    """Return whether anything must be computed for a run that has ended."""
    if lacks_selection(record, is_trial):
        return True
    if run.retention is None and not run.speed:
        return False
    from peftbench.evaluation.measures import lacks_measures  # imports torch

    return lacks_measures(run, record)


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


def _build_jobs(members: Sequence[Member], before: int) -> list[Job]:
    """What a worker must know of each run.

    Args:
        before: the number of runs of the sweep before these.
    """
    typed = [[word for word in one.overrides if not word.startswith(("hydra.", "hydra/"))] for one in members]
    given = [index_by_key(words) for words in typed]
    keys, began = find_distinctive(given), get_time()
    settings = [" ".join(f"{key}={value}" for key, value in values.items() if key in keys) for values in given]
    return [
        Job(number, words, told, one.run, one.folder, since=began)
        for number, (words, told, one) in enumerate(zip(typed, settings, members, strict=True), before + 1)
    ]


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
