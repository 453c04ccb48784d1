"""Metrics example by example, for statements about chance: a score is a function of a mean over examples.

Imports no torch, unlike `metrics.py`, whose scores these are; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from peftbench.errors import UserError

Text = str | list[str]  # a reference, or all texts that are right


class ExampleScores(NamedTuple):
    """A metric as statistics of the examples, and the score as a function of their mean.

    `statistics` is (examples, k); `score` maps means (..., k) to scores (...). Where the score itself is a mean, as
    accuracy is, k = 1; what is computed from counts over all examples, as F1 is, has a column for each count.
    """

    statistics: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


def example_scores(metric: str, predictions: Sequence[str], references: Sequence[Text]) -> dict[str, ExampleScores]:
    """Every score of the metric that has a score called `metric`.

    Raises:
        UserError: the metric is not known example by example.
    """
    for names, of in FAMILIES.items():
        if metric in names:
            return {
                name: ExampleScores(np.asarray(column, dtype=float)[:, None], _percent)
                for name, column in of(predictions, references).items()
            }
    raise UserError(
        f"{metric} cannot be compared example by example; metrics that can: {', '.join(sum(FAMILIES, ()))}."
    )


def _percent(means: np.ndarray) -> np.ndarray:
    """100 x the one statistic."""
    scores: np.ndarray = 100 * means[..., 0]
    return scores


def _accuracy(predictions: Sequence[str], references: Sequence[Text]) -> dict[str, list[float]]:
    pairs = zip(predictions, references, strict=True)
    return {"accuracy": [float(prediction == reference) for prediction, reference in pairs]}


def _rouge(predictions: Sequence[str], references: Sequence[Text]) -> dict[str, list[float]]:
    """F-measures, of several references the highest; see `metrics.Rouge`."""
    from rouge_score.rouge_scorer import RougeScorer

    from peftbench.tasks.sentences import sentences

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    found: dict[str, list[float]] = {name: [] for name in ROUGE}
    for prediction, reference in zip(predictions, references, strict=True):
        right = ["\n".join(sentences(text)) for text in ([reference] if isinstance(reference, str) else reference)]
        scores = scorer.score_multi(right, "\n".join(sentences(prediction)))
        for name in ROUGE:
            found[name].append(scores[name].fmeasure)
    return found


ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
FAMILIES: dict[tuple[str, ...], Callable[[Sequence[str], Sequence[Text]], dict[str, list[float]]]] = {
    ("accuracy",): _accuracy,
    ROUGE: _rouge,
}
