"""Values of a record as text, as they are typed and shown."""

from __future__ import annotations

from typing import Any

from peftbench.records.record import Searched, Selection


def format_value(value: Any) -> str:
    """Return a value as it is shown and typed: the values of a mixture joined by " + ", "" for None."""
    if isinstance(value, list):
        return " + ".join(map(format_value, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def describe_selection(selection: Selection) -> str:
    """Return the score that a search compares, such as "accuracy on validation 61.00"."""
    value = "not finite" if selection.value is None else f"{selection.value:.2f}"
    return f"{selection.metric} on {selection.split} {value}"


def describe_search(search: Searched) -> str:
    """Return the values that a search tried, with their scores on the selection split or why there is none."""
    if search.role == "trial":
        return f"trial: {format_settings(search.chosen)}"
    if not search.trials:  # of a study, whose trials have records of their own
        return f"chosen: {format_settings(search.chosen)}"
    name = format_settings if len(search.keys) > 1 else lambda settings: format_value(*settings.values())
    scores = [trial.status if trial.value is None else f"{trial.value:.2f}" for trial in search.trials]
    listed = (f"{name(trial.settings)}: {score}" for trial, score in zip(search.trials, scores, strict=True))
    return ("" if len(search.keys) > 1 else f"{next(iter(search.keys))} ") + ", ".join(listed)


def format_settings(setting: dict[str, Any]) -> str:
    """Return values as they are typed."""
    return " ".join(f"{key}={format_value(value)}" for key, value in setting.items())
