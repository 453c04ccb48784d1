"""The paired bootstrap: the uncertainty of the difference between two models' scores on the same examples.

Efron and Tibshirani (1993); Koehn (2004) and Berg-Kirkpatrick, Burkett and Klein (2012) for comparing systems on one
test set. Examples are drawn with replacement, the same ones for both sides. If there are several seeds, they are drawn
too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peftbench.metrics.statistics import Statistics

LEVEL = 0.95
Scores = Mapping[str, Statistics]


@dataclass(frozen=True)
class Difference:
    """Scores of two sides, each the mean over its seeds, and the uncertainty of the difference a - b."""

    a: float
    b: float
    low: float  # lower end of the 95% interval of a - b
    high: float
    p: float  # two-sided: twice the share of draws in which the difference has the other sign or is zero

    @property
    def difference(self) -> float:
        return self.a - self.b


def bootstrap_pairs(
    a: Sequence[Scores], b: Sequence[Scores], *, paired_seeds: bool, resamples: int = 10_000, seed: int = 0
) -> dict[str, Difference]:
    """Compare two sides, each of one run or of several seeds, that were scored on the same examples in one order.

    Args:
        a, b: for each run, the statistics of its scores by name.
        paired_seeds: the runs of both sides have the same seeds in the same order; the seeds are drawn together.
        resamples: number of draws; the interval is from the 2.5th to the 97.5th of their percentiles.
    """
    names = list(a[0])
    # for each side {name: (examples, seeds, k)}
    sides = [{name: np.stack([run[name].rows for run in side], axis=1) for name in names} for side in (a, b)]
    examples = len(sides[0][names[0]])
    draw = np.random.default_rng(seed)
    drawn = {name: np.empty(resamples) for name in names}
    for index in range(resamples):
        times = np.bincount(draw.integers(0, examples, examples), minlength=examples).astype(float)
        seeds = draw.integers(0, len(a), len(a))
        both = [seeds, seeds if paired_seeds else draw.integers(0, len(b), len(b))]
        for name in names:
            score = a[0][name].score
            sums = [np.tensordot(times, side[name], axes=1) for side in sides]  # (seeds, k)
            one, other = (score(of, examples)[chosen].mean() for of, chosen in zip(sums, both, strict=True))
            drawn[name][index] = one - other
    found = {}
    for name in names:
        whole = [float(np.mean([run[name].score_all() for run in side])) for side in (a, b)]
        found[name] = _summarise(whole[0], whole[1], drawn[name])
    return found


def _summarise(a: float, b: float, differences: np.ndarray) -> Difference:
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if np.isnan(differences).any():
        return Difference(a, b, *[float("nan")] * 3)
    # + 1: the observed data count as one more draw, so that p is never zero
    fewest = min((differences <= 0).sum(), (differences >= 0).sum()) + 1
    return Difference(a, b, float(low), float(high), float(min(1.0, 2 * fewest / (len(differences) + 1))))


def score_drawn_examples(runs: Sequence[Statistics], resamples: int, seed: int = 0) -> np.ndarray:
    """Return the scores of runs on examples that are drawn with replacement, the same ones for all: (runs, resamples).

    Test examples are shared by all runs and seeds, so they are drawn once and not anew below each seed, which would
    understate their chance.

    Args:
        runs: of one score, on the same examples in the same order.
    """
    examples = len(runs[0].rows)
    draw = np.random.default_rng(seed)
    times = np.stack(
        [np.bincount(draw.integers(0, examples, examples), minlength=examples) for _ in range(resamples)]
    ).astype(float)
    return np.stack([run.score(times @ run.rows, examples) for run in runs])


def draw_seed_weights(seeds: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Return the share that each seed has in each draw: (resamples, seeds).

    Of n seeds n - 1 are drawn with replacement, so that the variance of the mean is s^2 / n, as it should be; n of n
    would give (n - 1) / n of it, half of it for two seeds (McCarthy and Snowden 1985).
    """
    drawn = np.random.default_rng(seed).integers(0, seeds, (resamples, seeds - 1))
    return np.stack([(drawn == index).mean(axis=1) for index in range(seeds)], axis=1)


def draw_differences(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the mean difference of the seeds of two rows in each draw: (resamples).

    Args:
        a, b: the scores of each seed, in the same order, on the drawn examples: (seeds, resamples).
        weights: of the seeds in each draw; None: all seeds, so that examples alone are drawn.
    """
    differences = (a - b).T
    found: np.ndarray = differences.mean(axis=1) if weights is None else (differences * weights).sum(axis=1)
    return found
