"""A study from its first trial to its table.

The report split is looked at once, at the end, for the trials that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from peftbench.config.compose import TypedRun
from peftbench.records.record import find_finished, find_record
from peftbench.sweeps import mps
from peftbench.sweeps.executors import InProcess, start_executor
from peftbench.sweeps.jobs import Executor, Job
from peftbench.sweeps.left import lacks_scores
from peftbench.sweeps.study import Study
from peftbench.sweeps.study_front import list_chosen, mark_front
from peftbench.sweeps.study_table import show_front
from peftbench.sweeps.study_trials import PRUNED, choose_trials, note_ended
from peftbench.sweeps.workers import Workers
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import print_faults


def train_study(
    point: TypedRun,
    arguments: Sequence[str],
    config_dir: str | None,
    places: Sequence[dict[str, str]],
    launcher: Any = None,
    seeds: Sequence[int] = (),
) -> int:
    """Train the trials of a study, score those on the front, train these with the other seeds, and show the front.

    Args:
        places: of the runs that are trained at once on this machine, see `find_places`.
        launcher: where runs are trained otherwise.
        seeds: of the command line.

    Returns:
        The exit code: 0, or 1 if trials failed or are unfinished.
    """
    study = Study(point, arguments, config_dir, seeds)
    if study.run.rerun and study.count_runs(ended=True):
        say(f"rerun=true does not train again what the study has; delete {study.file}, and it begins anew.")
    with ExitStack() as stack:
        logs = study.file.parent / f"{study.name}.logs"
        executor: Executor = InProcess()
        if launcher is not None:
            executor = stack.enter_context(start_executor(launcher, logs))
        elif len(places) > 1:
            sharing = stack.enter_context(mps.share_gpus(study.run.mps, places, logs))
            executor = stack.enter_context(Workers(places, logs, sharing))
            say(f"{len(places)} trials at once; what they print is in {logs}")
        wanted = study.search.trials
        for job, ended in executor.run(choose_trials(study)):
            said = note_ended(study, job, ended)
            say(f"{study.count_runs(ended=True)} of {wanted}: {job.settings}: {said}")
            print_faults([] if said == PRUNED else ended.faults)  # Slurm's tasks return nothing
        counted = study.count()
        # Of a study that goes on later another point may be the best.
        chosen = [] if counted["unfinished"] else list_chosen(study)
        waiting = [job for job in chosen if _is_waiting(job)]
        for count, (job, ended) in enumerate(executor.run(waiting) if waiting else (), start=1):
            record = find_record(job.folder)
            outcome = "missing" if record is None else record.outcome
            say(f"{count} of {len(waiting)} chosen: {job.settings}: {outcome}")
            print_faults(ended.faults)
    if counted["unfinished"]:
        study.save_plan()
    show_front(study, mark_front(study), counted, make_console())
    missing = any(find_finished(job.folder) is None for job in chosen)
    return 1 if counted["failed"] or counted["unfinished"] or missing else 0


def _is_waiting(job: Job) -> bool:
    """Return whether anything must be computed for the run of a chosen point."""
    record = find_finished(job.folder)
    return record is None or job.run.rerun or lacks_scores(job.run, record)
