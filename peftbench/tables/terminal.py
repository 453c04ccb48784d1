"""Tables of runs for the terminal."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftbench.records.record import Record
from peftbench.records.wording import describe_selection
from peftbench.tables.columns import Column, choose_columns, find_best_rows, flatten_header
from peftbench.tables.fields import describe_cut_off, get_test_file
from peftbench.tables.row import (
    Row,
    find_baselines,
    get_rank,
    identify_setting,
    is_below_baseline,
    is_unscored,
    make_rows,
    split_tables,
)

T = TypeVar("T")
GAP = 2  # characters between two columns
NARROWEST = 10  # minimum width in characters of a column of words if space is short
# Where a cell may be broken: between words, and inside a word that is too long.
BETWEEN, WITHIN = re.compile(r"(?<= )(?![\d·])|(?<=, )"), re.compile(r"(?<=_)(?=\w)|(?<=[a-z])(?=[A-Z])")
# The methods of the proposed sweep do not share a learning rate: each has its own.
OVERRIDES_TO_KEEP = re.compile(r"[+~]{0,2}(--config-dir|task|model|trainer(?!\.learning_rate=)|debug|output_dir)\b")


def show_records(records: Sequence[Record], console: Console, status: Callable[[Record], str] | None = None) -> None:
    """Print one table of runs, best run first, for each task, backbone, metric, split and number of examples.

    Runs without a score are listed below those of their task and backbone. `status` says how a run ended; without it,
    that is shown only if some run is not done.
    """
    found = split_tables(make_rows(records))
    for index, (table, heading) in enumerate(zip(found, make_titles(found), strict=True)):
        if index:
            console.print()
        table.sort(key=get_rank)
        console.print(heading)
        columns = choose_columns(table, status)
        show_legend(columns, table, console, show_table(columns, table, console))


def show_table(columns: Sequence[Column[T]], rows: Sequence[T], console: Console, labels: int = 0) -> set[str]:
    """Print a table with as many of the columns as fit, the best value of each marked; return their keys.

    Rows without a score come last, below a line. With `labels`, the number of columns that name a row, columns that do
    not fit are printed in further tables below, which begin with the same labels; each has the rows with a value in its
    columns.
    """
    laid = [_lay_column(column, rows, star=not console.is_terminal) for column in columns]
    below = next((index for index, row in enumerate(rows) if is_unscored(row)), 0)
    names, rest = laid[:labels], laid[labels:]
    found = set[str]()
    while rest:
        fitting = names + rest
        if labels:
            while len(fitting) > labels + 1 and _count_spare(fitting, console.width) < 0:
                fitting.pop()
        rest = rest[len(fitting) - labels :]
        fitting = _fit_columns(fitting, console.width)
        found.update(column.key for column in fitting)
        shown = [index for index in range(len(rows)) if not labels or any(one.cells[index] for one in fitting[labels:])]
        console.print(_make_table(fitting, console.width, shown, below), crop=False)
        if labels and rest:
            console.print()
    return found


def show_legend(columns: Sequence[Column[Row]], rows: Sequence[Row], console: Console, shown: set[str]) -> None:
    """Print what the marks of a table mean, and the baselines that it has no column for. `shown` are its columns."""
    best = any(find_best_rows(column, rows) for column in columns if column.key in shown)
    parts = [f"{'bold' if console.is_terminal else '*'} best of its column"] if best else []
    sentences = [*parts, *describe_marks(columns, rows, shown)]
    if baselines := describe_baselines(rows, shown):
        sentences.append(baselines)
    if sentences:
        console.print(Text("; ".join(sentences), "dim"))


def describe_marks(columns: Sequence[Column[Row]], rows: Sequence[Row], shown: set[str]) -> list[str]:
    """Return what each mark means that some cell of the columns shown has."""
    return [
        f"{mark} {what}"
        for column in columns
        if column.key in shown
        for mark, what in column.marks
        if any(mark in column.cell(row) for row in rows)
    ]


def describe_baselines(rows: Sequence[Row], shown: set[str]) -> str | None:
    """Return the scores of the baselines without a column, such as "baselines: copy 14.10, head 50.10 to 54.53"."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in find_baselines(row).items():
            found.setdefault(name, []).append(value)
    ranges = {name: sorted({f"{min(values):.2f}", f"{max(values):.2f}"}, key=float) for name, values in found.items()}
    told = ", ".join(f"{name} {' to '.join(ends)}" for name, ends in ranges.items() if name not in shown)
    return f"baselines: {told}" if told else None


def make_titles(found: Sequence[Sequence[Row]]) -> list[Text]:
    """Return what the rows of each table have in common, and the user's files or the data's identity if only those
    differ."""
    plain = [make_title(table) for table in found]
    alike = [[one for one, other in zip(found, plain, strict=True) if other == heading] for heading in plain]
    return [
        Text.assemble(heading, f" ({_name_data(table, among)})") if len(among) > 1 else heading
        for heading, table, among in zip(plain, found, alike, strict=True)
    ]


def _name_data(table: Sequence[Row], among: Sequence[Sequence[Row]]) -> str:
    """Return what tells the scored rows of a table from those of others: the file's name, the path, or the content."""
    files = [get_test_file(_find_scored(one)) for one in among]
    own, content = get_test_file(_find_scored(table)), identify_setting(_find_scored(table))[-1] or "unknown"
    names = [Path(file).name for file in files if file]
    if own and names.count(Path(own).name) == 1:
        return Path(own).name
    return own if own and files.count(own) == 1 else f"data {content}"


def _find_scored(table: Sequence[Row]) -> Record:
    """Return a run of the table, if possible one with a score."""
    return next((run for row in table for run in row.scored), table[0].first)


def make_title(table: Sequence[Row]) -> Text:
    """Return what the rows of a table have in common."""
    record = _find_scored(table)
    task, model, version, metric, debug, split, examples, _ = identify_setting(record)
    size = f" of {record.counts.backbone:,} parameters" if record.counts else ""
    where = f", {metric} on {examples} {split} examples" if split else f", {metric}, no score yet"
    version = f"@{version[:8]}" if version else ""
    preset = f" (debug={debug})" if debug else ""
    return Text.assemble((task, "bold"), " with ", (model, "bold"), version, (preset, "bold"), size, where)


def show_ended(record: Record, console: Console, alone: bool = False) -> None:
    """Print a run that has ended: its row, and a sentence if it diverged.

    Args:
        alone: the run is not one of a sweep; what to try next is printed too.
    """
    console.print()
    show_single_row(record, console, alone)
    if record.status == "trained" and record.selection is not None:
        console.print(
            f"This trial is trained, with {describe_selection(record.selection)}; its report split is scored if it is "
            "chosen.",
            highlight=False,
        )
    if record.diverged is not None:
        console.print(
            f"This run diverged: {record.diverged.said}. It has no score; a smaller trainer.learning_rate may have "
            "one, and rerun=true trains this one again.",
            highlight=False,
        )


def show_single_row(record: Record, console: Console, alone: bool = True) -> None:
    """Print the table of one finished run and its folder; if it is `alone`, not in a sweep, also what to try next."""
    row = Row((record,))
    wanted = [column for column in choose_columns([row]) if column.key not in ("seed", "status")]
    laid = [_lay_column(column, [row], star=False) for column in wanted]
    if _count_spare(laid, console.width) >= 0:
        table = _make_table(laid, console.width, [0], 0)
    else:  # a single run drops no column: it has a line for each
        table = Table.grid(padding=(0, 2))
        for column in wanted:
            table.add_row(Text(flatten_header(column), "dim"), Text(column.cell(row)))
    console.print(make_title([row]))
    console.print(table)
    if is_below_baseline(row):
        console.print(f"This score is below a baseline ({describe_baselines([row], set())}).", highlight=False)
    for role, share in record.cut_off.items():
        if role in record.scores and (sentence := describe_cut_off(record.scores[role].split, share)):
            console.print(sentence, highlight=False, soft_wrap=True)
    root = record.folder.parents[3]
    results = "peftbench results" if root == Path("outputs") else f"peftbench results {shlex.quote(_type_path(root))}"
    kept = shlex.join(override for override in record.overrides if OVERRIDES_TO_KEEP.match(override))
    console.print()
    # Neither wrapped nor highlighted, so that these lines can be copied.
    for label, line in (
        ("The run is in", _type_path(record.folder)),
        ("All runs", results),
        ("Other methods", f"peftbench train -m method=lora,adapter,prefix,mam {kept}".rstrip()),
    )[: 3 if alone else 1]:
        console.print(Text.assemble((f"{label}: ".ljust(15), "dim"), line), soft_wrap=True)


def _type_path(path: Path) -> str:
    """Return a path as it can be typed: one that begins with a dash would be an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


@dataclass(frozen=True)
class _Laid:
    """A column and the text of all its cells."""

    key: str
    header: str
    cells: list[str]
    best: set[int]  # rows
    dispensable: int
    words: bool
    least: int  # minimum readable width in characters
    most: int  # width at which nothing in it wraps


def _lay_column(column: Column[T], rows: Sequence[T], star: bool) -> _Laid:
    """Return a column with its cells as text. `star` marks the best cells by a star, if bold would be lost."""
    marked = find_best_rows(column, rows)
    cells = [column.cell(row) + ("*" if star and index in marked else "") for index, row in enumerate(rows)]
    most = max(cell_len(line) for text in (column.header, *cells) for line in text.split("\n"))
    least = most if column.wrap is None else min(most, column.wrap)
    return _Laid(column.key, column.header, cells, marked, column.dispensable, column.words, least, most)


def _fit_columns(columns: list[_Laid], width: int) -> list[_Laid]:
    """Return as many of the columns as fit."""
    least = max(columns, key=lambda column: column.dispensable)
    spare = _count_spare(columns, width)
    if least.dispensable == 1:  # distinguishes rows: dropped only if words cannot shrink for it
        spare += sum(max(0, column.least - NARROWEST) for column in columns if column.words)
    if not least.dispensable or spare >= 0:
        return columns
    return _fit_columns([column for column in columns if column is not least], width)


def _count_spare(columns: Sequence[_Laid], width: int) -> int:
    """Return the characters that are left if every column has its minimum width; negative if there are too few."""
    return width - sum(column.least for column in columns) - GAP * (len(columns) - 1)


def _make_table(columns: Sequence[_Laid], width: int, rows: Sequence[int], below: int) -> Table:
    """Return the table with these rows, and a line above the row `below` unless that is the first."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    spare = max(0, _count_spare(columns, width))
    widths: list[int] = []  # chosen here, because rich would break words to keep lines long
    for column in reversed(columns):
        widths.insert(0, min(column.most, column.least + spare))
        spare -= widths[0] - column.least
    lacking = max(0, -_count_spare(columns, width))
    for index in sorted(range(len(columns)), key=lambda index: -widths[index]):  # shrink the widest first
        if columns[index].words:
            given = min(lacking, max(0, widths[index] - NARROWEST))
            widths[index], lacking = widths[index] - given, lacking - given
    if lacking:  # lines are too long: the terminal breaks them, but rich would break numbers
        table.width = sum(widths) + GAP * (len(widths) - 1)
    for column, taken in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "left" if column.words else "right"
        header = "\n".join(wrap_text(line, taken) for line in column.header.split("\n"))
        table.add_column(header, width=taken, justify=justify, overflow="fold")
    for index in rows:
        if index and index == below:
            table.add_section()
        styles = ["bold" if index in column.best else "" for column in columns]
        # One row for each modification, so that its bottleneck is next to it even if the axes wrap.
        for cells in zip_longest(*(column.cells[index].split("\n") for column in columns), fillvalue=""):
            table.add_row(*map(Text, map(wrap_text, cells, widths), styles))
    return table


def wrap_text(text: str, width: int) -> str:
    """Break the text into lines of at most `width` characters, between words, but not before a number or a dot.

    A word that is too long is broken inside, as in scaled_parallel_|adapter or Runtime|Error, if it has such a place.
    """
    lines = [""]
    for word in BETWEEN.split(text):
        parts = WITHIN.split(word) if cell_len(word.rstrip()) > width else [word]
        for index, part in enumerate(parts):
            begins = index == 0 and len(parts) > 1  # starts its own line
            if lines[-1] and (begins or cell_len((lines[-1] + part).rstrip()) > width):
                lines.append("")
            lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
