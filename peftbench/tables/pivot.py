"""A table across two keys of the runs, such as methods in rows and insertion forms in columns.

By default, a column contains only scores that may be compared, and a cell only runs that differ in nothing but their
seed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from peftbench.config.axes import CHOICES
from peftbench.config.identity import IGNORED
from peftbench.records.record import Record
from peftbench.records.wording import format_value
from peftbench.tables.columns import BELOW_MARK, Column
from peftbench.tables.fields import COSTS, FIELDS, MANY_CUT_OFF, find_field
from peftbench.tables.row import Row, Statistic, drop_retrained, identify_point, is_below_baseline, is_scored
from peftbench.utils.differences import find_differing, flatten
from peftbench.utils.errors import UserError
from peftbench.utils.text import format_count

if TYPE_CHECKING:
    from peftbench.tables.intervals import Interval

CUT_MARK = "†"  # a score of generated texts of which many ended by their length
# The settings that runs must share for their scores to be in one column.
COMPARABLE = ("task", "model", "metric", "split", "examples", "train_examples", "fidelity", "debug")


@dataclass(frozen=True)
class PivotLine:
    """A row of the table: its labels, and the runs of each of its cells by the labels of the column."""

    labels: tuple[str, ...]
    cells: dict[tuple[str, ...], Row]


def pivot_records(
    records: Sequence[Record],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    value: str = "score",
    mixed: Sequence[str] = (),
    statistic: Statistic = "mean",
    interval: bool = False,
) -> tuple[str, list[Column[PivotLine]], list[PivotLine]]:
    """Return title, columns and lines of the table of `value`, over those of `records` that have a score.

    Args:
        rows, columns: keys, as for filters; their values label the lines and the columns.
        mixed: keys that may differ within a column or a cell.
        interval: show the 95% interval of the mean in place of the standard deviation.

    Raises:
        UserError: a key is unknown, or `value` is not a number; or a column or a cell would mix runs that differ in a
            key that is not `mixed`.
    """
    scored = [record for record in records if is_scored(record)]
    if not scored:
        raise UserError("None of these runs has a score to put into a table.")
    across, down = ([find_field(key, scored) for key in keys] for keys in (columns, rows))
    shown = find_field(value, scored)
    if not all(isinstance(shown(record), int | float | None) for record in scored):
        raise UserError(f"--value {value} is not a number, as score and stored are; put it into --rows or --columns.")
    told = {*rows, *columns, *mixed}

    sides = ((rows, down), (columns, across))
    grid: dict[tuple[str, ...], dict[tuple[str, ...], list[Record]]] = {}
    for record in scored:
        label, head = (tuple(map(_format_label, keys, (of(record) for of in side))) for keys, side in sides)
        grid.setdefault(label, {}).setdefault(head, []).append(record)
    heads = sorted({head for cells in grid.values() for head in cells}, key=_sort_naturally)
    in_columns = {" ".join(head): [run for cells in grid.values() for run in cells.get(head, [])] for head in heads}
    fault = _explain_incomparable(in_columns, told) or _explain_several(
        [cell for line in grid.values() for cell in line.values()], told
    )
    if fault:
        raise UserError(fault)

    lines = [
        PivotLine(label, {head: Row(tuple(drop_retrained(cell)), statistic) for head, cell in grid[label].items()})
        for label in sorted(grid, key=_sort_naturally)
    ]
    labels = [
        Column[PivotLine](key, key, partial(_get_label, index), words=True, wrap=20) for index, key in enumerate(rows)
    ]
    better: Literal["higher", "lower"] = "lower" if value in COSTS else "higher"
    intervals = _estimate_cells(lines, shown, value) if interval else {}
    seeds = {len(row.scored) for line in lines for row in line.cells.values()}
    form = _Form(value not in FIELDS or value == "score", value == "score", not interval or len(seeds) > 1)
    beside = partial(_get_half, intervals) if interval else partial(_get_deviation, shown)
    numbers = [
        Column[PivotLine](
            ", ".join(head) or value,
            "\n".join(label or "none" for label in head) or value,
            partial(_format_cell, head, shown, beside, form),
            partial(_get_number, head, shown),
            None if interval else partial(_get_spread, head, shown),
            better,
            interval=partial(_get_interval, head, intervals) if interval else None,
        )
        for head in heads
    ]
    shown_cells = [column.cell(line) for column in numbers for line in lines]
    meanings = {
        CUT_MARK: f"more than {MANY_CUT_OFF:.0%} of the texts were cut off",
        BELOW_MARK: "below a baseline",
    }
    legend = "".join(f"; {mark} {what}" for mark, what in meanings.items() if any(mark in cell for cell in shown_cells))
    return _write_title(value, scored) + legend + _explain(intervals, heads, lines), [*labels, *numbers], lines


def _write_title(value: str, records: Sequence[Record]) -> str:
    """Return the name of the value, and the settings that all of its runs share."""
    shared = {key: {format_value(FIELDS[key](record)) for record in records} for key in ("method", *COMPARABLE)}
    told = [f"{key}={found.pop()}" for key, found in shared.items() if len(found) == 1]
    return f"{value} of {format_count(len(records), 'run')}: " + ", ".join(
        word for word in told if not word.endswith("=")
    )


def _explain_incomparable(columns: dict[str, list[Record]], told: set[str]) -> str | None:
    """Return the sentence that refuses to put the runs of a column together, or None if all may be compared."""
    differences: dict[str, Counter[str]] = {}
    refused = []
    for name, records in columns.items():
        counted = {
            key: Counter(format_value(FIELDS[key](record)) or "none" for record in records) for key in COMPARABLE
        }
        counted["data"] = Counter(content for record in records if (content := format_value(FIELDS["data"](record))))
        mixed = {key: values for key, values in counted.items() if key not in told and len(values) > 1}
        refused += [name] if mixed else []
        for key, values in mixed.items():
            differences.setdefault(key, Counter()).update(values)
    if not refused:
        return None
    where = "one column" if len(columns) == 1 else f"the column {refused[0] or 'none'}"
    others = f" (and {format_count(len(refused) - 1, 'other')})" if len(refused) > 1 else ""
    seen = "; ".join(
        f"{key}: " + ", ".join(f"{value} ({format_count(number, 'run')})" for value, number in values.most_common())
        for key, values in differences.items()
    )
    first = next(iter(differences))
    return (
        f"These runs cannot be compared in {where}{others}, because they differ in {seen}. Choose by a filter such as "
        f"{first}={differences[first].most_common(1)[0][0]}, put the key into --rows or --columns, or allow it with "
        f"--mix {','.join(differences)}."
    )


def _explain_several(cells: Sequence[Sequence[Record]], told: set[str]) -> str | None:
    """Return the sentence that refuses to average runs of a cell that differ in more than the seed, or None."""
    refused: list[Record] = []
    differences: dict[str, dict[str, None]] = {}
    for cell in cells:
        first: dict[str, Record] = {}
        for record in cell:
            first.setdefault(identify_point(record), record)
        if len(first) == 1 or "all" in told:
            continue
        visible = [_read_visible(record) for record in first.values()]
        differ = find_differing(visible)
        keys = [key for key in differ if key not in told]
        if keys or not differ:  # settings that the records do not show are in a folder's config.yaml
            refused.append(cell[0])
        for key in keys:
            differences.setdefault(key, {}).update(dict.fromkeys(format_value(one.get(key)) for one in visible))
    if not refused:
        return None
    seen = "; ".join(f"{key}: {', '.join(map(str, found))}" for key, found in list(differences.items())[:4])
    where = f"cell of {refused[0].method} on {refused[0].task}"
    where = f"{len(refused)} cells, such as the {where}," if len(refused) > 1 else f"The {where}"
    return (
        f"{where} would hold a mean over settings that differ in more than "
        f"the seed ({seen or 'compare two of them with peftbench compare'}). Choose by a filter, put the key into "
        f"--rows or --columns, or allow it with --mix {','.join(differences) or 'all'}."
    )


def _read_visible(record: Record) -> dict[str, Any]:
    """Return the settings of a run that its record shows."""
    keys = ("method", "unfreeze", "debug", "deviations", "bottleneck", "scale", *CHOICES, *COMPARABLE)
    options = {f"{one.prefix}{key}": value for one in record.axes for key, value in one.options.items()}
    trainer = {
        "learning_rate" if key == "trainer.learning_rate" else key: value
        for key, value in flatten(record.trainer, "trainer.")
        if key not in IGNORED
    }
    return {**{key: FIELDS[key](record) for key in keys}, **options, **trainer}


def _format_label(key: str, value: Any) -> str:
    """Return the label of a line or a column.

    A share is rounded as tables show it: bottlenecks are integers, and reach no share exactly.
    """
    return f"{value:.2f}" if key == "percent" and value is not None else format_value(value)


def _get_label(index: int, line: PivotLine) -> str:
    return line.labels[index]


@dataclass(frozen=True)
class _Form:
    """How the numbers of a table are written."""

    is_score: bool  # of the main metric or another
    is_main: bool
    with_seeds: bool


def _format_cell(
    head: tuple[str, ...],
    of: Callable[[Record], float | None],
    beside: Callable[[Row], float | None],
    form: _Form,
    line: PivotLine,
) -> str:
    """Return the value of a cell; a score of texts of which many were cut off, or below a baseline, is marked."""
    value = _get_number(head, of, line)
    if value is None:
        return ""
    row = line.cells[head]
    shown = f"{value:.2f}" if abs(value) < 1e4 else f"{value:,.0f}"
    if (spread := beside(row)) is not None:
        shown = f"{shown} ± {spread:.2f}" + (f" ({len(row.records)})" if form.with_seeds else "")
    many = any((FIELDS["cut_off"](record) or 0) > MANY_CUT_OFF for record in row.records)
    below = form.is_main and is_below_baseline(row)
    return " ".join([shown, *([CUT_MARK] if form.is_score and many else []), *([BELOW_MARK] if below else [])])


def _estimate_cells(
    lines: Sequence[PivotLine], of: Callable[[Record], float | None], value: str
) -> dict[int, Interval]:
    """Return the interval of each cell by its row's id."""
    from peftbench.tables.intervals import estimate_means  # slow to import, and most tables show no interval

    cells = [row for line in lines for row in line.cells.values()]
    main = [row for row in cells if value in ("score", row.first.metric)]
    others = [row for row in cells if value not in ("score", row.first.metric)]
    return estimate_means(main, of, True) | estimate_means(others, of, False)


def _explain(intervals: Mapping[int, Interval], heads: Sequence[tuple[str, ...]], lines: Sequence[PivotLine]) -> str:
    """Return what ± means beside intervals, for each column if columns differ in it; seeds are in the cells."""
    if not intervals:
        return ""
    from peftbench.tables.intervals import describe_ways_of

    told = describe_ways_of(
        {
            " ".join(head): [intervals[id(line.cells[head])] for line in lines if id(line.cells.get(head)) in intervals]
            for head in heads
        }
    )
    return f"; ± is half the 95% interval of the mean: {told}"


def _get_half(intervals: Mapping[int, Interval], row: Row) -> float | None:
    return intervals[id(row)].half if id(row) in intervals else None


def _get_deviation(of: Callable[[Record], float | None], row: Row) -> float | None:
    return row.spread(of)


def _get_interval(head: tuple[str, ...], intervals: Mapping[int, Interval], line: PivotLine) -> Interval | None:
    return intervals.get(id(line.cells[head])) if head in line.cells else None


def _get_number(head: tuple[str, ...], of: Callable[[Record], float | None], line: PivotLine) -> float | None:
    return line.cells[head].number(of) if head in line.cells else None


def _get_spread(head: tuple[str, ...], of: Callable[[Record], float | None], line: PivotLine) -> float | None:
    return line.cells[head].spread(of) if head in line.cells else None


def _sort_naturally(labels: tuple[str, ...]) -> list[tuple[list[float], str]]:
    """Return a sort key that orders numbers as numbers, including those of a mixture and percentages, and words as
    words."""
    found = []
    for label in labels:
        try:
            found.append(([float(part.removesuffix("%")) for part in label.split(" + ")], ""))
        except ValueError:
            found.append(([math.inf], label))
    return found
