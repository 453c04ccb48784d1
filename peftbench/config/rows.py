"""The rows of the paper's tables (conf/rows.yaml): the settings of row=NAME, and the paper's scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from peftbench.config.schema import find_conf_dir

GROUP = "row"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is not available everywhere

Scores = Mapping[str, Mapping[str, Any]]  # by table and task; `rouge` is ROUGE-1/2/L


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables."""

    help: str
    settings: Mapping[str, Any]  # by key: a string is the choice of a group, such as method; others are values
    paper: Scores

    @property
    def choices(self) -> dict[str, str]:
        """The choice of each group."""
        return {group: choice for group, choice in self.settings.items() if isinstance(choice, str)}

    @property
    def config(self) -> dict[str, Any]:
        """The row as a Hydra config with the package _global_."""
        defaults = [{f"override /{group}": choice} for group, choice in self.choices.items()]
        return {"defaults": defaults, **{key: self.settings[key] for key in self.settings if key not in self.choices}}


@cache
def read_rows() -> dict[str, PaperRow]:
    """Return the rows by name."""
    return {
        name: PaperRow(
            help=row["help"],
            settings={key: row[key] for key in row if key not in ("help", "paper")},
            paper=row["paper"],
        )
        for name, row in _read()["rows"].items()
    }


def read_scores(row: str | None, method: str) -> Scores:
    """Return the paper's scores for a row, or without one for a method at its usual size; {} if there are none."""
    if row is None:
        found: Scores = _read()["methods"].get(method, {})
        return found
    known = read_rows().get(row)
    return {} if known is None else known.paper


@cache
def _read() -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((find_conf_dir() / "rows.yaml").read_bytes(), LOADER)
    return found
