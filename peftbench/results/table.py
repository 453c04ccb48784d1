"""Records as tables for the terminal, and as JSON and CSV. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from peftbench.results.record import Axes, Record, flatten

AXES_WIDTH = 22  # characters; narrower, the four axes take too many lines to be read
OVERRIDES_TO_KEEP = re.compile(r"\+?(task|model|trainer|debug|output_dir)\b")  # in the sweep that is proposed


@dataclass(frozen=True)
class Column:
    """A column: `cell` gives a record's text, or a modification's where `of_axes` does.

    Where the columns do not fit, those with the highest `dispensable` go first; 0 stays.
    """

    header: str
    cell: Callable[[Record], str] | None = None
    of_axes: Callable[[Axes], str] | None = None
    dispensable: int = 0
    justify: Literal["left", "right"] = "right"


def show(records: Sequence[Record], console: Console) -> None:
    """Prints one table, best run first, for each task, backbone, metric, split and number of examples.

    Runs without a score stand below those of their task and backbone.
    """
    scored = sorted((record for record in records if _is_scored(record)), key=_setting)
    tables = [list(group) for _, group in groupby(scored, key=_setting)]
    for record in records:
        if not _is_scored(record):
            _home(tables, record).append(record)
    for index, table in enumerate(tables):
        if index:
            console.print()
        table.sort(key=lambda record: (not _is_scored(record), -(record.score or 0), record.method, record.seed))
        console.print(_title(table[0]), soft_wrap=True)
        console.print(_fitting(_columns(table), table, console))


def single_row(record: Record, console: Console) -> None:
    """Prints the table of one finished run, its folder, and two commands to try next."""
    columns = [column for column in _columns([record]) if column.header not in ("seed", "status")]
    table = _table(columns, [record])
    console.print(_title(record), soft_wrap=True)
    if Measurement.get(console, console.options, table).minimum <= console.width:
        console.print(table)
    else:
        console.print(_list(columns, record))
    root = record.folder.parents[3]
    results = "peftbench results" if root == Path("outputs") else f"peftbench results {shlex.quote(str(root))}"
    kept = shlex.join(override for override in record.overrides if OVERRIDES_TO_KEEP.match(override))
    console.print()
    # Neither wrapped nor highlighted: these lines are there to be copied.
    for label, line in (
        ("The run is in", str(record.folder)),
        ("All runs", results),
        ("Other methods", f"peftbench train -m method=lora,adapter,prefix,mam {kept}".rstrip()),
    ):
        console.print(Text.assemble((f"{label}: ".ljust(15), "dim"), line), soft_wrap=True)


def to_json(records: Iterable[Record]) -> str:
    """A JSON array of the records, each with its `folder`."""
    return json.dumps([{**record.to_json(), "folder": str(record.folder)} for record in records], indent=2)


def to_csv(records: Iterable[Record]) -> str:
    """One line for each record; dotted keys are the columns. A mixture's axes are joined by " + "."""
    rows = [_flat(record) for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(record: Record) -> dict[str, Any]:
    values = record.to_json()
    axes = values.pop("axes")
    joined = {
        key: " + ".join("" if one[key] is None else str(one[key]) for one in axes)
        for key in Axes.__dataclass_fields__
        if key != "options"
    }
    row = {"folder": str(record.folder), **dict(flatten({**values, "axes": joined}))}
    return {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}


def _is_scored(record: Record) -> bool:
    return record.status == "done" and record.score is not None and not math.isnan(record.score)


def _setting(record: Record) -> tuple[str, ...]:
    """What two runs share whose scores may be compared: task, backbone, metric, split and its size."""
    report = record.scores.get("report")
    split = (report.split, f"{report.examples:,}") if report and _is_scored(record) else ("", "")
    model = record.model
    return (record.task, model.name, model.content or model.revision or "", record.metric, *split)


def _home(tables: list[list[Record]], record: Record) -> list[Record]:
    """The table in which a run without a score is listed: the first of its task, backbone and metric."""
    for table in tables:
        if _setting(table[0])[:4] == _setting(record)[:4]:
            return table
    tables.append([])
    return tables[-1]


def _title(record: Record) -> Text:
    task, model, version, metric, split, examples = _setting(record)
    size = f" of {record.counts.backbone:,} parameters" if record.counts else ""
    where = f", {metric} on {examples} {split} examples" if split else ""
    return Text.assemble((task, "bold"), " with ", (model, "bold"), f"@{version[:8]}" if version else "", size, where)


def _columns(records: Sequence[Record]) -> list[Column]:
    baselines = list(dict.fromkeys(name for record in records for name in record.baselines))
    columns = [
        Column("method", cell=_method, justify="left"),
        Column("form · representation · insertion · composition", of_axes=_four, justify="left"),
        Column("bottle-\nneck", of_axes=lambda axes: "" if axes.bottleneck is None else f"{axes.bottleneck:,}"),
        Column("trained", lambda r: f"{r.counts.trained:,}" if r.counts else "", dispensable=3),
        Column("stored", lambda r: f"{r.counts.stored:,}" if r.counts else "", dispensable=1),
        Column("% of\nmodel", lambda r: f"{r.counts.percent['stored']:.2f}" if r.counts else ""),
        # Every metric of the tasks is better when higher.
        Column(f"{records[0].metric} ↑", lambda r: _number(r.score)),
        *(Column(name, lambda r, name=name: _number(r.baselines.get(name)), dispensable=2) for name in baselines),
        Column("time", lambda r: _time(r.timings.get("total_s")), dispensable=5),
        Column("seed", lambda r: str(r.seed), dispensable=4),
    ]
    if any(record.status != "done" for record in records):
        columns.append(Column("status", _status, justify="left"))
    return columns


def _fitting(columns: list[Column], records: Sequence[Record], console: Console) -> Table:
    """The table of as many columns as the console is wide enough for."""
    while True:
        table = _table(columns, records)
        least = max(columns, key=lambda column: column.dispensable)
        if not least.dispensable or Measurement.get(console, console.options, table).minimum <= console.width:
            return table
        columns = [column for column in columns if column is not least]


def _table(columns: Sequence[Column], records: Sequence[Record]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        is_four = column.of_axes is _four
        table.add_column(
            column.header, justify=column.justify, no_wrap=not is_four, min_width=AXES_WIDTH if is_four else None
        )
    for index, record in enumerate(records):
        if index and _is_scored(records[index - 1]) and not _is_scored(record):
            table.add_section()
        # One row for each modification, so that its bottleneck stands beside it also where the axes wrap.
        modifications: list[Axes | None] = [*record.axes] or [None]
        for line, axes in enumerate(modifications):
            cells = [_cell(column, record if not line else None, axes, record) for column in columns]
            table.add_row(*cells, style="bold" if not index and len(records) > 1 and _is_scored(record) else None)
    return table
