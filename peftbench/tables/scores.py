"""Scores of a run next to those in its record, as lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from peftbench.config.roles import is_reported
from peftbench.records.record import Record
from peftbench.tables.fields import describe_cut_off


def show_scores(found: Sequence[dict[str, Any]], record: Record, console: Console) -> None:
    """Print one line for each metric of each split; if the record has it too, say whether it is equal, or show it.

    `found` has dicts with the keys role, split, examples, of, metrics and signatures, and cut_off of generated texts.
    """
    for entry in found:
        size = f"{entry['examples']:,}" + (f" of {entry['of']:,}" if entry["of"] else "")
        console.print(f"{entry['split']}, {size} examples", highlight=False)
        width = max(12, *map(len, entry["metrics"]))
        recorded = _find_recorded(record, entry["split"], entry["examples"])
        for name, value in entry["metrics"].items():
            known = recorded.get(name)
            beside = "" if known is None else "as in the record" if known == value else f"record: {known!r}"
            notes = "  ".join(filter(None, (beside, entry["signatures"].get(name))))
            console.print(f"  {name:<{width}} {value!r:<20} {notes}".rstrip(), highlight=False, soft_wrap=True)
        if sentence := describe_cut_off(entry["split"], entry.get("cut_off")):
            console.print(f"  {sentence}", highlight=False, soft_wrap=True)
    reported = [entry["metrics"].get(record.metric) for entry in found if is_reported(entry["role"])]
    if len(reported) > 2 and None not in reported:
        console.print(f"average {record.metric} of {len(reported)} splits: {fmean(reported)!r}", highlight=False)


def _find_recorded(record: Record, split: str, examples: int) -> dict[str, float]:
    """Return the run's own metrics on that number of examples of a split, without those of its baselines."""
    for role, score in record.scores.items():
        if (role == "selection" or is_reported(role)) and (score.split, score.examples) == (split, examples):
            return score.metrics
    return {}
