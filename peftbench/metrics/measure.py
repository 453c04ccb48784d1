"""Every metric by the names of its scores, and the scores of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peftbench.config.own_parts import is_own
from peftbench.metrics.answers import ANSWER_SCORES, compute_answers
from peftbench.metrics.classification import compute_accuracy, compute_f1, compute_macro_f1, compute_matthews
from peftbench.metrics.entities import ENTITY_SCORES, compute_entities
from peftbench.metrics.final_answer import compute_choice, compute_final_number
from peftbench.metrics.regression import compute_correlations
from peftbench.metrics.statistics import Definition, References, Statistics
from peftbench.metrics.text import ROUGE_TYPES, compute_bleu, compute_exact_match, compute_romanian_bleu, compute_rouge
from peftbench.utils.errors import UserError

# Which of them suit which kind of task is `config.task_validity.METRIC_NAMES`.
DEFINITIONS: dict[str, Definition] = {
    "accuracy": compute_accuracy,
    "f1": compute_f1,
    "macro_f1": compute_macro_f1,
    "matthews": compute_matthews,
    "pearson": compute_correlations,
    "spearman": compute_correlations,
    **dict.fromkeys(ENTITY_SCORES, compute_entities),
    **dict.fromkeys(ANSWER_SCORES, compute_answers),
    **dict.fromkeys(ROUGE_TYPES, compute_rouge),
    "bleu": compute_bleu,
    "chrf": compute_bleu,
    "bleu_ro": compute_romanian_bleu,
    "exact_match": compute_exact_match,
    "final_number": compute_final_number,
    "choice": compute_choice,
}


class Measured(NamedTuple):
    """Scores in percent, and the signatures of those that have one: how exactly they were computed."""

    scores: dict[str, float]
    signatures: dict[str, str]


def measure(metric: str, predictions: Sequence[str], references: References, labels: Sequence[str] = ()) -> Measured:
    """Return all scores of the metric that has a score called `metric`.

    >>> measure("accuracy", ["yes", "no", "no", "no"], ["yes", "no", "no", "yes"]).scores
    {'accuracy': 75.0}

    Args, Raises: as in `compute_statistics`.
    """
    if is_own(metric):
        from peftbench.metrics.own_metric import compute_own_metric  # imports evaluate, and so torch

        return Measured(compute_own_metric(metric, predictions, references), {})
    found = compute_statistics(metric, predictions, references, labels)
    scores = {name: one.score_all() for name, one in found.items()}
    return Measured(scores, {name: one.signature for name, one in found.items() if one.signature})


def compute_statistics(
    metric: str, predictions: Sequence[str], references: References, labels: Sequence[str] = ()
) -> dict[str, Statistics]:
    """Return the statistics of each score of the metric that has a score called `metric`.

    Args:
        labels: the task's, in the order of their codes; of two labels, the second is the one that F1 looks for.

    Raises:
        UserError: there is no such metric.
        ValueError: there are no examples, or not as many predictions as references.
    """
    if metric not in DEFINITIONS:
        raise UserError(f"{metric} cannot be compared example by example; metrics that can: {', '.join(DEFINITIONS)}.")
    if not len(predictions) == len(references) > 0:
        raise ValueError(f"{metric} of {len(predictions)} predictions and {len(references)} references is undefined.")
    return DEFINITIONS[metric](predictions, references, labels)


def restore_statistics(metric: str, rows: np.ndarray, labels: Sequence[str] = ()) -> Statistics:
    """Return the statistics of a score from their rows alone: how it follows from their sums is the same for all texts.

    Args:
        rows: (examples, k), as `compute_statistics` returned them.
        labels: as there.
    """
    return Statistics(rows, compute_statistics(metric, ["0"], ["0"], labels)[metric].score)
