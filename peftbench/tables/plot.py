"""`peftbench plot`: score against a method's cost, as in figures 2, 4 and 5 of He et al. (2022); training curves.

There is a panel for each task, backbone, metric, split and size. Each method has a line over its sizes, or one for each
of the axes that it was tried with. Full fine-tuning is dashed, and the Pareto front is drawn behind the lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftbench.config.axes import CHOICES
from peftbench.records.record import Record
from peftbench.records.run_files import read_metrics
from peftbench.records.wording import format_value
from peftbench.tables.fields import FIELDS, find_field
from peftbench.tables.row import Row, find_front, split_tables
from peftbench.tables.terminal import make_title
from peftbench.utils.differences import find_differing
from peftbench.utils.errors import UserError, describe_unknown
from peftbench.utils.files import write_beside
from peftbench.utils.text import strip_controls

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito (2008): distinguishable for the colour-blind too; the darkest first, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
NAMES = {
    "stored": "stored parameters",
    "trained": "trained parameters",
    "percent": "stored parameters, % of the backbone",
    "memory": "peak memory, GiB",
    "time": "time, s",
    "adapter": "trained tensors on disk, MiB",
    "token_ms": "time of a token in use, ms",
    "use_memory": "peak memory in use, GiB",
    "general_loss": "loss on general text after the training",
}
COLUMNS = 3  # panels next to each other
IN_LEGEND = 17  # names below each other, next to one panel


def save_figure(figure: Figure, file: Path) -> None:
    """Write the picture; in an SVG, words stay text. Names are drawn as they are: an SVG has no controls, and $ is no
    formula."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(strip_controls(text.get_text()))
        text.set_parse_math(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none"}), write_beside(file) as unfinished:
        figure.savefig(unfinished, format=file.suffix.lower().removeprefix("."), dpi=200)


def draw_scores(rows: Sequence[Row], *, x: str = "stored", y: str = "score", by: str = "method") -> Figure:
    """Draw the rows that have a score.

    Args:
        x: the cost, one of `NAMES`; on a logarithmic axis.
        y: "score", or a metric.
        by: the key whose values are the lines; a method tried with several axes has a line for each.

    Raises:
        UserError: no row has both, or a key is unknown.
    """
    scored = [row for row in rows if row.scored]
    for key in (y, by):
        _find_field(key, scored)  # raises if the key is unknown
    panels = [shown for table in split_tables(scored) if (shown := _place_marks(table, x, y))]
    if not panels:
        raise UserError(f"None of these runs has both {x} and {y} to draw.")
    lines = _name_lines([[point.row for point in panel if not point.row.first.is_full] for panel in panels], by)
    return _draw_figure([partial(_draw_panel, points=panel, lines=lines, x=x, y=y) for panel in panels])


def draw_curves(rows: Sequence[Row], *, y: str = "loss", by: str = "method") -> Figure:
    """Draw the values that single runs logged during training, over their steps; a colour for each value of `by`.

    Raises:
        UserError: none of the runs has logged `y`, or the key is unknown.
    """
    _find_field(by, rows)  # raises if the key is unknown
    curves = {id(row): curve for row in rows if (curve := _read_curve(row, y))}
    panels = [shown for table in split_tables(rows) if (shown := [row for row in table if id(row) in curves])]
    if not panels:
        keys = sorted(
            {key for row in rows for line in read_metrics(row.first.folder) for key in line} - {"stage", "step"}
        )
        raise UserError(describe_unknown("--y", y, keys) if keys else "None of these runs has logged anything to draw.")
    names = sorted({_name_row(row, by) for panel in panels for row in panel})
    return _draw_figure(
        [partial(_draw_curve_panel, rows=panel, curves=curves, names=names, y=y, by=by) for panel in panels]
    )


def _find_field(key: str, rows: Sequence[Row]) -> Callable[[Record], Any]:
    return find_field(key, [record for row in rows for record in row.records])


def _draw_figure(panels: Sequence[Callable[[Axes], None]]) -> Figure:
    """Arrange panels next to and below each other, with one legend."""
    from matplotlib import rc_context
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

    across = min(len(panels), COLUMNS)
    down = -(-len(panels) // across)
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(layout="constrained")
        grid = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            panel(axes)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
        longest = max(map(len, handles), default=0)
        beside = math.ceil(len(handles) / (IN_LEGEND * down)) or 1
        figure.set_size_inches(4.4 * across + (0.6 + 0.075 * longest) * beside, 3.5 * down)
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, ncols=beside)
    return figure


class Mark(NamedTuple):
    """A row in a panel."""

    cost: float
    score: float
    spread: float  # the standard deviation over seeds; 0 for one seed
    row: Row


def _place_marks(table: Sequence[Row], x: str, y: str) -> list[Mark]:
    """Return the rows of a table that have both numbers, by cost; none if `y` is another task's metric."""
    try:
        of = _find_field(y, table)
    except UserError:
        return []
    found = []
    for row in table:
        cost, score = row.number(FIELDS[x]), row.number(of)
        if cost and score is not None and not math.isnan(score):
            found.append(Mark(cost, score, row.spread(of) or 0.0, row))
    return sorted(found, key=lambda point: point[:3])


def _draw_panel(axes: Axes, points: Sequence[Mark], lines: dict[int, str], x: str, y: str) -> None:
    full = [point.score for point in points if point.row.first.is_full]
    tuned = [point for point in points if not point.row.first.is_full]
    if full:
        axes.axhline(max(full), color="#666666", linestyle="--", linewidth=1, label="full fine-tuning", zorder=1)
    if y == "score":
        _draw_front(axes, tuned, x)
    for index, name in enumerate(sorted(set(lines.values()))):
        if line := [point for point in tuned if lines[id(point.row)] == name]:
            _draw_line(axes, line, name, index)
    if tuned:
        _set_log_scale(axes, [point.cost for point in tuned])
    rows = [point.row for point in points]
    _label_axes(axes, rows, NAMES[x], rows[0].first.metric if y == "score" else y)


def _draw_front(axes: Axes, points: Sequence[Mark], x: str) -> None:
    best = {id(row) for row in find_front([point.row for point in points], FIELDS[x])}
    edge = [point for point in points if id(point.row) in best]
    if len(edge) > 1:
        costs, scores, *_ = zip(*edge, strict=True)
        axes.plot(costs, scores, label="Pareto front", color="#DDDDDD", linewidth=5, zorder=0)


def _draw_line(axes: Axes, points: Sequence[Mark], name: str, index: int) -> None:
    costs, scores, spreads, _ = zip(*points, strict=True)
    axes.errorbar(
        costs,
        scores,
        yerr=spreads if any(spreads) else None,
        label=name,
        **_choose_style(index),
        linewidth=1.3,
        markersize=7,
        markeredgecolor="white",  # so that overlapping marks can be distinguished
        markeredgewidth=0.5,
        capsize=2,
    )


def _choose_style(index: int) -> dict[str, Any]:
    """Return colour, mark and dashes of a line."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3],
    }


def _set_log_scale(axes: Axes, costs: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    is_short = max(costs) < 10 * min(costs)  # an axis this short would have at most one number
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8) if is_short else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(_shorten))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_curve_panel(
    axes: Axes, rows: Sequence[Row], curves: dict[int, list[tuple[int, float]]], names: Sequence[str], y: str, by: str
) -> None:
    for row in sorted(rows, key=lambda row: names.index(_name_row(row, by))):
        name = _name_row(row, by)
        steps, values = zip(*curves[id(row)], strict=True)
        look = _choose_style(names.index(name))
        if len(steps) >= 30:  # only the few evaluations on the selection split have marks
            look["marker"] = None
        axes.plot(steps, values, label=name, **look, markersize=4)
    _label_axes(axes, rows, "step", y)


def _read_curve(row: Row, y: str) -> list[tuple[int, float]]:
    """Return (step, value) for each time that a run logged `y`, without the training of its head alone."""
    lines = read_metrics(row.first.folder)
    own = [line for line in lines if y in line and line["stage"] == lines[0]["stage"]]
    return [(line["step"], line[y] if type(line[y]) in (int, float) else math.nan) for line in own]


def _label_axes(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    heading = make_title(rows).plain.partition(",")[0].partition(" of ")[0]
    axes.set_title(heading, fontsize=9, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def _name_lines(panels: Sequence[Sequence[Row]], by: str) -> dict[int, str]:
    """Return the name of the line on which each row is a point.

    By method, a method that was tried with several axes has a line for each: adapter · ffn, adapter · attention. The
    same holds, in a panel, for a method that was trained for several lengths, but not for one whose sizes have
    different learning rates.
    """
    rows = [row for panel in panels for row in panel]
    if by != "method":
        return {id(row): _name_row(row, by) for row in rows}
    found = {}
    for method in {row.first.method for row in rows}:
        alike = [(row, _read_axes(row)) for row in rows if row.first.method == method]
        apart = find_differing([axes for _, axes in alike])
        found.update({id(row): " · ".join([method, *(axes[key] for key in apart)]) for row, axes in alike})
    for panel in panels:
        lengths: dict[str, set[str]] = {}
        for row in panel:
            lengths.setdefault(found[id(row)], set()).add(_describe_length(row))
        found |= {
            id(row): f"{name} · {_describe_length(row)}" for row in panel if len(lengths[name := found[id(row)]]) > 1
        }
    return found


def _read_axes(row: Row) -> dict[str, str]:
    """Return the four axes of a row, the composition function with its scale."""
    composition = format_value([axes.composition for axes in row.first.axes])
    return {**{axis: format_value(FIELDS[axis](row.first)) for axis in CHOICES}, "composition_function": composition}


def _describe_length(row: Row) -> str:
    """Return the requested training length of a row's runs; a number of steps overrides one of epochs."""
    trainer = row.first.trainer
    steps, epochs = (format_value(trainer.get(key)) for key in ("max_steps", "epochs"))
    return f"{steps} steps" if steps else f"{epochs} epochs" if epochs else ""


def _name_row(row: Row, by: str) -> str:
    return format_value(find_field(by, row.records)(row.first)) or "none"


def _shorten(number: float, _: object = None) -> str:
    """Format briefly: 0.05, 2, 20K, 1M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
