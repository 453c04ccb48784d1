"""The 95% interval of a row's mean, for `peftbench results --interval` and `peftbench plot --interval`.

It is made as the intervals of the claims are (tables/claims.py): a bootstrap over seeds and examples where it is known
what each example contributed to the score, otherwise Student's t over the seeds, which says nothing of other examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from peftbench.metrics.bootstrap import LEVEL, draw_differences, draw_seed_weights, score_drawn_examples
from peftbench.records.record import Record
from peftbench.tables.examples import has_examples, read_examples
from peftbench.tables.row import Row, identify_point, identify_setting

RESAMPLES = 2000
LEAST_SEEDS = 2  # with one seed it is unknown what another one would give
FEW_SEEDS = 5  # fewer are said to say little of others
Way = Literal["seeds and examples", "seeds"]
WAYS: dict[Way, str] = {
    "seeds and examples": "a bootstrap over {} seeds and the examples",
    "seeds": "Student's t over {} seeds, for these examples only",
}


class Drawn(Protocol):
    """An interval of which it is known what was drawn for it."""

    @property
    def seeds(self) -> int: ...

    @property
    def over(self) -> Way: ...


@dataclass(frozen=True)
class Interval:
    """The 95% interval of a mean over seeds."""

    low: float
    high: float
    seeds: int
    over: Way

    @property
    def half(self) -> float:
        """Half its width: what tables print after ±. A bootstrap's interval is not quite symmetric."""
        return (self.high - self.low) / 2


def estimate_means(
    rows: Iterable[Row], of: Callable[[Record], float | None], is_score: bool, resamples: int = RESAMPLES
) -> dict[int, Interval]:
    """Return the interval of the mean of a number over the seeds of each row, by the row's id.

    A row of one seed has none, nor has one whose runs differ in more than their seed.

    Args:
        of: the number.
        is_score: it is the main score, of which examples may be known; of another number, seeds alone are drawn.

    Raises:
        UserError: a file with what examples contributed is damaged.
    """
    points = {id(row): [run for run in row.scored if _is_known(of(run))] for row in rows}
    points = {key: runs for key, runs in points.items() if len(runs) >= LEAST_SEEDS and _is_one_point(runs)}
    drawn = _draw_together([run for runs in points.values() for run in runs], resamples) if is_score else {}
    found = {}
    for key, runs in points.items():
        if all(str(run.folder) in drawn for run in runs):
            found[key] = _estimate_by_draws(runs, np.stack([drawn[str(run.folder)] for run in runs]))
        else:
            found[key] = _estimate_by_seeds([float(of(run) or 0.0) for run in runs])
    return found


def describe_ways(intervals: Iterable[Drawn]) -> str:
    """Return what was drawn for some intervals: "a bootstrap over 3 seeds and the examples"; "" for none."""
    seeds: dict[Way, set[int]] = {}
    for one in intervals:
        seeds.setdefault(one.over, set()).add(one.seeds)
    said = {way: _describe_range(of) for way, of in seeds.items()}
    return " or ".join(what.format(said[way]) for way, what in WAYS.items() if way in said)


def describe_ways_of(intervals: Mapping[str, Sequence[Drawn]]) -> str:
    """Return what was drawn for named lists of intervals: once, or with each name where the ways differ."""
    known = {name: of for name, of in intervals.items() if of}
    if len({frozenset(one.over for one in of) for of in known.values()}) <= 1:
        return describe_ways(one for of in known.values() for one in of)
    return "; ".join(f"{describe_ways(of)} ({name})" for name, of in known.items())


def _describe_range(numbers: Collection[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} {'or' if most == least + 1 else 'to'} {most}"


def draw_example_scores(runs: Sequence[Record], resamples: int) -> dict[str, np.ndarray]:
    """Return the scores of runs on drawn examples, by folder: (resamples). Without known examples, none."""
    runs = [run for run in runs if has_examples(run)]
    if not runs:
        return {}
    scores = score_drawn_examples([read_examples(run)[run.metric] for run in runs], resamples)
    return {str(run.folder): drawn for run, drawn in zip(runs, scores, strict=True)}


def _draw_together(runs: Sequence[Record], resamples: int) -> dict[str, np.ndarray]:
    """Return the scores of runs on drawn examples, by folder; runs on the same ones share the draws."""
    alike: dict[tuple[str, ...], list[Record]] = {}
    for run in runs:
        alike.setdefault(identify_setting(run), []).append(run)
    return {
        folder: scores for group in alike.values() for folder, scores in draw_example_scores(group, resamples).items()
    }


def _estimate_by_draws(runs: Sequence[Record], scores: np.ndarray) -> Interval:
    # rows of the same seeds draw the same ones, as those of a claim do
    weights = draw_seed_weights(len(runs), scores.shape[1], seed=1 + sum(run.seed for run in runs))
    means = draw_differences(scores, np.zeros_like(scores), weights)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), len(runs), "seeds and examples")


def compute_half_width(error: float, seeds: int, level: float = LEVEL) -> float:
    """Return half the width of Student's interval of a mean over `seeds` seeds with the standard error `error`."""
    from scipy.stats import t as student  # slow to import

    return float(student.ppf((1 + level) / 2, seeds - 1)) * error


def _estimate_by_seeds(values: Sequence[float]) -> Interval:
    half = compute_half_width(float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values))
    mean = float(np.mean(values))
    return Interval(mean - half, mean + half, len(values), "seeds")


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _is_one_point(runs: Sequence[Record]) -> bool:
    """Return whether runs differ in nothing but their seed, and were scored on the same examples."""
    seen = {(identify_point(run), identify_setting(run)) for run in runs}
    return len(seen) == 1 and len({run.seed for run in runs}) == len(runs)
