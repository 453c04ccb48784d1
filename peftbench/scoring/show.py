"""Scores of a run beside those in its record, as lines for the terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from peftbench.results.fields import said_of_cut_off
from peftbench.results.record import Record
from peftbench.tasks.roles import is_reported


def show_scores(found: Sequence[dict[str, Any]], record: Record, console: Console) -> None:
    """One line for each metric of each split; where the record has it too, whether it is the same, or by how much not.

    `found` has dicts with the keys role, split, examples, of, metrics and signatures, and cut_off of generated texts.
    """
    for entry in found:
        size = f"{entry['examples']:,}" + (f" of {entry['of']:,}" if entry["of"] else "")
        console.print(f"{entry['split']}, {size} examples", highlight=False)
        recorded = _recorded(record, entry["split"], entry["examples"])
        for name, value in entry["metrics"].items():
            known = recorded.get(name)
            beside = "" if known is None else "as in the record" if known == value else f"record: {known!r}"
            notes = "  ".join(filter(None, (beside, entry["signatures"].get(name))))
            console.print(f"  {name:<12} {value!r:<20} {notes}".rstrip(), highlight=False, soft_wrap=True)
        if sentence := said_of_cut_off(entry["split"], entry.get("cut_off")):
            console.print(f"  {sentence}", highlight=False, soft_wrap=True)


def _recorded(record: Record, split: str, examples: int) -> dict[str, float]:
    """The run's own metrics on as many examples of a split; not those of its baselines."""
    for role, score in record.scores.items():
        if (role == "selection" or is_reported(role)) and (score.split, score.examples) == (split, examples):
            return score.metrics
    return {}
