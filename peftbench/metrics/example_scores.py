"""Metrics example by example, for statements about chance: a score is a function of a mean over examples.

Imports no torch, unlike `metrics.py`, whose scores these are; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peftbench.utils.errors import UserError

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

Text = str | list[str]  # a reference, or all texts that are right
Score = Callable[[np.ndarray], np.ndarray]


class ExampleScores(NamedTuple):
    """A metric as statistics of the examples, and the score as a function of their mean.

    `statistics` is (examples, k); `score` maps means (..., k) to scores (...). Where the score itself is a mean, as
    accuracy is, k = 1; what is computed from counts over all examples, as F1 is, has a column for each count. Of the
    same references and labels, all predictions have the same `score`.
    """

    statistics: np.ndarray
    score: Score


def example_scores(
    metric: str, predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str] = ()
) -> dict[str, ExampleScores]:
    """Every score of the metric that has a score called `metric`.

    Args:
        labels: the task's, in the order of their codes; of two labels, the second is the one that F1 looks for.

    Raises:
        UserError: the metric is not known example by example.
    """
    if metric not in FAMILIES:
        raise UserError(f"{metric} cannot be compared example by example; metrics that can: {', '.join(FAMILIES)}.")
    return FAMILIES[metric](predictions, references, labels)


def _mean(values: Sequence[float]) -> ExampleScores:
    """100 x the mean of a number of each example."""
    return ExampleScores(np.asarray(values, dtype=float)[:, None], lambda means: 100 * means[..., 0])


def _accuracy(
    predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str]
) -> dict[str, ExampleScores]:
    pairs = zip(predictions, references, strict=True)
    return {"accuracy": _mean([prediction == reference for prediction, reference in pairs])}


def _f1(
    name: str, predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str]
) -> dict[str, ExampleScores]:
    """F1 of the second label, or the mean F1 of the labels that are true or predicted somewhere."""
    sought = labels[1:2] if name == "f1" else labels
    ours, right = _one_hot(predictions, sought), _one_hot(references, sought)
    counts = np.concatenate([ours * right, ours + right], axis=1)  # both; predicted + true

    def score(means: np.ndarray) -> np.ndarray:
        both, either = np.split(means, 2, axis=-1)
        there = 1.0 if name == "f1" else (either > 1e-12).sum(axis=-1)
        f1: np.ndarray = 100 * _ratio(2 * both, either).sum(axis=-1) / there
        return f1

    return {name: ExampleScores(counts, score), **_accuracy(predictions, references, labels)}


def _matthews(
    predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str]
) -> dict[str, ExampleScores]:
    """Gorodkin's (2004) form for any number of labels, which of two is Matthews'."""
    ours, right = _one_hot(predictions, labels), _one_hot(references, labels)
    counts = np.concatenate([(ours * right).sum(axis=1, keepdims=True), ours, right], axis=1)

    def score(means: np.ndarray) -> np.ndarray:
        agreed, (p, t) = means[..., 0], np.split(means[..., 1:], 2, axis=-1)
        spread = (1 - (p * p).sum(axis=-1)) * (1 - (t * t).sum(axis=-1))
        return 100 * _ratio(agreed - (p * t).sum(axis=-1), np.sqrt(np.maximum(spread, 0)))

    return {"matthews": ExampleScores(counts, score), **_accuracy(predictions, references, labels)}


def _correlations(
    predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str]
) -> dict[str, ExampleScores]:
    """Pearson's r from first and second moments; Spearman's is that of the ranks.

    Ranks are those among all examples, also where only some of them are drawn: ranking each draw anew would be no
    function of means.
    """
    from scipy.stats import rankdata

    ours, right = (np.array([float(str(number)) for number in side]) for side in (predictions, references))
    half = (len(right) + 1) / 2
    return {
        # moments about a point in the midst of the numbers lose no digits
        "pearson": _correlation(ours - ours.mean(), right - right.mean()),
        "spearman": _correlation(rankdata(ours) - half, rankdata(right) - half),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> ExampleScores:
    def score(means: np.ndarray) -> np.ndarray:
        mx, my, xx, yy, xy = np.moveaxis(means, -1, 0)
        spread = np.maximum(xx - mx * mx, 0) * np.maximum(yy - my * my, 0)
        return 100 * _ratio(xy - mx * my, np.sqrt(spread))

    return ExampleScores(np.stack([x, y, x * x, y * y, x * y], axis=1), score)


def _rouge(predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str]) -> dict[str, ExampleScores]:
    """See `metrics.Rouge`."""
    from peftbench.metrics.scripts import rouge

    return {name: _mean(column) for name, column in rouge(predictions, _texts(references)).by_example.items()}


def _bleu(predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str]) -> dict[str, ExampleScores]:
    """See `metrics.Bleu`."""
    from sacrebleu.metrics import BLEU, CHRF

    from peftbench.metrics.scripts import bleu_tokenizer

    right = _texts(references)
    return {
        "bleu": _corpus(BLEU(force=True, tokenize=bleu_tokenizer(right)), predictions, right),
        "chrf": _corpus(CHRF(), predictions, right),
    }


def _romanian_bleu(
    predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str]
) -> dict[str, ExampleScores]:
    """See `metrics.RomanianBleu`."""
    from sacrebleu.metrics import BLEU

    from peftbench.metrics.romanian import prepared

    ours, right = list(map(prepared, predictions)), [list(map(prepared, texts)) for texts in _texts(references)]
    bare = BLEU(tokenize="none", smooth_method="none", force=True)
    return {"bleu_ro": _corpus(bare, ours, right), **_bleu(predictions, references, labels)}


def _corpus(metric: Metric, predictions: Sequence[str], references: Sequence[list[str]]) -> ExampleScores:
    """A metric of sacreBLEU, which computes it from sums of its statistics over the segments.

    Both steps are called as sacreBLEU's own tests of significance call them. Smoothing needs the sums, not the means.
    """
    counts = np.array(metric._extract_corpus_statistics(predictions, list(zip_longest(*references))), dtype=float)

    def of_one(means: np.ndarray) -> float:
        sums = np.rint(means * len(counts)).astype(int).tolist()
        score: float = metric._compute_score_from_stats(sums).score
        return score

    return ExampleScores(counts, lambda means: np.apply_along_axis(of_one, -1, means))


def _exact_match(
    predictions: Sequence[str], references: Sequence[Text], labels: Sequence[str]
) -> dict[str, ExampleScores]:
    """Equal to one of the references but for white space."""
    pairs = zip(predictions, _texts(references), strict=True)
    return {"exact_match": _mean([ours.split() in [text.split() for text in right] for ours, right in pairs])}


def _texts(references: Sequence[Text]) -> list[list[str]]:
    return [[right] if isinstance(right, str) else right for right in references]


def _one_hot(cells: Sequence[Text], labels: Sequence[str]) -> np.ndarray:
    """(examples, labels): 1 where a cell is the label."""
    return np.array([[cell == label for label in labels] for cell in cells], dtype=float).reshape(len(cells), -1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where the denominator is nought but for rounding."""
    there = denominator > 1e-12
    ratio: np.ndarray = np.where(there, numerator / np.where(there, denominator, 1), 0)
    return ratio


ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Family = Callable[[Sequence[str], Sequence[Text], Sequence[str]], dict[str, ExampleScores]]
FAMILIES: dict[str, Family] = {
    "accuracy": _accuracy,
    "f1": partial(_f1, "f1"),
    "macro_f1": partial(_f1, "macro_f1"),
    "matthews": _matthews,
    "pearson": _correlations,
    "spearman": _correlations,
    **dict.fromkeys(ROUGE, _rouge),
    "bleu": _bleu,
    "chrf": _bleu,
    "bleu_ro": _romanian_bleu,
    "exact_match": _exact_match,
}
