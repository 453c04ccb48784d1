"""Accuracy, F1, macro F1 and Matthews' correlation, from counts of labels. Labels are given by name.

With tp the examples of a label that are predicted as such, p those that are predicted as it and t those that it is
true of, F1 = 2 tp / (p + t), the harmonic mean of the precision tp / p and the recall tp / t; 0 where tp = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftbench.metrics.statistics import References, Statistics, average, divide


def compute_accuracy(
    predictions: Sequence[str], references: References, labels: Sequence[str]
) -> dict[str, Statistics]:
    """100 x the share of predictions that equal their reference."""
    return {"accuracy": average([ours == right for ours, right in zip(predictions, references, strict=True)])}


def compute_f1(predictions: Sequence[str], references: References, labels: Sequence[str]) -> dict[str, Statistics]:
    """100 x F1 of the second of two labels, as in GLUE, and the accuracy. Without a second label F1 is not a number."""

    def score(sums: np.ndarray, n: int) -> np.ndarray:
        both, either = np.split(sums, 2, axis=-1)
        f1: np.ndarray = 100 * divide(2 * both, either).sum(axis=-1)
        return f1 if len(labels) > 1 else f1 * np.nan

    rows = _count_hits(predictions, references, labels[1:2])
    return {"f1": Statistics(rows, score), **compute_accuracy(predictions, references, labels)}


def compute_macro_f1(
    predictions: Sequence[str], references: References, labels: Sequence[str]
) -> dict[str, Statistics]:
    """100 x the mean F1 of the labels that are true or predicted anywhere, as in scikit-learn, and the accuracy.

    The mean is over the labels in alphabetical order, as there, so that rounding is the same.
    """

    def score_one(sums: np.ndarray) -> float:
        both, either = np.split(sums, 2)
        return 100 * float(np.mean(2 * both[either > 0] / either[either > 0]))

    rows = _count_hits(predictions, references, _list_labels(predictions, references, labels))
    there = {*references, *predictions}
    absent = len(set(labels) - there)
    signature = f"mean over {len(there)} of {len(there) + absent} labels, those that occur" if absent else ""
    return {
        "macro_f1": Statistics(rows, lambda sums, n: np.apply_along_axis(score_one, -1, sums), signature),
        **compute_accuracy(predictions, references, labels),
    }


def compute_matthews(
    predictions: Sequence[str], references: References, labels: Sequence[str]
) -> dict[str, Statistics]:
    """100 x Matthews' (1975) correlation of predicted and true labels, and the accuracy; 0 where either are all one.

    In Gorodkin's (2004) form for any number of labels, with c of n examples right:
    (n c - Σ p t) / √((n² - Σ p²) (n² - Σ t²)), sums over the labels.
    """
    names = _list_labels(predictions, references, labels)
    ours, right = _encode_one_hot(predictions, names), _encode_one_hot(references, names)

    def score(sums: np.ndarray, n: int) -> np.ndarray:
        hits, (p, t) = sums[..., 0], np.split(sums[..., 1:], 2, axis=-1)
        spread = (n * n - (p * p).sum(axis=-1)) * (n * n - (t * t).sum(axis=-1))
        return 100 * divide(n * hits - (p * t).sum(axis=-1), np.sqrt(spread))

    rows = np.concatenate([(ours * right).sum(axis=1, keepdims=True), ours, right], axis=1)
    return {"matthews": Statistics(rows, score), **compute_accuracy(predictions, references, labels)}


def _count_hits(predictions: Sequence[str], references: References, names: Sequence[str]) -> np.ndarray:
    """(examples, 2 x labels): for each label tp, then p + t."""
    ours, right = _encode_one_hot(predictions, names), _encode_one_hot(references, names)
    return np.concatenate([ours * right, ours + right], axis=1)


def _list_labels(predictions: Sequence[str], references: References, labels: Sequence[str]) -> list[str]:
    return sorted({*labels, *references, *predictions})


def _encode_one_hot(cells: References, names: Sequence[str]) -> np.ndarray:
    """(examples, labels): 1 where a cell is the label."""
    return np.array([[cell == name for name in names] for cell in cells], dtype=float).reshape(len(cells), -1)
