"""A study: runs that Optuna chooses one after another, by the selection scores of those before (`search.trials=N`).

Here is what a study has: its journal, and its trials as runs. Of it `study_trials` chooses what is trained next,
`study_front` takes the best at the end, `study_table` shows that, and `study_training` has it all trained.

The journal has no path of this machine and no word of the command line that is not part of a choice: with it and the
records, another machine goes on.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic

from optuna.trial import FrozenTrial

from peftbench.config.compose import TypedRun, compose_points
from peftbench.config.identity import hash_run
from peftbench.config.overrides import get_key
from peftbench.config.schema import Reported, Run, Search
from peftbench.config.studies import TrialOf, list_space
from peftbench.records.choice import settle_trial
from peftbench.records.location import locate_run
from peftbench.records.record import find_record, get_time
from peftbench.records.wording import format_value
from peftbench.sweeps.jobs import Job
from peftbench.sweeps.optuna_study import open_study
from peftbench.sweeps.plan import FOLDER, Plan, PlannedRun, relate_path
from peftbench.sweeps.resolve import resolve_points
from peftbench.utils.files import expand_home

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
        self.sized: dict[str, Run] = {}  # see `resolve_points`
        self.seeds = [seed for seed in dict.fromkeys(seeds) if seed != self.run.seed]
        self.space = list_space(self.run, self.search, self.overrides)
        self.objectives = 1 if self.run.budget is not None else 2
        self.root = expand_home(self.run.output_dir)
        self.name = self._name()
        self.file = self.root / FOLDER / f"{self.name}.study.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.optuna = open_study(self.file, self.name, self.objectives)
        self.began = get_time()
        self.ends = math.inf if self.search.minutes is None else monotonic() + 60 * self.search.minutes

    def _name(self) -> str:
        """Return a hash of all on which the trials' scores and the choice of the next one depend."""
        plain = replace(self.run, search=None)
        parts = [hash_run(plain), self.run.budget, self.space, self.search.sampler.name, self.search.sampler_seed]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]

    def compose(self, words: Sequence[str], *more: str) -> TypedRun:
        """Return the run of what was typed, with the words of a trial in the place of those of the same keys.

        Of a journal of an earlier version, which has all that was typed, only what was chosen counts.
        """
        chosen = [word for word in words if get_key(word) in self.space or get_key(word) == "search.trial"]
        words = [*chosen, f"search.study={self.name}", *more]
        given = {get_key(word) for word in words}
        kept = [word for word in self.overrides if get_key(word) not in given]
        points = compose_points([*kept, *words], config_dir=self.config_dir)
        (point,) = resolve_points(points, self.sized)
        return point

    def locate(self, trial: FrozenTrial) -> Path:
        """Return the folder of a trial's run; a file that is none, of a trial without one."""
        return self.root / str(trial.user_attrs.get(RUN_FOLDER, self.file.name))

    def locate_confirmations(self, trial: FrozenTrial) -> list[Path]:
        """Return the folders of the runs that a trial's point has with other seeds."""
        return [self.root / folder for folder in self.optuna.user_attrs.get(f"{CONFIRMED} {trial.number}", [])]

    def make_job(self, number: int, point: TypedRun, chosen: bool = False) -> Job:
        """Return the job that trains a trial, or the point of one with another seed.

        Args:
            number: the trial's.
            point: from `compose`.
            chosen: the trial is chosen: it is scored on the report split too, and no longer pruned.
        """
        overrides, run = point
        assert run.search is not None
        run = replace(run, search=replace(run.search, keys={key: run.search.keys[key] for key in self.space}))
        if chosen:  # what was trained as a trial is not trained anew, and was so just now if that was asked for
            run = replace(run, rerun=False, search=replace(run.search or self.search, report=Reported.trials))
        final, searched = settle_trial(run, run.search or self.search)
        judged = self.search.prune and self.objectives == 1 and searched.role == "trial" and not chosen
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

    def list_trials(self) -> list[FrozenTrial]:
        """Return the trials; of a run that failed and was tried again, the last one, in the place of the first."""
        trials = self.optuna.get_trials(deepcopy=False)
        return list({trial.user_attrs.get(RUN_FOLDER, trial.number): trial for trial in trials}.values())

    def find_kind(self, trial: FrozenTrial) -> str:
        """Return how a trial ended, by Optuna's state and its record."""
        kind = {"COMPLETE": "done", "PRUNED": "pruned", "RUNNING": "unfinished", "FAIL": "failed"}[trial.state.name]
        if RUN_FOLDER not in trial.user_attrs:
            return "refused or known"
        record = find_record(self.locate(trial))
        if kind == "done" and record is None:
            return "unfinished"  # its record is lost, and could not be written again
        if kind in ("pruned", "failed") and record is not None and record.status == "diverged":
            return "diverged"  # which is a finding; earlier versions told Optuna of a failure
        return kind

    def save_plan(self, chosen: Collection[int] = ()) -> None:
        """Write what `peftbench status` reads: the trials so far, and the runs of what was chosen.

        Args:
            chosen: the numbers of the trials that are scored on the report split too.
        """
        runs = []
        for trial in self.list_trials():
            if RUN_FOLDER in trial.user_attrs:
                given = {key: format_value(value) for key, value in trial.params.items()}
                alone = self.search.report is Reported.chosen and trial.number not in chosen
                for folder, unreported in [
                    (self.locate(trial), alone),
                    *((other, False) for other in self.locate_confirmations(trial)),
                ]:
                    runs.append(PlannedRun(relate_path(self.root, folder), self.run.method, given, unreported))
        Plan(self.arguments, runs, self.name).save(self.root)

    @property
    def is_time_up(self) -> bool:
        """Whether no further trial may begin (`search.minutes`)."""
        return monotonic() >= self.ends

    def count_runs(self, ended: bool = False) -> int:
        """Return how many runs the trials of the study have.

        Args:
            ended: those alone whose trials have ended.
        """
        trials = [one for one in self.list_trials() if one.state.is_finished() or not ended]
        return sum(RUN_FOLDER in trial.user_attrs for trial in trials)

    def count(self) -> Counter[str]:
        """Return how many trials there are of each kind, and how many suggestions cost nothing."""
        return Counter(map(self.find_kind, self.list_trials()))
