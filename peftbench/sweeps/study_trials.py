"""The trials of a study: Optuna is asked for the next one, and told how it ended.

Each trial is an ordinary run with a record, a trial of the search. Of the record only the selection score is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from optuna.trial import TrialState

from peftbench.config.schema import Reported
from peftbench.records.choice import compute_objective, settle_trial
from peftbench.records.location import locate_run
from peftbench.records.lock import hold_run
from peftbench.records.record import find_finished, find_record
from peftbench.records.wording import describe_selection
from peftbench.sweeps.jobs import Ended, Job
from peftbench.sweeps.optuna_study import (
    list_by_state,
    make_distributions,
    make_sampler,
    note_attribute,
    repeat_trial,
    tell_diverged,
)
from peftbench.sweeps.plan import relate_path
from peftbench.sweeps.study import REASON, RUN_FOLDER, WORDS, Study
from peftbench.utils.errors import UserError

PATIENCE = 300  # trials in a row that are refused or known: then the space has nothing new
PRUNED = "pruned"


def choose_trials(study: Study) -> Iterator[Job]:
    """Yield the runs of trials that a killed process has left, whose record is lost, or whose report split is yet to be
    scored, with `retry=true` those that have failed, and then new ones, until there are enough or their time is up.

    Trials that are refused, or come to a run that the study has, cost no training and are not counted.
    """
    # Listed before any is trained: what fails now is not tried again at once.
    failed = [trial for trial in study.list_trials() if study.run.retry and study.find_kind(trial) == "failed"]
    for trial in list_by_state(study.optuna, "RUNNING"):
        if WORDS in trial.user_attrs:
            job = study.make_job(trial.number, study.compose(trial.user_attrs[WORDS]))
            # The process may have died before it did so.
            note_attribute(study.optuna, trial, RUN_FOLDER, relate_path(study.root, job.folder))
            yield job
        else:  # the process died while it chose
            study.optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    find_ended = find_finished if study.search.report is Reported.trials else find_record
    for trial in list_by_state(study.optuna, "COMPLETE"):
        if find_ended(study.locate(trial)) is None and WORDS in trial.user_attrs:
            yield study.make_job(trial.number, study.compose(trial.user_attrs[WORDS]))
    for trial in failed:
        if not study.is_time_up and trial in study.list_trials():  # no other process has begun it
            again = repeat_trial(study.optuna, trial)
            yield study.make_job(again.number, study.compose(trial.user_attrs[WORDS]))
    while study.count_runs() < (study.search.trials or 0) and not study.is_time_up:
        decided, in_vain = _count_decided(study)
        if in_vain >= PATIENCE:
            return
        study.optuna.sampler = make_sampler(study.search, study.optuna, decided, in_vain)
        if (chosen := _choose(study)) is not None:
            yield chosen


def _count_decided(study: Study) -> tuple[int, int]:
    """Return how many trials there are, and how many of the last ones were refused or known.

    Trials of a process that died while it chose do not count, nor do second attempts: the next one is then the same as
    if it had not, or as if nothing had failed.
    """
    refused = [REASON in trial.user_attrs for trial in study.list_trials() if trial.user_attrs.keys() & {WORDS, REASON}]
    return len(refused), next((count for count, one in enumerate(reversed(refused)) if not one), len(refused))


def _choose(study: Study) -> Job | None:
    """Ask for a trial; return its job, or None if there is nothing to train."""
    trial = study.optuna.ask(make_distributions(study.run, study.space))
    chosen = {key: str(value) for key, value in trial.params.items()}
    if chosen.get("mix") == "[]":  # the modification is not there
        chosen = {key: value for key, value in chosen.items() if not key.startswith("mix.")}
    words = [*(f"{key}={value}" for key, value in chosen.items()), f"search.trial={trial.number}"]
    try:
        point = study.compose(words)
    except UserError as error:
        trial.set_user_attr(REASON, " ".join(error.faults))
        study.optuna.tell(trial, state=TrialState.FAIL)
        return None
    folder = relate_path(study.root, locate_run(settle_trial(point[1], study.search)[0]))
    for earlier in list_by_state(study.optuna, "COMPLETE", "PRUNED", "RUNNING", "FAIL"):
        if RUN_FOLDER in earlier.user_attrs and study.locate(earlier) == study.root / folder:
            trial.set_user_attr(REASON, f"the run of trial {earlier.number}")
            # Told as done, it would count twice, and the sampler would come back to it again and again.
            study.optuna.tell(trial, state=TrialState.FAIL)
            return None
    trial.set_user_attr(WORDS, words)  # with which another process goes on, if this one dies
    trial.set_user_attr(RUN_FOLDER, folder)
    job = study.make_job(trial.number, point)
    study.save_plan()
    return job


def note_ended(study: Study, job: Job, ended: Ended) -> str:
    """Tell the study how a trial ended; return that in words."""
    number, record = job.number - 1, find_record(job.folder)
    if record is not None and record.status == "diverged" and record.compared is None:
        tell_diverged(study.optuna, number)
        return record.outcome
    if ended.pruned or study.optuna.get_trials(deepcopy=False)[number].state is TrialState.PRUNED:
        _note_pruned(job.folder)
        return PRUNED
    selection = None if record is None else record.compared
    if record is None or (selection is None and record.status in ("interrupted", "running")):
        return "unfinished"  # as on a full disk: the same line goes on with it
    if selection is None or selection.value is None:
        study.optuna.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        return record.outcome
    assert record.counts is not None
    values = [compute_objective(selection), float(record.counts.stored)][: study.objectives]
    study.optuna.tell(number, values, skip_if_finished=True)
    return f"{describe_selection(selection)}, {record.counts.stored:,} stored"


def _note_pruned(folder: Path) -> None:
    """Write into the record of a trial that it was given up, and not merely stopped."""
    with hold_run(folder, wait=True):
        record = find_record(folder)
        if record is not None and record.search is not None and not record.search.pruned:
            record.search.pruned = True
            record.save()
