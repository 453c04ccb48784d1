"""A study: runs that Optuna chooses one after another, by the selection scores of those before (`search.trials=N`).

Each trial is an ordinary run with a record, a trial of the search. The report split is looked at once, at the end, for
the trials that were chosen: those on the front of selection score and stored parameters, or with a budget the best one.
What these have chosen is trained again with the other seeds of the command line, which no choice depends on.

The journal has no path of this machine and no word of the command line that is not part of a choice: with it and the
records, another machine goes on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.config.compose import TypedRun, compose_points
from peftbench.config.identity import hash_run
from peftbench.config.overrides import get_key
from peftbench.config.schema import Search
from peftbench.config.studies import GROUPS, TrialOf, list_space
from peftbench.records.choice import compute_objective, settle_trial
from peftbench.records.location import locate_run
from peftbench.records.lock import hold_run
from peftbench.records.record import Record, Searched, find_finished, find_record, get_time
from peftbench.records.run_files import clear_leftovers, has_leftovers
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
from peftbench.sweeps.plan import FOLDER, Plan, PlannedRun, relate_path
from peftbench.sweeps.resolve import resolve_points
from peftbench.sweeps.workers import Workers
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.files import expand_home

PATIENCE = 300  # trials in a row that are refused or known: then the space has nothing new
PRUNED = "pruned"
WORDS, RUN_FOLDER, REASON = "words", "folder", "reason"  # attributes of a trial: what was chosen, below the output_dir
CONFIRMED = "confirmed"  # an attribute of the study: the folders of a trial's runs with other seeds


class Study:
    """A study of one point of the command line.

    Args:
        point: the run that is varied, with what was typed.
        arguments: the whole command line, for `peftbench status`.
        seeds: with which the chosen points are trained; the run's own is that of the trials.
    """

    def __init__(
        self, point: TypedRun, arguments: Sequence[str], config_dir: str | None = None, seeds: Sequence[int] = ()
    ) -> None:
        self.overrides, self.run = point
        assert self.run.search is not None
        self.search: Search = self.run.search
        self.arguments, self.config_dir = list(arguments), config_dir
        self.seeds = [seed for seed in dict.fromkeys(seeds) if seed != self.run.seed]
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
                # if the process died before it did so
                note_attribute(self.study, trial, RUN_FOLDER, relate_path(self.root, job.folder))
                yield job
            else:  # the process died while it chose
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        for trial in list_by_state(self.study, "COMPLETE"):
            if find_record(self._locate(trial)) is None and WORDS in trial.user_attrs:
                yield self._make_job(trial.number, self._compose(trial.user_attrs[WORDS]))
        while self.count_runs() < (self.search.trials or 0):
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
        words = [*(f"{key}={value}" for key, value in chosen.items()), f"search.trial={trial.number}"]
        try:
            point = self._compose(words)
        except UserError as error:
            trial.set_user_attr(REASON, " ".join(error.faults))
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        folder = relate_path(self.root, locate_run(settle_trial(point[1], self.search)[0]))
        for earlier in list_by_state(self.study, "COMPLETE", "PRUNED", "RUNNING", "FAIL"):
            if RUN_FOLDER in earlier.user_attrs and self._locate(earlier) == self.root / folder:
                trial.set_user_attr(REASON, f"the run of trial {earlier.number}")
                # Told as done, it would count twice, and the sampler would come back to it again and again.
                self.study.tell(trial, state=TrialState.FAIL)
                return None
        trial.set_user_attr(WORDS, words)  # with which another process goes on, if this one dies
        trial.set_user_attr(RUN_FOLDER, folder)
        job = self._make_job(trial.number, point)
        self.save_plan()
        return job

    def _compose(self, words: Sequence[str], *more: str) -> TypedRun:
        """Return the run of what was typed, with the words of a trial in the place of those of the same keys.

        Of a journal of an earlier version, which has all that was typed, only what was chosen counts.
        """
        chosen = [word for word in words if get_key(word) in self.space or get_key(word) == "search.trial"]
        words = [*chosen, f"search.study={self.name}", *more]
        given = {get_key(word) for word in words}
        kept = [word for word in self.overrides if get_key(word) not in given]
        (point,) = resolve_points(compose_points([*kept, *words], config_dir=self.config_dir))
        return point

    def _locate(self, trial: FrozenTrial) -> Path:
        """Return the folder of a trial's run; a file that is none, of a trial without one."""
        return self.root / str(trial.user_attrs.get(RUN_FOLDER, self.file.name))

    def _make_job(self, number: int, point: TypedRun) -> Job:
        overrides, run = point
        assert run.search is not None
        run = replace(run, search=replace(run.search, keys={key: run.search.keys[key] for key in self.space}))
        final, searched = settle_trial(run, run.search or self.search)
        judged = self.search.prune and self.objectives == 1 and searched.role == "trial"
        given = {**searched.chosen, **({"seed": run.seed} if searched.role == "final" else {})}
        return Job(
            number + 1,
            overrides,
            " ".join(f"{key}={format_value(value)}" for key, value in given.items()),
            run,
            locate_run(final),
            wait=True,
            trial=TrialOf(str(self.file.resolve()), self.name, number) if judged else None,
            since=self.began,
        )

    def list_confirmations(self) -> list[Job]:
        """Return the runs that train the points on the front with the other seeds, and note them in the journal."""
        found = []
        for trial in self.list_front():
            words = trial.user_attrs[WORDS]
            jobs = [self._make_job(trial.number, self._compose(words, *self._give_seed(seed))) for seed in self.seeds]
            self._note_confirmed(trial, [relate_path(self.root, job.folder) for job in jobs])
            found += jobs
        self.save_plan()
        return found

    def _give_seed(self, seed: int) -> list[str]:
        """Return the words that give a trial's point a seed."""
        return [] if seed == self.run.seed else [f"search.seed={self.run.seed}", f"seed={seed}"]

    def _note_confirmed(self, trial: FrozenTrial, folders: Sequence[str]) -> None:
        known = self._list_confirmed(trial)
        if new := [folder for folder in folders if folder not in known]:
            self.study.set_user_attr(f"{CONFIRMED} {trial.number}", [*known, *new])

    def _list_confirmed(self, trial: FrozenTrial) -> list[str]:
        """Return the folders of the runs that a trial's point has with other seeds, below the output_dir."""
        return list(self.study.user_attrs.get(f"{CONFIRMED} {trial.number}", []))

    def list_confirmed(self, trial: FrozenTrial) -> list[Record]:
        """Return the records of the runs that a trial's point has with the other seeds of the command line."""
        found = [find_record(self.root / folder) for folder in self._list_confirmed(trial)]
        return [record for record in found if record is not None and record.seed in self.seeds]

    def note(self, job: Job, ended: Ended) -> str:
        """Tell the study how a trial ended; return that in words. Of the record, only the selection score is read."""
        number = job.number - 1
        if ended.pruned or self.study.get_trials(deepcopy=False)[number].state is TrialState.PRUNED:
            self._note_pruned(job.folder)
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

    def _note_pruned(self, folder: Path) -> None:
        """Write into the record of a trial that it was given up, and not merely stopped."""
        with hold_run(folder, wait=True):
            record = find_record(folder)
            if record is not None and record.search is not None and not record.search.pruned:
                record.search.pruned = True
                record.save()

    def list_front(self) -> list[FrozenTrial]:
        """Return the trials that no other one is better than, the best score first; each run once."""
        if not list_by_state(self.study, "COMPLETE"):
            return []
        best = [self.study.best_trial] if self.objectives == 1 else self.study.best_trials
        unique = {self._locate(trial): trial for trial in best if RUN_FOLDER in trial.user_attrs}
        return sorted(unique.values(), key=lambda trial: -trial.values[0])

    def mark_front(self) -> list[Record]:
        """Write into the records whether they are on the front; return those that are, in its order.

        Trials that are not appear in tables only with `trials=true`; so do runs with other seeds of points that were on
        the front before there were further trials. A run that another search has, or that was trained by itself, stays
        what it is there.
        """
        front = [trial.number for trial in self.list_front()]
        for trial in self.study.get_trials(deepcopy=False):
            chosen = trial.number in front
            for folder in [self._locate(trial), *(self.root / one for one in self._list_confirmed(trial))]:
                if has_leftovers(folder) and find_finished(folder) is not None:
                    with hold_run(folder, wait=True):
                        clear_leftovers(folder)
                record = find_record(folder)
                if record is None or record.status != "done" or record.search is None:
                    continue
                if record.search.role == "trial" and chosen:
                    self._mark(record, trial, "final")
                elif record.search.role == "final" and not chosen and self._has(record.search):
                    self._mark(record, trial, "trial")
        found = [find_record(self._locate(trial)) for trial in self.list_front()]
        return [record for record in found if record is not None]

    def _has(self, search: Searched) -> bool:
        """Return whether a record's search is this study; earlier versions did not name it."""
        return search.name == self.search.name and search.study in (self.name, None)

    def _mark(self, record: Record, trial: FrozenTrial, role: Literal["trial", "final"]) -> None:
        """Write the role of a run in this study into its record. A trial of another search becomes one of this."""
        if record.search is None or not self._has(record.search):
            job = self._make_job(trial.number, self._compose(trial.user_attrs[WORDS], *self._give_seed(record.seed)))
            _, record.search = settle_trial(job.run, job.run.search or self.search)
        splits, confirms = record.data.get("splits", {}), record.seed != record.search.seed
        with hold_run(record.folder, wait=True):
            record.search.role = role
            if not confirms:  # a run with another seed has what the trial has
                record.search.selection = record.selection if role == "final" else None
            record.search.reported = splits.get("selection") == splits.get("report")
            record.save()

    def describe_confirmed(self) -> list[str]:
        """Return a sentence for each point on the front that was trained with other seeds: its mean reported score."""
        said = []
        for trial in self.list_front():
            runs = [run for run in self.list_confirmed(trial) if run.score is not None]
            if runs:
                seeds = ", ".join(str(run.seed) for run in runs)
                mean = fmean(run.score for run in runs if run.score is not None)
                said.append(f"{self._locate(trial).name} with the seeds {seeds}: {runs[0].metric} {mean:.2f} reported.")
        return said

    def save_plan(self) -> None:
        """Write what `peftbench status` reads: the trials so far, and the runs of what was chosen."""
        runs = []
        for trial in self.study.get_trials(deepcopy=False):
            if RUN_FOLDER in trial.user_attrs:
                given = {key: format_value(value) for key, value in trial.params.items()}
                for folder in (self._locate(trial), *(self.root / one for one in self._list_confirmed(trial))):
                    runs.append(PlannedRun(relate_path(self.root, folder), self.run.method, given))
        Plan(self.arguments, runs, self.name).save(self.root)

    def count_runs(self) -> int:
        """Return how many runs the trials of the study have."""
        trials = self.study.get_trials(deepcopy=False)
        return len({self._locate(trial) for trial in trials if RUN_FOLDER in trial.user_attrs})

    def count(self) -> Counter[str]:
        """Return how many trials there are of each kind, and how many suggestions cost nothing."""
        found: Counter[str] = Counter()
        for trial in self.study.get_trials(deepcopy=False):
            kind = {"COMPLETE": "done", "PRUNED": "pruned", "RUNNING": "unfinished", "FAIL": "failed"}[trial.state.name]
            has_run = RUN_FOLDER in trial.user_attrs
            record = find_record(self._locate(trial)) if has_run else None
            if kind == "done" and has_run and record is None:
                kind = "unfinished"  # its record is lost, and could not be written again
            elif kind == "failed" and record is not None and record.status == "diverged":
                kind = "diverged"  # which is a finding
            found[kind if has_run else "refused or known"] += 1
        return found


def train_study(
    point: TypedRun,
    arguments: Sequence[str],
    config_dir: str | None,
    places: Sequence[dict[str, str]],
    launcher: Any = None,
    seeds: Sequence[int] = (),
) -> int:
    """Train the trials of a study, then the points on the front with the other seeds, and show the front.

    Args:
        places: of the runs that are trained at once on this machine, see `find_places`.
        launcher: where runs are trained otherwise.
        seeds: of the command line.

    Returns:
        The exit code: 0, or 1 if trials failed or are unfinished.
    """
    study = Study(point, arguments, config_dir, seeds)
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
            say(f"{study.count_runs()} of {wanted}: {job.settings}: {said}")
            print_faults([] if said == PRUNED else ended.faults)  # Slurm's tasks return nothing
        counted = study.count()
        # Of a study that goes on later another point may be the best.
        confirmations = [] if counted["unfinished"] else study.list_confirmations()
        waiting = [job for job in confirmations if job.run.rerun or find_finished(job.folder) is None]
        for count, (job, ended) in enumerate(executor.run(waiting) if waiting else (), start=1):
            record = find_record(job.folder)
            outcome = "missing" if record is None else record.outcome
            say(f"{count} of {len(waiting)} with other seeds: {job.settings}: {outcome}")
            print_faults(ended.faults)
    show_front(study, counted, make_console())
    missing = any(find_finished(job.folder) is None for job in confirmations)
    return 1 if counted["failed"] or counted["unfinished"] or missing else 0


def show_front(study: Study, counted: Counter[str], console: Console) -> None:
    """Print the trials on the front with their scores on the selection split and, now, on the report split."""
    study.save_plan()
    records = study.mark_front()
    if records:
        console.print()
        console.print(_make_table(records, [key for key in study.space if key not in (*GROUPS, "bottleneck")]))
        for line in study.describe_confirmed():
            console.print(line, highlight=False)
        if records[0].search is not None and records[0].search.reported:
            console.print("The selection split is also the one that is reported on: these scores are too good.")
    kinds = ("done", "pruned", "diverged", "failed", "unfinished", "refused or known")
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
