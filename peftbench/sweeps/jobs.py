"""A run of a sweep as it is handed to the process that trains it, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from peftbench.config.schema import Run
from peftbench.config.search import is_unreported
from peftbench.config.studies import TrialOf
from peftbench.records.choice import compute_objective, describe_given, settle_search
from peftbench.records.lock import Busy
from peftbench.records.record import find_record
from peftbench.tables.terminal import show_ended
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import LostProcess, UserError, describe_os_error
from peftbench.utils.progress import Display
from peftbench.utils.quick_imports import speed_up_imports


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int  # from 1 on
    overrides: list[str]  # what was typed
    settings: str  # those of them in which the sweep's runs differ
    run: Run
    folder: Path  # the run's
    wait: bool = False  # for another process that is at it
    trial: TrialOf | None = None  # of a study
    since: str = ""  # when the sweep began, ISO 8601 in UTC


@dataclass(frozen=True)
class Ended:
    """How a run of a sweep ended. Its record has everything else."""

    objective: float = -math.inf  # for a sweeper, see records/choice.py
    given: str = ""  # the sentence that says so to the user
    faults: tuple[str, ...] = ()  # sentences for the user; none where the run is done
    busy: bool = False  # another process is at it
    pruned: bool = False  # the search gave it up
    last: bool = False  # the worker has lost its GPU and can train no other


class Executor(Protocol):
    """Trains the runs of a sweep somewhere: in worker processes, through a launcher of Hydra, on a cluster."""

    def run(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, Ended]]:
        """Train the jobs; yield each with how it ended, in the order in which they end.

        None among them stands for no job now: what is free asks again when the next run has ended.
        """
        ...


def take_ready(jobs: Iterator[Job | None], most: int | None) -> Iterator[Job]:
    """Yield the next jobs, not more than `most`, up to where there is none now."""
    for job in islice(jobs, most):
        if job is None:
            return
        yield job


def train_job(job: Job) -> Ended:
    """Train a job on a machine of a cluster, where it may be started again after it was stopped.

    Returns at once, without torch, if the run is done. `rerun=true` trains again only what began before the sweep.
    """
    run, record = job.run, find_record(job.folder)
    if run.rerun and record is not None and record.created >= job.since:
        run = replace(run, rerun=False)
    if record is not None and record.has_ended and run.search is None and not run.rerun:
        say(f"{job.folder} is done already.")
        return Ended()
    return train_attempt(run, job.overrides, wait=job.wait, trial=job.trial)


def train_attempt(
    run: Run,
    overrides: Sequence[str],
    *,
    wait: bool = False,
    display: Display | None = None,
    selecting: bool = False,
    trial: TrialOf | None = None,
) -> Ended:
    """Train one run of a sweep. Why it failed is returned, not raised, so that the next one can start.

    Args:
        run: with its sizes resolved; its search is settled here, when its trials are done.
        wait: if another process is at this run, wait until it has ended.
        display: where the run is shown; None: it prints lines of its own.
        selecting: as for `train`.
        trial: of the study that may prune the run.
    """
    with speed_up_imports():
        from peftbench.train import train
        from peftbench.training.looks import Pruned, judge_looks
    judged = None
    if trial is not None:
        from peftbench.sweeps.optuna_study import JudgedTrial  # imports optuna

        judged = JudgedTrial(trial)

    display = display or Display(make_console())
    try:
        final, search = settle_search(run)
        with nullcontext() if judged is None else judge_looks(judged.judge):
            record = train(
                final,
                overrides,
                search=search,
                display=display,
                keep_failed=True,
                wait=wait,
                selecting=selecting,
                reporting=not is_unreported(run),
            )
        show_ended(record, display.console)
        return Ended(compute_objective(record.selection), describe_given(record) if selecting else "")
    except Pruned:
        if judged is not None:
            judged.prune()
        return Ended(pruned=True)
    except Busy as error:
        return Ended(faults=tuple(error.faults), busy=True)
    except UserError as error:
        return Ended(faults=tuple(error.faults))
    except LostProcess as error:
        return Ended(faults=(str(error),))
    except OSError as error:
        sentence = describe_os_error(error)
        return Ended(faults=(sentence or f"this run failed with {type(error).__name__}: {error}",))
    except Exception as error:
        return Ended(faults=(f"this run failed with {type(error).__name__}: {error}",))
