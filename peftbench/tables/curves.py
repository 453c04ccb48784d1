"""`peftbench plot --curves`: what single runs logged during training, over their steps.

There is a panel for each task, backbone, metric, split and size, and a line for each run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from peftbench.records.run_files import read_metrics
from peftbench.tables.figure import (
    choose_style,
    draw_figure,
    find_row_field,
    label_axes,
    name_lines,
    name_panels,
    round_number,
)
from peftbench.tables.row import Row, split_tables
from peftbench.utils.errors import UserError, describe_unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SELECTION = "selection"  # in place of a logged value: the looks at the selection split, by each task's own metric
MANY = 30  # values of a line from which on they have no marks: looks are few


class Curve(NamedTuple):
    """The line of a run."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]  # NaN where what was logged is no number


@dataclass(frozen=True)
class CurvePanel:
    """Runs that may be compared."""

    title: str
    label: str  # of the values
    curves: list[Curve]


@dataclass(frozen=True)
class Curves:
    """What a picture of curves shows."""

    panels: list[CurvePanel]
    y: str

    @property
    def names(self) -> list[str]:
        """The names of the lines, in order."""
        return sorted({curve.name for panel in self.panels for curve in panel.curves})


def place_curves(rows: Sequence[Row], *, y: str = "loss", by: str = "method") -> Curves:
    """Collect the curves of single runs.

    Args:
        y: a logged value, or `SELECTION`.
        by: the key whose values are the names; a method tried with several axes has a name for each.

    Raises:
        UserError: none of the runs has logged `y`, or the key is unknown.
    """
    find_row_field(by, rows)  # raises if the key is unknown
    found = {id(row): curve for row in rows if (curve := _read_curve(row, y))}
    tables = [shown for table in split_tables(rows) if (shown := [row for row in table if id(row) in found])]
    if not tables:
        keys = {key for row in rows for line in read_metrics(row.first.folder) for key in line} - {"stage", "step"}
        known = [*sorted(keys), *([SELECTION] if any(key.startswith("eval_") for key in keys) else [])]
        raise UserError(
            describe_unknown("--y", y, known) if keys else "None of these runs has logged anything to draw."
        )
    names = name_lines(tables, by)
    panels = []
    for title, table in zip(name_panels(tables), tables, strict=True):
        curves = [Curve(names[id(row)], *found[id(row)]) for row in table]
        label = f"{_find_metric(table[0])} on the selection split" if y == SELECTION else y
        panels.append(CurvePanel(title, label, sorted(curves, key=lambda curve: curve.name)))
    return Curves(panels, y)


def _find_metric(row: Row) -> str:
    """Return the metric by which the states of a run are compared."""
    return row.first.metric if row.first.selection is None else row.first.selection.metric


def _read_curve(row: Row, y: str) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Return the steps and values of a run's `y`, without the training of its head alone; None: it logged none."""
    if y == SELECTION:
        y = f"eval_{_find_metric(row)}"
    lines = read_metrics(row.first.folder)
    own = [line for line in lines if y in line and line["stage"] == lines[0]["stage"]]
    values = tuple(float(line[y]) if type(line[y]) in (int, float) else math.nan for line in own)
    return (tuple(line["step"] for line in own), values) if own else None


def list_curves(curves: Curves) -> list[dict[str, Any]]:
    """Return each line of a picture: its panel, name, steps, and values to six digits, null where it has a gap."""
    return [
        {
            "panel": panel.title,
            "line": curve.name,
            "step": list(curve.steps),
            curves.y: [None if math.isnan(value) else round_number(value) for value in curve.values],
        }
        for panel in curves.panels
        for curve in panel.curves
    ]


def draw_curves(curves: Curves) -> Figure:
    """Draw a panel for each table, with one legend."""
    return draw_figure([partial(_draw_panel, panel=panel, names=curves.names) for panel in curves.panels])


def _draw_panel(axes: Axes, panel: CurvePanel, names: Sequence[str]) -> None:
    for name, steps, values in panel.curves:
        look = choose_style(names.index(name))
        if len(steps) >= MANY:
            look["marker"] = None
        axes.plot(steps, values, label=name, **look, markersize=4)
    label_axes(axes, panel.title, "step", panel.label)
