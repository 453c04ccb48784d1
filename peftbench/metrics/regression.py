"""Pearson's and Spearman's correlation of predicted and true numbers, which are given as strings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftbench.metrics.statistics import References, Statistics, divide


def compute_correlations(
    predictions: Sequence[str], references: References, labels: Sequence[str]
) -> dict[str, Statistics]:
    """100 x Pearson's r, and Spearman's rho, which is r of the ranks; 0 where either side is constant.

    r = (mean(xy) - mean(x) mean(y)) / √((mean(x²) - mean(x)²) (mean(y²) - mean(y)²)). The score of all examples is
    scipy's, which computes the same from deviations and so rounds differently. In the bootstrap the ranks are those
    among all examples: if each draw were ranked anew, rho would not be a function of sums.
    """
    from scipy.stats import rankdata, spearmanr

    ours, right = ([float(str(number)) for number in side] for side in (predictions, references))
    is_constant = len(set(ours)) < 2 or len(set(right)) < 2
    pearson = 0.0 if is_constant else 100 * _compute_pearson(ours, right)
    spearman = 0.0 if is_constant else 100 * float(spearmanr(ours, right).statistic)
    return {
        "pearson": _correlate(np.array(ours), np.array(right), pearson),
        "spearman": _correlate(rankdata(ours), rankdata(right), spearman),
    }


def _compute_pearson(x: list[float], y: list[float]) -> float:
    """Return scipy's r, or nan if a number is not finite: some versions of scipy, such as 1.12, fail there."""
    from scipy.stats import pearsonr

    return float(pearsonr(x, y).statistic) if np.isfinite([x, y]).all() else np.nan


def _correlate(x: np.ndarray, y: np.ndarray, library: float) -> Statistics:
    x, y = (side - side.mean() for side in (x, y))  # moments about a point among the numbers lose no digits
    x, y = (side / (np.abs(side).max() or 1) for side in (x, y))

    def score(sums: np.ndarray, n: int) -> np.ndarray:
        mx, my, xx, yy, xy = np.moveaxis(sums / n, -1, 0)
        spread = np.maximum(xx - mx * mx, 0) * np.maximum(yy - my * my, 0)
        return 100 * divide(xy - mx * my, np.sqrt(spread))

    return Statistics(np.stack([x, y, x * x, y * y, x * y], axis=1), score, library=library)
