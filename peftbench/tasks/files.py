"""Local files of rows: read .tsv, .csv, .jsonl, .json and .parquet, and parallel files of lines; packed by gzip too."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from peftbench.config.schema import Task
from peftbench.utils.errors import UserError, quote
from peftbench.utils.files import expand_home

Columns = dict[str, Sequence[Any]]


class Layout(NamedTuple):
    """How the cells of .csv and .tsv files are read, if not as their names say."""

    column_names: tuple[str, ...] = ()  # of files without a header; (): the first row names the columns
    delimiter: str | None = None

    @classmethod
    def of(cls, task: Task) -> Layout:
        """Return the layout that the task's keys describe."""
        return cls(tuple(task.column_names), task.delimiter)

    def dialect(self, ending: str) -> dict[str, Any]:
        """Return the options of csv.reader for files with this ending."""
        return DIALECTS[ending] | ({} if self.delimiter is None else {"delimiter": self.delimiter})


PLAIN = Layout()
GZIP = ".gz"  # after the extension of a packed file


def read_file(
    path: str | Path, used: Collection[str] = (), nested: Collection[str] = (), layout: Layout = PLAIN
) -> Dataset:
    """Read the rows of one file into memory. A .tsv or .csv file starts with a header, unless `layout` has the names of
    its columns, and its cells are strings.

    Args:
        used: the columns that are needed. If the file has all of them, any other column whose values have no common
            type, such as numbers and texts, is left out.
        nested: the columns of a .json or .jsonl file whose lists and dicts become texts, in JSON.

    Raises:
        UserError: the file is missing, empty, malformed or not UTF-8; with the line number if there is one.
    """
    file = expand_home(path)
    if not file.is_file():
        raise UserError(f"{path} is not a file; give the path of an existing one.")
    reader = READERS.get(get_ending(path))
    if reader is None or (reader is _read_parquet and file.suffix == GZIP):
        raise UserError(
            f"{path} cannot be read: its extension must be one of {', '.join(READERS)}, and the first four may be "
            f"packed ({GZIP}){_describe_lines(get_ending(path)[1:], used)}."
        )
    try:
        read = reader(file, layout, used)
        if not isinstance(read, pa.Table):
            read = _make_table(
                file, {name: _nest(cells) if name in nested else cells for name, cells in read.items()}, used
            )
        rows = Dataset(read)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not len(rows):
        raise UserError(f"{path} has no rows.")
    return rows


def read_parallel_lines(columns: Mapping[str, str]) -> Dataset:
    """Read files of lines, `{column: path}`; line n of each is in row n.

    Raises UserError if a file is missing, empty or not UTF-8, or if they have different numbers of lines.
    """
    found = {column: _read_lines(expand_home(path), path) for column, path in columns.items()}
    counts = {path: len(found[column]) for column, path in columns.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{path} has {count:,}" for path, count in counts.items())
        raise UserError(f"Parallel files need the same number of lines: {listed}.")
    return Dataset(pa.table(found))


def get_ending(path: str | Path) -> str:
    """Return the extension that says how a file is read, in small letters: .csv also for rows.csv.gz."""
    name = Path(path).name
    ending = Path(name.removesuffix(GZIP)).suffix
    return ending.lower() if ending.lower() in READERS else ending


def locate_row(path: str | Path, row: int, layout: Layout = PLAIN) -> str:
    """Return where row number `row` (from 1) of a file for `read_file` begins: "FILE:LINE", or "FILE, row ROW"."""
    file = expand_home(path)
    ending = get_ending(path)
    lines: Iterator[int] = iter(())
    if ending in DIALECTS:
        every = _number_lines(csv.reader(io.StringIO(_read_text(file), newline=""), **layout.dialect(ending)))
        lines = islice(every, 0 if layout.column_names else 1, None)
    elif ending in (".jsonl", ".json") and not (text := _read_text(file)).lstrip().startswith("["):
        lines = (number for number, line in enumerate(text.split("\n"), 1) if line.strip())
    elif ending not in READERS:
        return f"{path}:{row}"
    line = next(islice(lines, row - 1, None), None)
    return f"{path}, row {row}" if line is None else f"{path}:{line}"


def _number_lines(reader: Any) -> Iterator[int]:
    """Yield the line on which each record of a csv reader begins: a quoted cell may span several lines."""
    line = 1
    for row in reader:
        if row:
            yield line
        line = reader.line_num + 1


def _describe_lines(ending: str, used: Collection[str]) -> str:
    """Return the end of the sentence for a file that may have been meant as one of parallel files of lines."""
    if not used or not ending:
        return ""
    return f"; a file of lines ends in the name of its column, which is here {' or '.join(used)}, not {ending}"


def _read_lines(file: Path, path: str) -> list[str]:
    if not file.is_file():
        raise UserError(f"{path} is not a file; give the path of an existing one.")
    lines = _read_text(file).split("\n")
    if not lines[-1]:  # after the last line break
        lines.pop()
    if not lines:
        raise UserError(f"{path} has no rows.")
    return [line.removesuffix("\r") for line in lines]


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == GZIP:
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{file} is incomplete or not packed by gzip: {error}.") from error
    try:
        return data.decode("utf-8-sig")  # Excel and Windows editors write a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line} is not UTF-8 text; save the file as UTF-8.") from error


def _read_cells(file: Path, layout: Layout, used: Collection[str]) -> Columns:
    csv.field_size_limit(2**31 - 1)  # an article may be longer than csv's own limit of 131,072 characters
    dialect = layout.dialect(get_ending(file))
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), **dialect)
    rows: list[list[str]] = []
    try:
        first = next(filter(None, reader), [])
        if (hint := _find_delimiter(file, first, dialect.get("delimiter", ","))) and not set(used) <= {*first}:
            raise UserError(hint)
        header = list(layout.column_names) or first
        if len(set(header)) < len(header):
            raise UserError(f"{file}:1 names a column twice: {', '.join(map(quote, header))}{IF_NO_HEADER}.")
        if layout.column_names and first == header:
            raise UserError(f"{file}:1 is a header with the names in task.column_names; leave task.column_names out.")
        for row in filter(None, chain([first] if layout.column_names else [], reader)):
            if len(row) != len(header):
                whose = "name in task.column_names" if layout.column_names else "column of the header"
                raise UserError(
                    f"{file}:{reader.line_num} should have one cell for each {whose} "
                    f"({', '.join(header)}); it has {len(row)}."
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num} is malformed: {error}.") from error
    return dict(zip(header, zip(*rows, strict=True), strict=False))


def _find_delimiter(file: Path, first: Sequence[str], expected: str) -> str | None:
    """Return the sentence that says with what a file separates its columns, if its first row looks like another
    delimiter than the expected one."""
    counts = {sign: first[0].count(sign) for sign in DELIMITERS if sign != expected} if len(first) == 1 else {}
    likely = max(counts, key=counts.__getitem__, default="")
    if not counts.get(likely):
        return None
    typed = likely.replace("\t", r"\t")
    return (
        f"{file}:1 has {DELIMITERS[likely]} where {DELIMITERS.get(expected, expected)} are expected: "
        f"{quote(first[0])}; 'task.delimiter=\"{typed}\"' reads such files."
    )


def _read_json(file: Path, layout: Layout, used: Collection[str]) -> Columns:
    """Read an array of objects, or one object per line: both kinds of file are called .json."""
    text = _read_text(file)
    if text.lstrip().startswith("["):
        rows = [(f"{file}, row {number}", row) for number, row in enumerate(_parse_json(file, 1, text), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"{file}:{number}", _parse_json(file, number, line)) for number, line in lines if line.strip()]
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f'{place} is {quote(row)}, not an object such as {{"text": "..."}}.')
    names = dict.fromkeys(chain.from_iterable(row for _, row in rows))
    return {name: [row.get(name) for _, row in rows] for name in names}


def _parse_json(file: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise UserError(f"{file}:{line + error.lineno - 1} is incomplete or not JSON: {what}.") from error
    except RecursionError:
        raise UserError(f"{file}:{line} is nested too deep.") from None


def _read_parquet(file: Path, layout: Layout, used: Collection[str]) -> pa.Table:
    try:
        names = pq.read_schema(file).names
        if len(set(names)) < len(names):
            raise UserError(f"{file} names a column twice: {', '.join(names)}.")
        return pq.read_table(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is incomplete or not Parquet: {error}") from error


def _nest(cells: Sequence[Any]) -> Sequence[Any]:
    """Return the lists and dicts of a column as JSON: they may be too unlike each other for a column of Arrow."""
    return [json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell for cell in cells]


def _make_table(file: Path, columns: Columns, used: Collection[str]) -> pa.Table:
    arrays = {}
    needed = set(used or columns)
    if not needed <= columns.keys():  # one of them may be inside a dict
        needed = set(columns)
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values)
        except (ValueError, TypeError, OverflowError) as error:  # Arrow's own exceptions are subclasses of these
            if name not in needed:
                continue
            raise UserError(_describe_odd_cell(file, name, values, error)) from error
    return pa.table(arrays)


def _describe_odd_cell(file: Path, name: str, values: Sequence[Any], error: Exception) -> str:
    """Return the sentence for the first cell of a column whose type does not fit the cells above it."""
    row = bisect_left(range(1, len(values)), True, key=lambda count: not _is_column(values[:count])) + 1
    value, first = values[row - 1], next(value for value in values if value is not None)
    holds = f"{locate_row(file, row)}: column {name} holds {quote(value)}"
    return f"{holds}, but the rows above hold {quote(first)}." if _is_column([value]) else f"{holds}: {error}."


def _is_column(values: Sequence[Any]) -> bool:
    try:
        pa.array(values)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


DIALECTS: dict[str, dict[str, Any]] = {
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "strict": True},  # as in GLUE: a quote is a character
    ".csv": {"strict": True},
}

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
IF_NO_HEADER = "; if the file has no header, name its columns by task.column_names"

READERS: dict[str, Callable[[Path, Layout, Collection[str]], Columns | pa.Table]] = {
    ".tsv": _read_cells,
    ".csv": _read_cells,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
