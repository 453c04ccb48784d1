"""`peftbench plot`: score against a method's cost, as in figures 2, 4 and 5 of He et al. (2022).

There is a panel for each task, backbone, metric, split and size. Each method has a line over its sizes, or one for each
of the axes that it was tried with. Full fine-tuning is dashed. Bars, and the band of full fine-tuning, are the standard
deviation over seeds or the 95% interval of the mean; without intervals the Pareto front is drawn behind the lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from peftbench.records.record import Record
from peftbench.tables.fields import FIELDS
from peftbench.tables.figure import (
    ALONE,
    BESIDE,
    choose_style,
    draw_figure,
    find_row_field,
    label_axes,
    name_lines,
    name_panels,
    round_number,
)
from peftbench.tables.row import Row, find_front, split_tables
from peftbench.utils.differences import merge_alike
from peftbench.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
APART, WIDEST = 8, 0.16  # points between two bars at one cost; share of the axis that all of them may have
ALIKE = 1.15  # costs that differ by less are one cost to bars
FULL = "full fine-tuning"


class Mark(NamedTuple):
    """A row in a panel."""

    cost: float
    score: float
    low: float  # ends of its bar; the score itself without one
    high: float
    row: Row


@dataclass(frozen=True)
class Panel:
    """Rows that may be compared."""

    title: str
    marks: list[Mark]  # by cost
    bars: str  # what the bars are; "" without any

    @property
    def full(self) -> Mark | None:
        """The best full fine-tuning, drawn as a line across."""
        return max((mark for mark in self.marks if mark.row.first.is_full), key=lambda mark: mark.score, default=None)

    @property
    def tuned(self) -> list[Mark]:
        """What is not full fine-tuning."""
        return [mark for mark in self.marks if not mark.row.first.is_full]


@dataclass(frozen=True)
class Scores:
    """What a picture of scores shows."""

    panels: list[Panel]
    lines: dict[int, str]  # by a row's id: the name of the line on which it is a point
    x: str
    y: str
    interval: bool

    @property
    def names(self) -> list[str]:
        """The names of the lines, in order."""
        return sorted(set(self.lines.values()))


def place_scores(
    rows: Sequence[Row], *, x: str = "stored", y: str = "score", by: str = "method", interval: bool = False
) -> Scores:
    """Place the rows that have a score.

    Args:
        x: the cost, one of `NAMES`; on a logarithmic axis.
        y: "score", or a metric.
        by: the key whose values are the lines; a method tried with several axes has a line for each.
        interval: bars are the 95% interval of the mean, not the standard deviation over seeds.

    Raises:
        UserError: no row has both, or a key is unknown.
    """
    scored = [row for row in rows if row.scored]
    for key in (y, by):
        find_row_field(key, scored)  # raises if the key is unknown
    tables = split_tables(scored)
    placed = [_place_marks(table, x, y, interval) for table in tables]
    shown = [(table, *found) for table, found in zip(tables, placed, strict=True) if found[0]]
    if not shown:
        raise UserError(f"None of these runs has both {x} and {y} to draw.")
    titles = name_panels([table for table, _, _ in shown])
    panels = [Panel(title, marks, bars) for title, (_, marks, bars) in zip(titles, shown, strict=True)]
    lines = name_lines([[mark.row for mark in panel.tuned] for panel in panels], by)
    return Scores(panels, lines, x, y, interval)


def list_marks(scores: Scores) -> list[dict[str, Any]]:
    """Return each mark of a picture: its panel, line, cost and score, and the ends of its bar if it has one. Numbers
    have six digits, which are the same on every machine."""
    found = []
    for panel in scores.panels:
        for mark in [*([panel.full] if panel.full else []), *panel.tuned]:
            line = FULL if mark.row.first.is_full else scores.lines[id(mark.row)]
            ends = {"low": mark.low, "high": mark.high} if mark.low < mark.high else {}
            numbers = {scores.x: mark.cost, scores.y: mark.score, **ends}
            rounded = {key: round_number(number) for key, number in numbers.items()}
            found.append({"panel": panel.title, "line": line, **rounded})
    return found


def draw_scores(scores: Scores) -> Figure:
    """Draw a panel for each table, with one legend."""
    ranges = [_choose_range([mark.cost for mark in panel.tuned]) for panel in scores.panels]
    if scores.x == "percent":  # a share means the same in every panel
        known = [one for one in ranges if one is not None]
        ranges = [(min(low for low, _ in known), max(high for _, high in known)) if known else None] * len(ranges)
    panels = [
        partial(_draw_panel, panel=panel, scores=scores, limits=limits)
        for panel, limits in zip(scores.panels, ranges, strict=True)
    ]
    return draw_figure(panels, _explain_bars(scores))


def _explain_bars(scores: Scores) -> str:
    """Return what bars mean: once, or for each panel where they differ in it."""
    bars = [(panel.bars, panel.title) for panel in scores.panels if panel.bars]
    if not bars:
        return ""
    told = merge_alike(bars)
    beside = ["marks of one size stand side by side"] if scores.interval else []
    return "; ".join([f"bars: {told[0]}", *told[1:], *beside])


def _choose_range(costs: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of a logarithmic axis of costs, with room for marks that stand next to each other."""
    if not costs:
        return None
    room = 1.2 * (max(costs) / min(costs)) ** 0.1
    return min(costs) / room, max(costs) * room


def _place_marks(table: Sequence[Row], x: str, y: str, interval: bool) -> tuple[list[Mark], str]:
    """Return the rows of a table that have both numbers, by cost, and what their bars are; none if `y` is another
    task's metric."""
    try:
        of = find_row_field(y, table)
    except UserError:
        return [], ""
    ends, bars = _find_bars(table, of, y in ("score", table[0].first.metric), interval)
    found = []
    for row in table:
        cost, score = row.number(FIELDS[x]), row.number(of)
        if cost and score is not None and not math.isnan(score):
            found.append(Mark(cost, score, *ends.get(id(row), (score, score)), row))
    return sorted(found, key=lambda mark: mark[:4]), bars


def _find_bars(
    table: Sequence[Row], of: Callable[[Record], Any], is_score: bool, interval: bool
) -> tuple[dict[int, tuple[float, float]], str]:
    """Return the ends of the rows' bars, by a row's id, and what they are."""
    if interval:
        from peftbench.tables.intervals import describe_ways, estimate_means  # slow to import

        intervals = estimate_means(table, of, is_score)
        ends = {key: (one.low, one.high) for key, one in intervals.items()}
        ways = describe_ways(intervals.values())
        return ends, f"95% interval of the mean, {ways}" if ways else ""
    found = {}
    for row in table:
        score, spread = row.number(of), row.spread(of)
        if score is not None and spread:
            found[id(row)] = (score - spread, score + spread)
    return found, "standard deviation over seeds" if found else ""


def _draw_panel(axes: Axes, panel: Panel, scores: Scores, limits: tuple[float, float] | None) -> None:
    tuned = panel.tuned
    if panel.full is not None:
        axes.axhline(panel.full.score, color="#666666", linestyle="--", linewidth=1, label=FULL, zorder=1)
        if panel.full.low < panel.full.high:
            axes.axhspan(panel.full.low, panel.full.high, color="#666666", alpha=0.12, linewidth=0, zorder=0)
    if scores.y == "score" and not scores.interval:
        _draw_front(axes, tuned, scores.x)
    aside = _stand_apart(tuned, scores, limits) if scores.interval and limits else {}
    for index, name in enumerate(scores.names):
        if line := [mark for mark in tuned if scores.lines[id(mark.row)] == name]:
            _draw_line(axes, line, name, index, [mark.cost * aside.get(id(mark.row), 1.0) for mark in line])
    if limits:
        _set_log_scale(axes, limits)
    _limit_bars(axes, panel.marks)
    first = panel.marks[0].row.first
    label_axes(axes, panel.title, NAMES[scores.x], first.metric if scores.y == "score" else scores.y)


def _stand_apart(marks: Sequence[Mark], scores: Scores, limits: tuple[float, float]) -> dict[int, float]:
    """Return by how much to multiply the costs of marks, by a row's id, so that no bar hides that of a mark that costs
    as much: they stand around their place in the order of their lines."""
    wide = ALONE[0] if len(scores.panels) == 1 else BESIDE[0]
    whole = math.log(limits[1] / limits[0])
    groups: list[list[Mark]] = []
    for mark in marks:
        if groups and mark.cost < ALIKE * groups[-1][0].cost:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    found = {}
    for group in groups:
        # an axis has about 0.8 of its panel's width
        step = whole * min(APART / (0.8 * 72 * wide), WIDEST / len(group))
        group.sort(key=lambda mark: scores.lines[id(mark.row)])
        middle = math.exp(sum(math.log(mark.cost) for mark in group) / len(group))
        for index, mark in enumerate(group):
            found[id(mark.row)] = middle / mark.cost * math.exp(step * (index - (len(group) - 1) / 2))
    return found


def _limit_bars(axes: Axes, marks: Sequence[Mark]) -> None:
    """Let single bars run out of the picture that would leave no room for the scores: one of two seeds can be that
    long."""
    scores, bars = [mark.score for mark in marks], [mark.high - mark.low for mark in marks]
    most = max(max(scores) - min(scores), median(bars)) or math.inf
    low = min(max(mark.low, mark.score - most) for mark in marks)
    high = max(min(mark.high, mark.score + most) for mark in marks)
    if low < high:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _draw_front(axes: Axes, points: Sequence[Mark], x: str) -> None:
    best = {id(row) for row in find_front([point.row for point in points], FIELDS[x])}
    edge = [point for point in points if id(point.row) in best]
    if len(edge) > 1:
        costs, scores, *_ = zip(*edge, strict=True)
        axes.plot(costs, scores, label="Pareto front", color="#DDDDDD", linewidth=5, zorder=0)


def _draw_line(axes: Axes, marks: Sequence[Mark], name: str, index: int, places: Sequence[float]) -> None:
    """Draw a line of a panel, its marks at these places of the axis of costs."""
    _, scores, lows, highs, _ = zip(*marks, strict=True)
    ends = [[score - low for score, low in zip(scores, lows, strict=True)]]
    ends += [[high - score for score, high in zip(scores, highs, strict=True)]]
    axes.errorbar(
        places,
        scores,
        yerr=ends if any(map(any, ends)) else None,
        label=name,
        **choose_style(index),
        linewidth=1.3,
        markersize=6,
        markeredgecolor="white",  # so that overlapping marks can be distinguished
        markeredgewidth=0.5,
        capsize=2,
    )


def _set_log_scale(axes: Axes, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(limits)
    decades = math.log10(limits[1] / limits[0])
    # below one decade there would be at most one number, and above two more than there is room for
    subs = (1, 1.5, 2, 3, 4, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(_shorten))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shorten(number: float, _: object = None) -> str:
    """Format briefly: 0.05, 2, 20K, 1M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
