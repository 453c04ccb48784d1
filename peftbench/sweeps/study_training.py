"""Studies from their first trial to their tables.

The report split is looked at once, at the end, for the trials that were chosen.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from peftbench.config.compose import TypedRun
from peftbench.config.schema import index_by_key
from peftbench.records.record import find_finished, find_record
from peftbench.sweeps import mps
from peftbench.sweeps.executors import InProcess, start_executor
from peftbench.sweeps.jobs import Ended, Executor, Job
from peftbench.sweeps.left import lacks_scores
from peftbench.sweeps.study import Study
from peftbench.sweeps.study_front import list_chosen, mark_front
from peftbench.sweeps.study_table import show_front
from peftbench.sweeps.study_trials import PRUNED, choose_trials, note_ended
from peftbench.sweeps.workers import Workers
from peftbench.utils.console import make_console, say
from peftbench.utils.differences import find_distinctive
from peftbench.utils.errors import print_faults

T = TypeVar("T")


def train_studies(
    points: Sequence[tuple[TypedRun, Sequence[int]]],
    arguments: Sequence[str],
    config_dir: str | None,
    places: Sequence[dict[str, str]],
    launcher: Any = None,
) -> int:
    """Train the trials of studies, score those on each front, train these with the other seeds, and show the fronts.

    Studies are trained side by side and take turns, so that the end of one leaves no place idle. Where one run is
    trained after the other, so are the studies.

    Args:
        points: the run that each study varies, and the seeds of the command line.
        places: of the runs that are trained at once on this machine, see `find_places`.
        launcher: where runs are trained otherwise.

    Returns:
        The exit code: 0, or 1 if trials failed or are unfinished.
    """
    labelled = list(zip(points, _label_points([point for point, _ in points]), strict=True))
    together = [labelled] if launcher is not None or len(places) > 1 else [[one] for one in labelled]
    codes = []
    for some in together:
        studies = [_StudyAtWork(Study(point, arguments, config_dir, seeds), label) for (point, seeds), label in some]
        with _start_executor(studies[0].study, places, launcher) as executor:
            for job, ended in executor.run(take_turns(one.choose_jobs() for one in studies)):
                next(one for one in studies if id(job) in one.jobs).note_ended(job, ended)
        codes += [one.show() for one in studies]
    return max(codes)


class _StudyAtWork:
    """A study that is being trained.

    Args:
        label: what tells it from the others.
    """

    def __init__(self, study: Study, label: str) -> None:
        self.study, self.label = study, label
        self.jobs: set[int] = set()  # at work, by their identity: two studies may have the same run
        self.counted = Counter[str]()
        self.chosen: list[Job] = []
        self.waiting: list[Job] = []  # those of them for which anything must be computed
        self.ended = 0  # of these
        if study.run.rerun and study.count_runs(ended=True):
            say(f"rerun=true does not train again what the study has; delete {study.file}, and it begins anew.")

    def choose_jobs(self) -> Iterator[Job | None]:
        """Yield the trials, None while the last ones are at work, and then the runs of the points that were chosen."""
        yield from self._give_out(choose_trials(self.study))
        while self.jobs:
            yield None
        self.counted = self.study.count()
        # Of a study that goes on later another point may be the best.
        self.chosen = [] if self.counted["unfinished"] else list_chosen(self.study)
        self.waiting = [job for job in self.chosen if _is_waiting(job)]
        yield from self._give_out(self.waiting)

    def _give_out(self, jobs: Iterable[Job]) -> Iterator[Job]:
        for job in jobs:
            self.jobs.add(id(job))
            yield job

    def note_ended(self, job: Job, ended: Ended) -> None:
        """Print how a job ended, and tell the study if it was a trial."""
        self.jobs.remove(id(job))
        if self.waiting:  # all trials have ended
            self.ended += 1
            record = find_record(job.folder)
            said = "missing" if record is None else record.outcome
            count = f"{self.ended} of {len(self.waiting)} chosen"
        else:
            said = note_ended(self.study, job, ended)
            count = f"{self.study.count_runs(ended=True)} of {self.study.search.trials}"
        which = f"{self.label}, " if self.label else ""
        say(f"{which}{count}: {job.settings}: {said}")
        print_faults([] if said == PRUNED else ended.faults)  # Slurm's tasks return nothing

    def show(self) -> int:
        """Mark and show the front; return the exit code."""
        if self.counted["unfinished"]:
            self.study.save_plan()
        if self.label:
            say(f"\n{self.label}")
        show_front(self.study, mark_front(self.study), self.counted, make_console())
        missing = any(find_finished(job.folder) is None for job in self.chosen)
        return 1 if self.counted["failed"] or self.counted["unfinished"] or missing else 0


def take_turns(streams: Iterable[Iterator[T | None]]) -> Iterator[T | None]:
    """Yield something of each stream in turn, until all have ended; None where those that are left have nothing now."""
    turns = deque(streams)
    while turns:
        found = None
        for _ in range(len(turns)):
            stream = turns.popleft()
            with suppress(StopIteration):
                found = next(stream)
                turns.append(stream)
            if found is not None:
                break
        if found is not None or turns:
            yield found


@contextmanager
def _start_executor(study: Study, places: Sequence[dict[str, str]], launcher: Any) -> Iterator[Executor]:
    """Provide what trains the runs of studies, of which this is the first."""
    logs = study.file.parent / f"{study.name}.logs"
    if launcher is not None:
        with start_executor(launcher, logs) as executor:
            yield executor
    elif len(places) > 1:
        with mps.share_gpus(study.run.mps, places, logs) as sharing, Workers(places, logs, sharing) as workers:
            say(f"{len(places)} trials at once; what they print is in {logs}")
            yield workers
    else:
        yield InProcess()


def _label_points(points: Sequence[TypedRun]) -> list[str]:
    """Return what tells each study from the others: the words that were typed for it alone, if there are any."""
    typed = [index_by_key(words) for words, _ in points]
    keys = find_distinctive(typed)
    return [" ".join(f"{key}={one[key]}" for key in keys if key in one) for one in typed]


def _is_waiting(job: Job) -> bool:
    """Return whether anything must be computed for the run of a chosen point."""
    record = find_finished(job.folder)
    return record is None or job.run.rerun or lacks_scores(job.run, record)
