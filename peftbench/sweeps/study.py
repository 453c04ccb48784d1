"""A study: runs that Optuna chooses one after another, by the selection scores of those before (`search.trials=N`).

Each trial is an ordinary run with a record, a trial of the search. The report split is looked at once, at the end, for
the trials that were chosen: those on the front of selection score and stored parameters, or with a budget the best one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.config.compose import TypedRun, compose_points
from peftbench.config.identity import hash_run
from peftbench.config.schema import Search, index_by_key
from peftbench.config.studies import GROUPS, TrialOf, list_space
from peftbench.records.choice import compute_objective, settle_trial
from peftbench.records.location import locate_run
from peftbench.records.lock import hold_run
from peftbench.records.record import Record, find_record, get_time
from peftbench.records.wording import format_value
from peftbench.sweeps import mps
from peftbench.sweeps.executors import InProcess, start_executor
from peftbench.sweeps.jobs import Ended, Executor, Job
from peftbench.sweeps.optuna_study import (
    list_by_state,
    make_distributions,
    make_sampler,
    note_attribute,
    open_study,
)
from peftbench.sweeps.plan import FOLDER, Plan, PlannedRun
from peftbench.sweeps.resolve import resolve_points
from peftbench.sweeps.workers import Workers
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.files import expand_home

PATIENCE = 300  # trials in a row that are refused or known: then the space has nothing new
PRUNED = "pruned"
WORDS, RUN_FOLDER, REASON = "words", "folder", "reason"  # attributes of a trial


class Study:
    """A study of one point of the command line.

    Args:
        point: the run that is varied, with what was typed.
        arguments: the whole command line, for `peftbench status`.
    """

    def __init__(self, point: TypedRun, arguments: Sequence[str], config_dir: str | None = None) -> None:
        self.overrides, self.run = point
        assert self.run.search is not None
        self.search: Search = self.run.search
        self.arguments, self.config_dir = list(arguments), config_dir
        self.space = list_space(self.run, self.search, self.overrides)
        self.objectives = 1 if self.run.budget is not None else 2
        self.root = expand_home(self.run.output_dir)
        self.name = self._name()
        self.file = self.root / FOLDER / f"{self.name}.study.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.study = open_study(self.file, self.name, self.objectives)
        self.began = get_time()

    def _name(self) -> str:
        """Return a hash of all on which the trials' scores and the choice of the next one depend."""
        plain = replace(self.run, search=None)
        parts = [hash_run(plain), self.run.budget, self.space, self.search.sampler.name, self.search.sampler_seed]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]

    def choose_jobs(self) -> Iterator[Job]:
        """Yield the runs of trials that a killed process has left or whose record is lost, and then new ones, until
        there are enough.

        Trials that are refused, or come to a run that the study has, cost no training and are not counted.
        """
        for trial in list_by_state(self.study, "RUNNING"):
            if WORDS in trial.user_attrs:
                job = self._make_job(trial.number, self._compose(trial.user_attrs[WORDS]))
                note_attribute(self.study, trial, RUN_FOLDER, str(job.folder))  # if the process died before it did so
                yield job
            else:  # the process died while it chose
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        for trial in list_by_state(self.study, "COMPLETE"):
            if find_record(Path(trial.user_attrs.get(RUN_FOLDER, "."))) is None and WORDS in trial.user_attrs:
                yield self._make_job(trial.number, self._compose(trial.user_attrs[WORDS]))
        while len(self._list_folders()) < (self.search.trials or 0):
            decided, in_vain = self._count_decided()
            if in_vain >= PATIENCE:
                return
            self.study.sampler = make_sampler(self.search, decided, in_vain)
            if (chosen := self._choose()) is not None:
                yield chosen

    def _count_decided(self) -> tuple[int, int]:
        """Return how many trials there are, and how many of the last ones were refused or known.

        Trials of a process that died while it chose do not count: the next one is then the same as if it had not.
        """
        trials = self.study.get_trials(deepcopy=False)
        refused = [REASON in trial.user_attrs for trial in trials if trial.user_attrs.keys() & {WORDS, REASON}]
        return len(refused), next((count for count, one in enumerate(reversed(refused)) if not one), len(refused))

    def _choose(self) -> Job | None:
        """Ask for a trial; return its job, or None if there is nothing to train."""
        trial = self.study.ask(make_distributions(self.run, self.space))
        chosen = {key: str(value) for key, value in trial.params.items()}
        if chosen.get("mix") == "[]":  # the modification is not there
            chosen = {key: value for key, value in chosen.items() if not key.startswith("mix.")}
        kept = [word for word in self.overrides if not set(index_by_key([word])) & set(chosen)]
        words = [*kept, *(f"{key}={value}" for key, value in chosen.items()), f"search.trial={trial.number}"]
        try:
            point = self._compose(words)
        except UserError as error:
            trial.set_user_attr(REASON, " ".join(error.faults))
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        folder = str(locate_run(settle_trial(point[1], self.search)[0]))
        for earlier in list_by_state(self.study, "COMPLETE", "PRUNED", "RUNNING", "FAIL"):
            if earlier.user_attrs.get(RUN_FOLDER) == folder and earlier.number != trial.number:
                trial.set_user_attr(REASON, f"the run of trial {earlier.number}")
                # Told as done, it would count twice, and the sampler would come back to it again and again.
                self.study.tell(trial, state=TrialState.FAIL)
                return None
        trial.set_user_attr(WORDS, words)  # with which another process goes on, if this one dies
        trial.set_user_attr(RUN_FOLDER, folder)
        job = self._make_job(trial.number, point)
        self.save_plan()
        return job

    def _compose(self, words: list[str]) -> TypedRun:
        (point,) = resolve_points(compose_points(words, config_dir=self.config_dir))
        return point

    def _make_job(self, number: int, point: TypedRun) -> Job:
        overrides, run = point
        assert run.search is not None
        run = replace(run, search=replace(run.search, keys={key: run.search.keys[key] for key in self.space}))
        final, searched = settle_trial(run, run.search or self.search)
        judged = self.search.prune and self.objectives == 1
        return Job(
            number + 1,
            overrides,
            " ".join(f"{key}={format_value(value)}" for key, value in searched.chosen.items()),
            run,
            locate_run(final),
            wait=True,
            trial=TrialOf(str(self.file.resolve()), self.name, number) if judged else None,
            since=self.began,
        )

    def note(self, job: Job, ended: Ended) -> str:
        """Tell the study how a trial ended; return that in words. Of the record, only the selection score is read."""
        number = job.number - 1
        if ended.pruned or self.study.get_trials(deepcopy=False)[number].state is TrialState.PRUNED:
            return PRUNED
        record = find_record(job.folder)
        if record is None or record.status in ("interrupted", "running"):
            return "unfinished"  # as on a full disk: the same line goes on with it
        if record.status != "done" or record.selection is None or record.selection.value is None:
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            return record.outcome
        assert record.counts is not None
        values = [compute_objective(record.selection), float(record.counts.stored)][: self.objectives]
        self.study.tell(number, values, skip_if_finished=True)
        selection = record.selection
        return f"{selection.metric} on {selection.split} {selection.value:.2f}, {record.counts.stored:,} stored"

    def list_front(self) -> list[FrozenTrial]:
        """Return the trials that no other one is better than, the best score first; each run once."""
        if not list_by_state(self.study, "COMPLETE"):
            return []
        best = [self.study.best_trial] if self.objectives == 1 else self.study.best_trials
        unique = {str(trial.user_attrs[RUN_FOLDER]): trial for trial in best if RUN_FOLDER in trial.user_attrs}
        return sorted(unique.values(), key=lambda trial: -trial.values[0])

    def mark_front(self) -> list[Record]:
        """Write into the records whether they are on the front; return those that are, in its order.

        Trials that are not appear in tables only with `trials=true`.
        """
        front = [str(trial.user_attrs[RUN_FOLDER]) for trial in self.list_front()]
        for folder in self._list_folders():
            record = find_record(Path(folder))
            if record is None or record.search is None:
                continue
            role, splits = "final" if folder in front else "trial", record.data.get("splits", {})
            if record.status == "done" and record.search.role != role:
                with hold_run(record.folder, wait=True):
                    record.search.role = "final" if folder in front else "trial"
                    record.search.selection = record.selection if folder in front else None
                    record.search.reported = splits.get("selection") == splits.get("report")
                    record.save()
        found = [find_record(Path(folder)) for folder in front]
        return [record for record in found if record is not None]

    def save_plan(self) -> None:
        """Write what `peftbench status` reads: the trials so far."""
        runs = []
        for trial in self.study.get_trials(deepcopy=False):
            if RUN_FOLDER in trial.user_attrs:
                folder = Path(trial.user_attrs[RUN_FOLDER])
                within = folder.relative_to(self.root) if folder.is_relative_to(self.root) else folder.resolve()
                given = {key: format_value(value) for key, value in trial.params.items()}
                runs.append(PlannedRun(str(within), self.run.method, given))
        Plan(self.arguments, runs, self.name).save(self.root)

    def _list_folders(self) -> list[str]:
        """Return the folders of the runs that the study has, in the order of its trials."""
        trials = self.study.get_trials(deepcopy=False)
        return list(dict.fromkeys(t.user_attrs[RUN_FOLDER] for t in trials if RUN_FOLDER in t.user_attrs))

    def count(self) -> Counter[str]:
        """Return how many trials there are of each kind, and how many suggestions cost nothing."""
        found: Counter[str] = Counter()
        for trial in self.study.get_trials(deepcopy=False):
            kind = {"COMPLETE": "done", "PRUNED": "pruned", "RUNNING": "unfinished", "FAIL": "failed"}[trial.state.name]
            folder = trial.user_attrs.get(RUN_FOLDER)
            if kind == "done" and folder is not None and find_record(Path(folder)) is None:
                kind = "unfinished"  # its record is lost, and could not be written again
            found["refused or known" if folder is None else kind] += 1
        return found


def train_study(
    point: TypedRun,
    arguments: Sequence[str],
    config_dir: str | None,
    places: Sequence[dict[str, str]],
    launcher: Any = None,
) -> int:
    """Train the trials of a study, and show the front.

    Args:
        places: of the runs that are trained at once on this machine, see `find_places`.
        launcher: where runs are trained otherwise.

    Returns:
        The exit code: 0, or 1 if trials failed or are unfinished.
    """
    study = Study(point, arguments, config_dir)
    with ExitStack() as stack:
        logs = study.file.parent / f"{study.name}.logs"
        executor: Executor = InProcess()
        if launcher is not None:
            executor = stack.enter_context(start_executor(launcher, logs))
        elif len(places) > 1:
            shared = stack.enter_context(mps.share_gpus(study.run.mps, places, logs))
            executor = stack.enter_context(Workers(shared, logs))
            say(f"{len(places)} trials at once; what they print is in {logs}")
        wanted = study.search.trials
        for job, ended in executor.run(study.choose_jobs()):
            said = study.note(job, ended)
            say(f"{len(study._list_folders())} of {wanted}: {job.settings}: {said}")
            print_faults([] if said == PRUNED else ended.faults)  # Slurm's tasks return nothing
    counted = study.count()
    show_front(study, counted, make_console())
    return 1 if counted["failed"] or counted["unfinished"] else 0


def show_front(study: Study, counted: Counter[str], console: Console) -> None:
    """Print the trials on the front with their scores on the selection split and, now, on the report split."""
    study.save_plan()
    records = study.mark_front()
    if records:
        console.print()
        console.print(_make_table(records, [key for key in study.space if key not in (*GROUPS, "bottleneck")]))
        if records[0].search is not None and records[0].search.reported:
            console.print("The selection split is also the one that is reported on: these scores are too good.")
    kinds = ("done", "pruned", "failed", "unfinished", "refused or known")
    counts = ", ".join(f"{counted[kind]} {kind}" for kind in kinds if counted[kind])
    what = "best under the budget" if study.objectives == 1 else "front of selection score and stored parameters"
    console.print(f"\nsearch={study.search.name}: {counts}; the {what} is {len(records)} of them.", highlight=False)


def _make_table(records: Sequence[Record], keys: Sequence[str]) -> Table:
    """Return the table of the trials that were chosen.

    Args:
        keys: of the space, without the axes and the bottleneck.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    selection = records[0].selection
    table.add_column("run", no_wrap=True)
    table.add_column("four axes", overflow="fold", min_width=16)
    scores = [
        f"{selection.metric}\n{selection.split}" if selection is not None else "",
        f"{records[0].metric}\nreported",
    ]
    for name in ("bottle-\nneck", *(key.rpartition(".")[2].replace("_", "\n") for key in keys), "stored", *scores):
        table.add_column(name, justify="right", overflow="fold")
    for record in records:
        axes = "\n".join(
            " · ".join((one.functional_form, one.modified_representation, one.insertion_form, one.composition))
            for one in record.axes
        )
        sizes = "\n".join("" if one.bottleneck is None else f"{one.bottleneck}" for one in record.axes)
        given = {} if record.search is None else record.search.chosen
        chosen = [format_value(given[key]) if key in given else "" for key in keys]
        value = None if record.selection is None else record.selection.value
        found = ["" if score is None else f"{score:.2f}" for score in (value, record.score)]
        stored = "" if record.counts is None else f"{record.counts.stored:,}"
        table.add_row(record.run, axes, sizes, *chosen, stored, *found)
    return table
