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
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftbench.results.record import Axes, Record, flatten

GAP = 2  # characters between two columns
OVERRIDES_TO_KEEP = re.compile(r"(task|model|trainer|debug|output_dir)\b")  # in the sweep that is proposed


@dataclass(frozen=True)
class Column:
    """A column of a table: `cell` gives a record's text in it, with one line for each modification of a mixture.

    Where the table is too wide, columns with the highest `dispensable` go first, and those with 0 stay.
    """

    header: str
    cell: Callable[[Record], str]
    dispensable: int = 0
    words: bool = False  # on the left; numbers stand on the right
    wrap: int | None = None  # width in characters down to which cells may wrap; None: they never do


def show(records: Sequence[Record], console: Console, status: Callable[[Record], str] | None = None) -> None:
    """Prints one table, best run first, for each task, backbone, metric, split and number of examples.

    Runs without a score stand below those of their task and backbone. `status` says how a run ended; without it that
    is shown only where some run is not done.
    """
    scored = sorted((record for record in records if _is_scored(record)), key=_setting)
    tables = [list(group) for _, group in groupby(scored, key=_setting)]
    for record in records:
        if not _is_scored(record):
            _home(tables, record).append(record)
    for index, table in enumerate(tables):
        if index:
            console.print()
        table.sort(key=_rank)
        console.print(_title(table[0]))
        columns = _fitting(_columns(table, status), table, console.width)
        console.print(_table(columns, table, console.width))


def single_row(record: Record, console: Console) -> None:
    """Prints the table of one finished run, its folder, and two commands to try next."""
    columns = [column for column in _columns([record]) if column.header not in ("seed", "status")]
    if _spare(columns, [record], console.width) >= 0:
        table = _table(columns, [record], console.width)
    else:  # nothing of one run is dispensable: a line for each column then
        table = Table.grid(padding=(0, 2))
        for column in columns:
            table.add_row(Text(column.header.replace("-\n", "").replace("\n", " "), "dim"), Text(column.cell(record)))
    console.print(_title(record))
    console.print(table)
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


def _rank(record: Record) -> tuple[float, str, int]:
    """What orders the runs of a table: the highest score first, runs without one last."""
    score = record.score if _is_scored(record) and record.score is not None else -math.inf
    return (-score, record.method, record.seed)


def _setting(record: Record) -> tuple[str, ...]:
    """What two runs share whose scores may be compared: task, backbone, metric, split and its size."""
    report = record.scores.get("report")
    split = (report.split, f"{report.examples:,}") if report and _is_scored(record) else ("", "")
    model = record.model
    return (record.task, model.hub_id or model.name, model.content or model.revision or "", record.metric, *split)


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


def _columns(records: Sequence[Record], status: Callable[[Record], str] | None = None) -> list[Column]:
    baselines = dict.fromkeys(name for record in records for name in record.baselines)
    columns = [
        Column("method", lambda r: f"{r.method} {r.debug or ''}".rstrip(), words=True, wrap=16),
        Column("four axes", _four, words=True, wrap=20),
        Column("bottle-\nneck", lambda r: "\n".join(_count(axes.bottleneck) for axes in r.axes)),
        Column("trained", lambda r: _count(r.counts.trained if r.counts else None), dispensable=4),
        Column("stored", lambda r: _count(r.counts.stored if r.counts else None), dispensable=3),
        Column("% of\nmodel", lambda r: _number(r.counts.percent.get("stored") if r.counts else None)),
        # Every metric of the tasks is better when higher.
        Column(f"{records[0].metric} ↑", lambda r: _number(r.score if r.status == "done" else None)),
        *(Column(name, partial(_baseline, name), dispensable=2) for name in baselines),
        Column("time", _time, dispensable=5),
        Column("seed", lambda r: str(r.seed), dispensable=1 if len({r.seed for r in records}) > 1 else 6),
    ]
    if status is not None or any(record.status != "done" for record in records):
        columns.append(Column("status", status or _status, words=True, wrap=11))
    return columns


def _fitting(columns: list[Column], records: Sequence[Record], width: int) -> list[Column]:
    """As many of the columns as there is room for."""
    least = max(columns, key=lambda column: column.dispensable)
    if not least.dispensable or _spare(columns, records, width) >= 0:
        return columns
    return _fitting([column for column in columns if column is not least], records, width)


def _spare(columns: Sequence[Column], records: Sequence[Record], width: int) -> int:
    """The characters left over where every column is as narrow as can be; negative if there are too few."""
    return width - sum(_widths(column, records)[0] for column in columns) - GAP * (len(columns) - 1)


def _widths(column: Column, records: Sequence[Record]) -> tuple[int, int]:
    """The least width in characters at which a column can be read, and that at which nothing in it wraps."""
    texts = (column.header, *map(column.cell, records))
    most = max(cell_len(line) for text in texts for line in text.split("\n"))
    return (most if column.wrap is None else min(most, column.wrap)), most


def _table(columns: Sequence[Column], records: Sequence[Record], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    spare = max(0, _spare(columns, records, width))
    widths = []  # rich's own choice would break words here to keep lines long there
    for column in reversed(columns):
        least, most = _widths(column, records)
        widths.append(min(most, least + spare))
        spare -= widths[-1] - least
    for column, taken in zip(columns, reversed(widths), strict=True):
        justify: Literal["left", "right"] = "left" if column.words else "right"
        table.add_column(column.header, width=taken, justify=justify, overflow="fold")
    best = records[0] if len(records) > 1 and _is_scored(records[0]) else None
    for index, record in enumerate(records):
        if index and _is_scored(records[index - 1]) and not _is_scored(record):
            table.add_section()
        # One row for each modification, so that its bottleneck stands beside it also where the axes wrap.
        for cells in zip_longest(*(column.cell(record).split("\n") for column in columns), fillvalue=""):
            table.add_row(*map(Text, cells), style="bold" if record is best else None)
    return table


def _four(record: Record) -> str:
    """The four axes of each modification, then what else is trained."""
    lines = []
    for axes in record.axes:
        scale = f" {axes.scale:g}" if axes.composition_function == "scaled" else ""
        names = (axes.functional_form, axes.modified_representation, axes.insertion_form, axes.composition_function)
        lines.append(" · ".join(names) + scale)
    if record.unfreeze != "none":
        lines.append({"bias": "the biases", "all": "all parameters"}.get(record.unfreeze, record.unfreeze))
    return "\n".join(lines)


def _status(record: Record) -> str:
    return f"{record.status}: {record.error.name}" if record.error else record.status


def _baseline(name: str, record: Record) -> str:
    return _number(record.baselines.get(name))


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def _time(record: Record) -> str:
    return duration(record.timings["total_s"]) if "total_s" in record.timings else ""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
