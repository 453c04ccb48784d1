"""The front of a study: the trials that were chosen, those on the front of selection score and stored parameters, or
with a budget the best one. Their records are marked.

What they have chosen is trained again with the other seeds of the command line, which no choice depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from optuna.trial import FrozenTrial

from peftbench.records.choice import settle_trial
from peftbench.records.lock import hold_run
from peftbench.records.record import Record, Searched, find_record
from peftbench.records.run_files import clear_leftovers, has_leftovers
from peftbench.sweeps.jobs import Job
from peftbench.sweeps.optuna_study import list_by_state
from peftbench.sweeps.plan import relate_path
from peftbench.sweeps.study import CONFIRMED, RUN_FOLDER, WORDS, Study


def list_front(study: Study) -> list[FrozenTrial]:
    """Return the trials that no other one is better than, the best score first; each run once."""
    if not list_by_state(study.optuna, "COMPLETE"):
        return []
    best = [study.optuna.best_trial] if study.objectives == 1 else study.optuna.best_trials
    unique = {study.locate(trial): trial for trial in best if RUN_FOLDER in trial.user_attrs}
    return sorted(unique.values(), key=lambda trial: -trial.values[0])


def list_chosen(study: Study) -> list[Job]:
    """Return the runs of the points on the front: the trials, whose report split is to be scored, and those with the
    other seeds, which the journal then names."""
    found, front = [], list_front(study)
    for trial in front:
        words = trial.user_attrs[WORDS]
        found.append(study.make_job(trial.number, study.compose(words), chosen=True))
        jobs = [study.make_job(trial.number, study.compose(words, *_give_seed(study, seed))) for seed in study.seeds]
        _note_confirmations(study, trial, jobs)
        found += jobs
    study.save_plan(chosen=[trial.number for trial in front])
    return found


def _give_seed(study: Study, seed: int) -> list[str]:
    """Return the words that give a trial's point a seed."""
    return [] if seed == study.run.seed else [f"search.seed={study.run.seed}", f"seed={seed}"]


def _note_confirmations(study: Study, trial: FrozenTrial, jobs: Sequence[Job]) -> None:
    known = [relate_path(study.root, folder) for folder in study.locate_confirmations(trial)]
    folders = [relate_path(study.root, job.folder) for job in jobs]
    if new := [folder for folder in folders if folder not in known]:
        study.optuna.set_user_attr(f"{CONFIRMED} {trial.number}", [*known, *new])


def list_confirmed(study: Study, trial: FrozenTrial) -> list[Record]:
    """Return the records of the runs that a trial's point has with the other seeds of the command line."""
    found = [find_record(folder) for folder in study.locate_confirmations(trial)]
    return [record for record in found if record is not None and record.seed in study.seeds]


def mark_front(study: Study) -> list[Record]:
    """Write into the records whether they are on the front; return those that are, in its order.

    Trials that are not appear in tables only with `trials=true`; so do runs with other seeds of points that were on
    the front before there were further trials. A run that another search has, or that was trained by itself, stays
    what it is there; its record names this study too.
    """
    front = [trial.number for trial in list_front(study)]
    for trial in study.list_trials():
        chosen = trial.number in front
        _note_study(study, trial)
        for folder in [study.locate(trial), *study.locate_confirmations(trial)]:
            record = find_record(folder)
            trained = record is not None and record.status == "trained"
            if record is not None and (record.has_ended or trained) and has_leftovers(folder, trained):
                with hold_run(folder, wait=True):
                    clear_leftovers(folder, trained)
            if record is None or not record.has_ended or record.search is None:
                continue
            if record.search.role == "trial" and chosen:
                _mark(study, record, trial, "final")
            elif record.search.role == "final" and not chosen and _has(study, record.search):
                _mark(study, record, trial, "trial")
    found = [find_record(study.locate(trial)) for trial in list_front(study)]
    return [record for record in found if record is not None]


def _note_study(study: Study, trial: FrozenTrial) -> None:
    """Write the study's name into the record of a trial that another search has, or that was trained by itself."""
    record = find_record(study.locate(trial))
    if record is None or study.name in record.studies or (record.search is not None and _has(study, record.search)):
        return
    with hold_run(record.folder, wait=True):
        if (record := find_record(record.folder)) is not None:
            record.studies.append(study.name)
            record.save()


def _has(study: Study, search: Searched) -> bool:
    """Return whether a record's search is this study; earlier versions did not name it."""
    return search.name == study.search.name and search.study in (study.name, None)


def _mark(study: Study, record: Record, trial: FrozenTrial, role: Literal["trial", "final"]) -> None:
    """Write the role of a run in this study into its record. A trial of another search becomes one of this."""
    if record.search is None or not _has(study, record.search):
        words = trial.user_attrs[WORDS]
        job = study.make_job(trial.number, study.compose(words, *_give_seed(study, record.seed)))
        _, record.search = settle_trial(job.run, job.run.search or study.search)
    splits, confirms = record.data.get("splits", {}), record.seed != record.search.seed
    with hold_run(record.folder, wait=True):
        record.search.role = role
        if not confirms:  # a run with another seed has what the trial has
            record.search.selection = record.selection if role == "final" else None
        record.search.reported = splits.get("selection") == splits.get("report")
        record.save()
