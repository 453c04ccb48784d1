"""What every metric is defined as: a row of statistics for each example, and a function from their sums to the score.

`measure` takes the sums over all examples, the paired bootstrap those over the examples that it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

References = (
    Sequence[str] | Sequence[str | Sequence[str]]
)  # for each example the right text, or all texts that are right


class Statistics(NamedTuple):
    """A score, defined as statistics of the examples.

    A mean over the examples, such as accuracy, has k = 1. A score that is computed from counts over all examples, such
    as F1, has a column for each count. Counts are integers below 2^53, so that their sums are exact in float64. For the
    same references and labels, `score` does not depend on the predictions.
    """

    rows: np.ndarray  # (examples, k)
    score: Callable[[np.ndarray, int], np.ndarray]  # sums (..., k), number of examples -> scores in percent (...)
    signature: str = ""  # how exactly the score was computed, if there is more than one way
    library: float | None = None  # a library's score of all examples, if the score of the sums is rounded differently

    def score_all(self) -> float:
        """Return the score of all examples in percent.

        The rows are added in the order of the examples by Python's `sum`, as ROUGE's mean always was. From Python 3.12
        on `sum` compensates for rounding, so the last digit of ROUGE may depend on the version of Python.
        """
        if self.library is not None:
            return self.library
        sums = np.array([sum(column) for column in self.rows.T.tolist()], dtype=float)
        return float(self.score(sums, len(self.rows)))


Definition = Callable[[Sequence[str], References, Sequence[str]], dict[str, Statistics]]


def average(values: Sequence[float], signature: str = "") -> Statistics:
    """Return the score 100 x the mean of one value for each example."""
    return Statistics(np.array(values, dtype=float)[:, None], lambda sums, n: 100 * sums[..., 0] / n, signature)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient, or 0 where the denominator is 0 except for rounding; not a number stays so."""
    is_zero = denominator <= 1e-12
    quotient: np.ndarray = np.where(is_zero, 0, numerator / np.where(is_zero, 1, denominator))
    return quotient
