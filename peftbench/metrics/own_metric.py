"""A metric of the user's own: an `evaluate.Metric` by its dotted name, `task.metric=mypkg.Brevity`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from tempfile import gettempdir
from typing import Any

from evaluate import Metric

from peftbench.config.own_parts import load_class
from peftbench.metrics.statistics import References
from peftbench.utils.errors import UserError

TRIED = (["a text", "another"], ["a text", "a third"])  # predictions and references, before anything is loaded


def compute_own_metric(name: str, predictions: Sequence[str], references: References) -> dict[str, float]:
    """Return the scores of the metric: the first is called `name`, the others as the metric calls them.

    Raises:
        UserError: it cannot be imported, is no evaluate.Metric, fails, or returns no number.
    """
    metric = load_class("task.metric", name, Metric)
    typed = f"task.metric={name}"
    try:
        found = metric(keep_in_memory=True, cache_dir=gettempdir()).compute(
            predictions=list(predictions), references=list(references)
        )
    except Exception as error:
        raise UserError(f"{typed} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict) or not found or not all(_is_number(value) for value in found.values()):
        raise UserError(f"{typed} must return a dict of numbers, the main score first; it returns {str(found)[:80]}.")
    (_, main), *others = found.items()
    return {name: float(main), **{str(key): float(value) for key, value in others}}


def find_own_metric_fault(name: str) -> str | None:
    """Return what is wrong with a metric of the user's own, which is tried on two texts, or None."""
    try:
        scores = compute_own_metric(name, *TRIED)
    except UserError as error:
        return str(error)
    return None if math.isfinite(scores[name]) else f"task.metric={name} of two texts is {scores[name]}, no score."


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str | bool)
