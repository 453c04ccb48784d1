"""Tables of runs as JSON, CSV, Markdown and LaTeX. Only LaTeX imports pandas.

Names in a record may be anybody's. Here they cannot become a formula of a spreadsheet, or a command or a line of LaTeX;
what prints a table strips the characters that would command a terminal.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from peftbench.records.record import Axes, Record
from peftbench.tables.columns import Column, find_best_rows, flatten_header
from peftbench.utils.differences import flatten
from peftbench.utils.files import dump_json
from peftbench.utils.text import strip_controls

T = TypeVar("T")
Beside = Callable[[Record], dict[str, Any]]  # additional values of a record

# At the beginning of a cell, but not of a number such as -0.5.
FORMULA = re.compile(r"(?![+-]\d[\d.]*(?:e[+-]?\d+)?$)[\t\r ]*[=+@-]")
# Characters that pdflatex cannot typeset without a replacement.
LATEX = {
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "λ": r"$\lambda$",
    "·": r"$\cdot$",
    "↑": r"$\uparrow$",
    "◆": r"$\bullet$",
    "▽": r"$\nabla$",
}


def records_to_json(records: Iterable[Record], beside: Beside = lambda record: {}) -> str:
    """Return a JSON array of the records, each with its `folder` and the values that `beside` returns."""
    found = [{**record.to_json(), "folder": str(record.folder), **beside(record)} for record in records]
    return dump_json(found, indent=2, ensure_ascii=True)


def records_to_csv(records: Iterable[Record], beside: Beside = lambda record: {}) -> str:
    """Return one line for each record; dotted keys are the columns. A mixture's axes are joined by " + "."""
    return rows_to_csv([{**_flatten_record(record), **beside(record)} for record in records])


def rows_to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as CSV; every key that any row has is a column."""
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_clean_cell, keys))
    writer.writerows([_clean_cell(row.get(key, "")) for key in keys] for row in rows)
    return text.getvalue()


def _clean_cell(cell: Any) -> Any:
    """Return a cell without controls, which not every CSV library can read or write; a spreadsheet would compute a text
    such as =1+1, so that it gets a ' before it."""
    if not isinstance(cell, str):
        return cell
    text = strip_controls(cell)
    return f"'{text}" if FORMULA.match(text) else text


def rows_to_values(columns: Sequence[Column[T]], rows: Sequence[T]) -> list[dict[str, Any]]:
    """Return each row as column: value. Numbers are not rounded; the standard deviation, if any, is in COLUMN_std, and
    the ends of an interval are in COLUMN_low and COLUMN_high."""
    found = []
    for row in rows:
        one: dict[str, Any] = {}
        for column in columns:
            one[column.key] = _join_lines(column.cell(row)) if column.value is None else column.value(row)
            if column.spread is not None and (deviation := column.spread(row)) is not None:
                one[f"{column.key}_std"] = deviation
            if column.interval is not None and (interval := column.interval(row)) is not None:
                one |= {f"{column.key}_low": interval.low, f"{column.key}_high": interval.high}
        found.append(one)
    return found


def to_markdown(columns: Sequence[Column[T]], rows: Sequence[T]) -> str:
    """Return a table in GitHub's Markdown, with the best value of each column in bold."""
    marked = [find_best_rows(column, rows) for column in columns]
    lines = [[flatten_header(column) for column in columns], ["---" if column.words else "---:" for column in columns]]
    for index, row in enumerate(rows):
        texts = [_join_lines(column.cell(row)).replace("|", "\\|") for column in columns]
        bold = [index in of_column for of_column in marked]
        lines.append([f"**{text}**" if best else text for text, best in zip(texts, bold, strict=True)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def to_latex(columns: Sequence[Column[T]], rows: Sequence[T]) -> str:
    """Return a tabular with the rules of the package booktabs, with the best value of each column in bold."""
    import pandas as pd

    marked = [find_best_rows(column, rows) for column in columns]
    cells = []
    for index, row in enumerate(rows):
        texts = [_escape(_join_lines(column.cell(row))) for column in columns]
        cells.append(
            [rf"\textbf{{{text}}}" if index in bold else text for text, bold in zip(texts, marked, strict=True)]
        )
    frame = pd.DataFrame(cells, columns=[_escape(flatten_header(column)) for column in columns])
    kinds = "".join("l" if column.words else "r" for column in columns)
    tabular: str = frame.style.hide(axis="index").to_latex(hrules=True, column_format=kinds)
    return tabular


def _escape(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate, as in a file name, is not a character
    for letter in "\\&%$#_{}~^":
        text = text.replace(letter, {"\\": r"\textbackslash ", "~": r"\~{}", "^": r"\^{}"}.get(letter, "\\" + letter))
    for letter, command in LATEX.items():
        text = text.replace(letter, command)
    text = re.sub(r"^\s*([\[*])", r"{\1}", text)  # after the \\ of the row above it would be an argument of that
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)  # a minus, not a hyphen


def _join_lines(cell: str) -> str:
    return " + ".join(cell.splitlines()) if "\n" in cell else strip_controls(cell)


def _flatten_record(record: Record) -> dict[str, Any]:
    values = record.to_json()
    axes = values.pop("axes")
    values["deviations"] = [deviation["name"] for deviation in values["deviations"]]
    joined = {
        key: " + ".join("" if one[key] is None else str(one[key]) for one in axes)
        for key in Axes.__dataclass_fields__
        if key != "options"
    }
    row = {"folder": str(record.folder), **dict(flatten({**values, "axes": joined}))}
    return {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
