"""The paper's claims (conf/claims.yaml) against recorded runs: differences, their intervals and a verdict of four.

Only runs of one cell are compared: one task, backbone, training set, selection split, length of training and search of
the learning rate. Rows are compared over the seeds that both have. If it is known what each example contributed, the
interval is a bootstrap over seeds and examples, otherwise Student's over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

from peftbench.config.rows import LOADER
from peftbench.config.schema import find_conf_dir
from peftbench.metrics.bootstrap import LEVEL, draw_differences, draw_seed_weights
from peftbench.records.record import Record
from peftbench.records.wording import format_value
from peftbench.tables.advice import group_alike
from peftbench.tables.fields import FIELDS
from peftbench.tables.intervals import LEAST_SEEDS, RESAMPLES, Way, compute_half_width, draw_example_scores
from peftbench.tables.row import Row, group_seeds, is_trial

Verdict = Literal["confirmed", "not confirmed", "contradicted", "not tested"]
# Rows of different budgets are compared where B stores this many times as much as A.
SIMILAR = (0.85, 1.6)
# A row that stores clearly more than another has an advantage, also under one budget, where the next bottleneck may be
# too large: that it is better shows nothing, that it is worse does.
ALIKE = 1.15


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, as conf/claims.yaml describes it."""

    name: str
    says: str
    source: str
    pairs: tuple[tuple[str, str], ...]
    above: float | None = None
    below: float | None = None
    of: Literal["mean", "least"] = "mean"
    smaller: bool = False
    least: float = 0.0  # % of the backbone that A stores
    most: float = math.inf

    @property
    def threshold(self) -> float:
        """The number of points on one side of which the difference is claimed to be."""
        return self.above if self.above is not None else self.below or 0.0

    @property
    def claimed(self) -> str:
        """What the difference is claimed to be."""
        return f"{'>' if self.above is not None else '<'} {self.threshold:g}"

    def judge(self, estimate: Estimate) -> Verdict:
        """Return the verdict of an interval, whatever the rows are that it is of."""
        over, under = estimate.low > self.threshold, estimate.high < self.threshold
        right, wrong = (over, under) if self.above is not None else (under, over)
        return "confirmed" if right else "contradicted" if wrong else "not confirmed"

    def is_fair(self, one: Comparison, verdict: Verdict) -> bool:
        """Return whether two rows can show this verdict: the one that loses has what the other has.

        It is not fair to rest a verdict on a winner that stores clearly more, nor on a loser whose best value in a
        search is the outermost that was tried, since a better one may lie beyond it.
        """
        if self.find_loser(one, verdict)[1].is_at_edge:
            return False
        return self.smaller or not (one.is_b_larger if self._has_a_lose(verdict) else one.is_a_larger)

    def find_loser(self, one: Comparison, verdict: Verdict) -> tuple[str, Row]:
        """Return the name and the row that has the lower score by a verdict."""
        return (one.pair[0], one.a) if self._has_a_lose(verdict) else (one.pair[1], one.b)

    def _has_a_lose(self, verdict: Verdict) -> bool:
        return (verdict == "contradicted") == (self.above is not None)

    def judge_pair(self, one: Comparison, estimate: Estimate) -> Verdict:
        """Return the verdict of the interval of one pair, if its rows can show it."""
        verdict = self.judge(estimate)
        return verdict if self.is_fair(one, verdict) else "not confirmed"

    def is_met(self, difference: float) -> bool:
        """Return whether a difference is on the claimed side, chance aside."""
        return difference > self.threshold if self.above is not None else difference < self.threshold


@dataclass(frozen=True)
class Comparison:
    """Two rows of a cell over the seeds that both have."""

    pair: tuple[str, str]
    a: Row
    b: Row

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of both, in order."""
        return tuple(sorted({run.seed for run in self.a.scored} & {run.seed for run in self.b.scored}))

    @property
    def runs(self) -> list[list[Record]]:
        """The runs of both sides, in the order of the seeds."""
        by_seed = [{run.seed: run for run in row.scored} for row in (self.a, self.b)]
        return [[side[seed] for seed in self.seeds] for side in by_seed]

    @property
    def is_a_larger(self) -> bool:
        """Whether A has an advantage, because it stores clearly more."""
        return _is_larger(self.a, self.b)

    @property
    def is_b_larger(self) -> bool:
        """Whether B has an advantage, because it stores clearly more."""
        return _is_larger(self.b, self.a)

    @property
    def differences(self) -> list[float]:
        """A - B for each seed, in points of the score."""
        return [get_score(one) - get_score(other) for one, other in zip(*self.runs, strict=True)]


@dataclass(frozen=True)
class Estimate:
    """A difference with its 95% interval, and how much of its variance is that of the seeds and of the examples."""

    difference: float
    low: float
    high: float
    seeds: int
    by_examples: float | None  # variance; None: examples are not drawn
    by_seeds: float

    @property
    def over(self) -> Way:
        """What was drawn for the interval."""
        return "seeds" if self.by_examples is None else "seeds and examples"


@dataclass(frozen=True)
class Finding:
    """What a cell's runs say of a claim."""

    claim: Claim
    verdict: Verdict
    estimate: Estimate | None
    comparisons: list[tuple[Comparison, Estimate]] = field(default_factory=list)  # of: least has the closest first

    @property
    def runs(self) -> int:
        """The number of runs that the finding rests on."""
        return len({run.folder for one, _ in self.comparisons for side in one.runs for run in side})


@dataclass(frozen=True)
class CellFindings:
    """Runs of one task and backbone that were trained alike, and what they say of each claim."""

    rows: list[Row]
    findings: list[Finding]

    @property
    def first(self) -> Record:
        """A run with a score, for what all of them share."""
        return next(record for row in self.rows for record in row.scored)


@cache
def read_claims() -> tuple[list[Claim], dict[str, dict[str, Any]]]:
    """Return the claims, and the points that they name by the values of their fields."""
    import yaml

    found = yaml.load((find_conf_dir() / "claims.yaml").read_bytes(), LOADER)
    claims = [
        Claim(
            name,
            **{key: values[key] for key in ("says", "source", "above", "below", "of", "smaller") if key in values},
            pairs=tuple((a, b) for a, b in values["pairs"]),
            least=values.get("from", 0.0),
            most=values.get("to", math.inf),
        )
        for name, values in found["claims"].items()
    ]
    return claims, found["points"]


def judge_records(records: Sequence[Record], resamples: int = RESAMPLES) -> list[CellFindings]:
    """Return what records say of the claims, for each cell of which a run has a score."""
    compared = [record for record in records if record.has_ended and not is_trial(record) and record.debug is None]
    # A point that a study has found has the name of the method that it varied.
    compared = [record for record in compared if record.study is None]
    cells = []
    for alike in group_alike(group_seeds(compared, "mean")):
        for search in dict.fromkeys(FIELDS["search"](row.first) for row in alike):
            rows = [row for row in alike if FIELDS["search"](row.first) == search]
            if any(row.scored for row in rows):
                cells.append(_judge_cell(rows, resamples))
    return sorted(cells, key=lambda cell: (cell.first.task, cell.first.model.name, -_count_tested(cell)))


def _count_tested(cell: CellFindings) -> int:
    return sum(finding.verdict != "not tested" for finding in cell.findings)


def _judge_cell(rows: list[Row], resamples: int) -> CellFindings:
    claims, points = read_claims()
    matched = [(claim, _match(claim, rows, points)) for claim in claims]
    runs = {run.folder: run for _, found in matched for one in found for side in one.runs for run in side}
    drawn = draw_example_scores(list(runs.values()), resamples)
    return CellFindings(rows, [_judge_claim(claim, found, drawn, resamples) for claim, found in matched])


def _match(claim: Claim, rows: Sequence[Row], points: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """Return the pairs of a claim at every size at which both were run with enough seeds."""
    found = []
    for pair in claim.pairs:
        one, other = ([row for row in rows if _is_at(row, points[name])] for name in pair)
        for a in _choose_rows(one):
            if claim.least <= _get_percent(a) <= claim.most:
                b = _find_smaller(a, other, claim.least) if claim.smaller else _find_like(a, other)
                if b is not None and len((comparison := Comparison(pair, a, b)).seeds) >= LEAST_SEEDS:
                    found.append(comparison)
    return found


def _is_at(row: Row, point: Mapping[str, Any]) -> bool:
    return all(format_value(FIELDS[key](row.first)) == format_value(value) for key, value in point.items())


def _choose_rows(rows: Sequence[Row]) -> list[Row]:
    """Return one row of each size, by size: the one with most seeds, of several the latest."""
    best: dict[float, Row] = {}
    scored = [row for row in rows if row.scored]
    for row in sorted(scored, key=lambda row: (len(row.scored), row.first.created)):
        best[_get_percent(row)] = row
    return [best[size] for size in sorted(best)]


def _find_like(a: Row, rows: Sequence[Row]) -> Row | None:
    """Return the row of A's budget, or the one whose size is most like A's; full fine-tuning has one size."""
    chosen = _choose_rows(rows)
    if not chosen or chosen[0].first.is_full:
        return chosen[0] if chosen else None
    if a.first.budget is not None and (same := [row for row in chosen if row.first.budget == a.first.budget]):
        return same[0]
    ratios = {_get_percent(row) / _get_percent(a): row for row in chosen if _get_percent(a)}
    similar = [ratio for ratio in ratios if SIMILAR[0] <= ratio <= SIMILAR[1]]
    return ratios[min(similar, key=lambda ratio: abs(math.log(ratio)))] if similar else None


def _find_smaller(a: Row, rows: Sequence[Row], least: float) -> Row | None:
    """Return the next smaller row, if it stores at least so much: saturation is a question about large ones."""
    smaller = [row for row in _choose_rows(rows) if least <= _get_percent(row) < _get_percent(a)]
    return smaller[-1] if smaller else None


def _is_larger(one: Row, other: Row) -> bool:
    """Return whether a row stores clearly more than another; full fine-tuning is meant to store all."""
    return not one.first.is_full and is_clearly_more(_get_percent(one), _get_percent(other))


def is_clearly_more(percent: float, other: float) -> bool:
    """Return whether a stored share is an advantage over another, see `ALIKE`."""
    return percent > ALIKE * other


def _get_percent(row: Row) -> float:
    return row.number(FIELDS["percent"]) or 0.0


def get_score(record: Record) -> float:
    """Return the reported score of a run that has one."""
    assert record.score is not None
    return record.score


def _judge_claim(
    claim: Claim, comparisons: Sequence[Comparison], drawn: Mapping[str, np.ndarray], resamples: int
) -> Finding:
    if not comparisons:
        return Finding(claim, "not tested", None)
    each = [(one, estimate_difference([one], drawn, resamples)) for one in comparisons]
    # An interval of one pair of several is wide enough for all of them at once (Bonferroni).
    strict = [estimate_difference([one], drawn, resamples, 1 - (1 - LEVEL) / len(each)) for one in comparisons]
    contradicted = any(
        claim.judge_pair(one, estimate) == "contradicted" for one, estimate in zip(comparisons, strict, strict=True)
    )
    if claim.of == "least":
        sign = 1 if claim.above is not None else -1
        each.sort(key=lambda one: sign * one[1].difference)
        estimate = each[0][1]
        sure = all(claim.judge_pair(one, estimate) == "confirmed" for one, estimate in each)
        verdict: Verdict = "contradicted" if contradicted else "confirmed" if sure else "not confirmed"
    else:
        estimate = estimate_difference(comparisons, drawn, resamples)
        verdict = claim.judge(estimate)
        if verdict != "not confirmed":
            fair = [one for one in comparisons if claim.is_fair(one, verdict)]
            if len(fair) < len(comparisons):  # then those that are fair must show it by themselves
                alone = claim.judge(estimate_difference(fair, drawn, resamples)) if fair else None
                verdict = verdict if alone == verdict else "not confirmed"
        if verdict == "confirmed" and contradicted:
            verdict = "not confirmed"
    return Finding(claim, verdict, estimate, each)


def estimate_difference(
    comparisons: Sequence[Comparison], drawn: Mapping[str, np.ndarray], resamples: int, level: float = LEVEL
) -> Estimate:
    """Return the mean difference of comparisons and its interval.

    Args:
        drawn: see `draw_example_scores`.
    """
    difference = fmean(fmean(one.differences) for one in comparisons)
    seeds = min(len(one.seeds) for one in comparisons)
    sides = [[[str(run.folder) for run in side] for side in one.runs] for one in comparisons]
    if not all(folder in drawn for one in sides for side in one for folder in side):
        return _estimate_by_seeds(comparisons, difference, level)
    with_seeds, without = [], []
    for one, both in zip(comparisons, sides, strict=True):
        a, b = (np.stack([drawn[folder] for folder in side]) for side in both)
        # comparisons of the same seeds draw the same ones
        weights = draw_seed_weights(len(one.seeds), resamples, seed=1 + sum(one.seeds))
        with_seeds.append(draw_differences(a, b, weights))
        without.append(draw_differences(a, b, None))
    draws, fixed = (np.mean(found, axis=0) for found in (with_seeds, without))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    by_examples = float(np.var(fixed))
    return Estimate(
        difference, float(low), float(high), seeds, by_examples, max(0.0, float(np.var(draws)) - by_examples)
    )


def _estimate_by_seeds(comparisons: Sequence[Comparison], difference: float, level: float) -> Estimate:
    """Return the interval of Student's t over the seeds that all comparisons have; unbounded below two of them."""
    shared = set.intersection(*(set(one.seeds) for one in comparisons))
    found = [dict(zip(one.seeds, one.differences, strict=True)) for one in comparisons]
    means = [fmean(of[seed] for of in found) for seed in sorted(shared)]
    if len(means) < LEAST_SEEDS:
        return Estimate(difference, -math.inf, math.inf, len(means), None, math.inf)
    error = stdev(means) / math.sqrt(len(means))
    half = compute_half_width(error, len(means), level)
    return Estimate(difference, difference - half, difference + half, len(means), None, error**2)


def count_seeds_needed(estimate: Estimate, threshold: float, most: int = 100) -> int | None:
    """Return how many seeds would decide if difference and spread of the seeds stay; None: more than `most`."""
    distance = abs(estimate.difference - threshold)
    for seeds in range(estimate.seeds + 1, most + 1):
        by_seeds = estimate.by_seeds * estimate.seeds / seeds
        if estimate.by_examples is None:
            half = compute_half_width(math.sqrt(by_seeds), seeds)
        else:
            half = float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt(estimate.by_examples + by_seeds)
        if half < distance:
            return seeds
    return None
