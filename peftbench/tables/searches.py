"""What studies (`search=optuna`) have found beside named methods of the same budget.

The scores of a study's trials say too much of the best of them, because it was chosen by them. So what is compared is
runs with other seeds than that of the trials, which no choice depends on, of the best point and of the named methods,
whose learning rates were chosen in the same way. The intervals are those of `tables.claims`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from peftbench.config.schema import index_by_key
from peftbench.records.choice import compute_objective
from peftbench.records.record import Record, Selection
from peftbench.records.wording import format_value
from peftbench.tables.advice import group_alike
from peftbench.tables.claims import Comparison, Estimate, estimate_difference, is_clearly_more
from peftbench.tables.fields import FIELDS
from peftbench.tables.intervals import LEAST_SEEDS, draw_example_scores
from peftbench.tables.row import Row, group_seeds, is_scored, is_trial

RIVALS = {"mam": "MAM", "lora": "LoRA"}  # methods that the best point would have to beat to be worth a preset
LEADERS = 3  # points of a study that are shown


@dataclass(frozen=True)
class Candidate:
    """A point with what is known of it.

    `name` is the axes of a point of a study, and of any other its method, with the place where others have it too.
    `selection` is the score by which it was chosen, with the seed of the trials; `fresh` are its scored runs with other
    seeds. `behind` is how much better the best point of the study is, over the seeds that both have.
    """

    first: Record
    name: str
    selection: Selection | None
    fresh: list[Record]
    behind: Estimate | None = None

    @property
    def score(self) -> float | None:
        """The mean reported score of the fresh runs."""
        return fmean(run.score for run in self.fresh if run.score is not None) if self.fresh else None

    @property
    def objective(self) -> float:
        """The selection score, better when higher."""
        return compute_objective(self.selection)

    @property
    def stored(self) -> float | None:
        """The stored parameters in % of the backbone."""
        found = FIELDS["percent"](self.first)
        return None if found is None else float(found)


@dataclass(frozen=True)
class StudyFinding:
    """A study under a budget: its trials, its best points with the best one first, and the named methods beside it."""

    name: str
    trials: list[Record]
    leaders: list[Candidate]
    named: list[Candidate]

    @property
    def first(self) -> Record:
        """A trial, for what all share."""
        return self.trials[0]

    @property
    def wanted(self) -> int:
        """The number of trials that the study was to have, by what was typed; those that there are if unsaid."""
        typed = [index_by_key(trial.overrides).get("search.trials", "") for trial in self.trials]
        return max([int(number) for number in typed if number.isdigit()], default=len(self.trials))

    @property
    def rivals(self) -> dict[str, Candidate]:
        """The named methods that the best point would have to beat, by method, as far as they were run."""
        known = [one for one in self.named if one.behind is not None]
        found = {method: next((one for one in known if one.first.method == method), None) for method in RIVALS}
        return {method: one for method, one in found.items() if one is not None}

    @property
    def is_better(self) -> bool | None:
        """Whether the best point beats each rival by more than chance, and none of them because it stores clearly more;
        None: there are too few runs to say so."""
        if self.rivals.keys() != RIVALS.keys():
            return None
        return all(
            one.behind is not None and one.behind.low > 0 and not self.is_larger(one) for one in self.rivals.values()
        )

    @property
    def winners(self) -> list[str]:
        """The rivals that beat the best point by more than chance, and not because they store clearly more."""
        return [
            method
            for method, one in self.rivals.items()
            if one.behind is not None
            and one.behind.high < 0
            and not is_clearly_more(one.stored or 0, self.leaders[0].stored or 0)
        ]

    def is_larger(self, one: Candidate) -> bool:
        """Return whether the best point stores clearly more than another."""
        return is_clearly_more(self.leaders[0].stored or 0, one.stored or 0)


def find_studies(records: Sequence[Record], resamples: int) -> list[StudyFinding]:
    """Return what the studies among records have found, by task, backbone and budget."""
    trials: dict[str, list[Record]] = {}
    for record in records:
        for name in _list_studies(record):
            trials.setdefault(name, []).append(record)
    known = [one for one in records if (_list_studies(one) if is_trial(one) else is_scored(one)) and _is_known(one)]
    groups = group_alike(group_seeds(known, "mean"))
    found = [_judge_study(name, of, groups, resamples) for name, of in trials.items()]
    return sorted(found, key=lambda one: (one.first.task, one.first.model.name, str(one.first.budget)))


def _list_studies(record: Record) -> set[str]:
    """Return the studies that have a run as a trial: its own, and those that found it trained by another search."""
    is_own = record.search is not None and record.seed == record.search.seed
    return {*record.studies, *([record.study] if is_own and record.study is not None else [])}


def find_selection_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one equals or beats in both the selection score and what is stored."""
    known = [one for one in candidates if one.selection is not None and one.stored is not None]
    found: list[Candidate] = []
    for one in sorted(known, key=lambda one: (one.stored, -one.objective)):
        if not found or one.objective > found[-1].objective:
            found.append(one)
    return found


def _is_known(record: Record) -> bool:
    """Return whether a run has a score, or one on the selection split; a trial that was not chosen has no other."""
    return is_scored(record) or (record.compared is not None and is_trial(record))


def _judge_study(name: str, trials: list[Record], groups: Sequence[Sequence[Row]], resamples: int) -> StudyFinding:
    done = [trial for trial in trials if _is_known(trial) and trial.selection is not None]
    if not done:
        return StudyFinding(name, trials, [], [])
    rows = next(rows for rows in groups if any(run.folder == done[0].folder for row in rows for run in row.records))
    places = {run.folder: row for row in rows for run in row.records}
    found = [
        Candidate(
            trial,
            " + ".join(one.in_line for one in trial.axes),
            trial.selection,
            _list_fresh(places[trial.folder], trial.seed),
        )
        for trial in done
    ]
    # Of equal ones the study has chosen the first, which then has runs with other seeds.
    found.sort(key=lambda one: (-one.objective, not one.fresh, one.first.created))
    named = _choose_named(rows, found[0].first)
    return StudyFinding(name, trials, found[:LEADERS], _compare(found[0], named, resamples))


def _list_fresh(row: Row, seed: int) -> list[Record]:
    """Return the runs that a point has with other seeds than that of the trials."""
    return [run for run in row.scored if run.seed != seed and not is_trial(run)]


def _choose_named(rows: Sequence[Row], best: Record) -> list[Candidate]:
    """Return the methods that were run under the study's budget and not only by it, the best one first.

    Of several rows of a method the one with most seeds is taken, and then the one with the best selection score.
    """
    found: dict[tuple[str, str], Candidate] = {}
    for row in rows:
        own = [run for run in row.scored if run.study is None and not is_trial(run)]
        if not own or own[0].budget != best.budget:
            continue
        search = own[0].search
        of_trial = next((run.selection for run in own if run.seed == best.seed), None)
        selection = of_trial if search is None else search.selection
        one = Candidate(own[0], own[0].method, selection, _list_fresh(row, best.seed))
        key = one.name, format_value(FIELDS["modified_representation"](one.first))
        before = found.get(key)
        if before is None or (len(before.fresh), before.objective) < (len(one.fresh), one.objective):
            found[key] = one
    methods = Counter(method for method, _ in found)
    named = [
        replace(one, name=f"{method} ({place})") if methods[method] > 1 else one
        for (method, place), one in found.items()
    ]
    return sorted(named, key=lambda one: -one.objective)


def _compare(best: Candidate, named: Sequence[Candidate], resamples: int) -> list[Candidate]:
    """Return the named candidates with the difference of the best point from each, where there are seeds enough."""
    drawn = draw_example_scores([run for one in (best, *named) for run in one.fresh], resamples)
    found = []
    for one in named:
        if not (best.fresh and one.fresh):
            found.append(one)
            continue
        pair = Comparison((best.name, one.name), Row(tuple(best.fresh)), Row(tuple(one.fresh)))
        enough = len(pair.seeds) >= LEAST_SEEDS
        behind = estimate_difference([pair], drawn, resamples) if enough else None
        found.append(replace(one, behind=behind))
    return found
