"""Inputs without labels: the lines of a text file or of standard input, or the rows of a table."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from peftbench.backbones.chat_template import ASSISTANT
from peftbench.config.schema import Task, TaskKind
from peftbench.tasks.conversations import SHARED_ROLES
from peftbench.tasks.file_set import FileSet
from peftbench.tasks.files import READERS, Layout, get_ending
from peftbench.tasks.load import Loaded
from peftbench.tasks.rows import Source, describe_no_input, list_input_columns
from peftbench.tasks.source import reshape_rows
from peftbench.utils.errors import UserError, describe_unknown, quote
from peftbench.utils.files import expand_home

STDIN = "-"
LINES = ".txt"
FORMATS = (LINES, *READERS)  # by the ending of a file's name
SPLIT = "input"
PLACEHOLDER = "."  # some chat templates drop a turn that is empty


def read_inputs(task: Task, place: str, form: str | None = None) -> Loaded:
    """Read what is to be predicted: as many rows as the file has, in its order, with a placeholder for the target.

    In a text file each line is a source, a text or a user's turn, or the two texts of a pair with a tab between them.
    Other files have the columns that the task reads.

    Args:
        task: of the run, with its labels.
        place: a file, or "-" for standard input.
        form: the format, one of `FORMATS`; by default that of the file's ending, and lines for standard input.

    Raises:
        UserError: the file cannot be read, or a row is no input of the task.
    """
    name = "standard input" if place == STDIN else place
    form = form or (LINES if place == STDIN else get_ending(place).lower())
    if form not in FORMATS:
        raise UserError(f"{place} cannot be read: its extension must be one of {', '.join(FORMATS)}, or give --read.")
    if form == LINES:
        source = Source(_make_rows(task, _read_lines(place, name), name), name)
    elif place != STDIN and get_ending(place) == form:
        files = _name_table(task, place)
        source = Source(files.read(), place, files)
    else:
        source = Source(_read_renamed_table(task, place, form, name), name)
    rows = _shape(task, source)
    return Loaded(task, {"report": (SPLIT, None)}, {SPLIT: rows}, {SPLIT: len(rows)}, labelled=False)


def _read_lines(place: str, name: str) -> list[str]:
    """Return the lines of a text file or of standard input, without their ends. Raises UserError if it is not UTF-8."""
    data = _read_bytes(place, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line} is not UTF-8 text; save the file as UTF-8.") from error
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _make_rows(task: Task, lines: Sequence[str], name: str) -> Dataset:
    """Return lines as rows with the task's columns."""
    columns = list_input_columns(task)
    if task.messages_column is not None:
        turns = [json.dumps([{"role": "user", "content": line}], ensure_ascii=False) for line in lines]
        return Dataset.from_dict({task.messages_column: turns})
    if len(columns) == 1:
        return Dataset.from_dict({columns[0]: list(lines)})
    pairs = [line.split("\t") for line in lines]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise UserError(
                f"{name}:{number} must have two texts with a tab between them, {' and '.join(columns)}; it has "
                f"{len(pair)}: {quote(lines[number - 1])}."
            )
    return Dataset.from_dict({column: [pair[place] for pair in pairs] for place, column in enumerate(columns)})


def _name_table(task: Task, place: str) -> FileSet:
    columns = tuple(column for column in (task.messages_column, task.tools_column) if column is not None)
    return FileSet((place,), columns or tuple(list_input_columns(task)), Layout.of(task), columns)


def _read_renamed_table(task: Task, place: str, form: str, name: str) -> Dataset:
    """Read a table from standard input, or from a file with another ending than its format's, by a copy."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"input{form}"
        file.write_bytes(_read_bytes(place, name))
        try:
            return _name_table(task, str(file)).read()
        except UserError as error:
            raise UserError(*(sentence.replace(str(file), name) for sentence in error.faults)) from error


def _read_bytes(place: str, name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if place == STDIN else expand_home(place).read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}.") from error


def _shape(task: Task, source: Source) -> Dataset:
    """Return rows with the columns that `encode` reads, and every other column that the source has."""
    rows = source.rows
    if task.messages_column is not None:
        if task.messages_column in rows.column_names:
            rows = _put_column(rows, task.messages_column, list(map(_ask, rows[task.messages_column][:])))
    else:
        target, value = _choose_placeholder(task)
        rows = _put_column(rows, target, [value] * len(rows))
    source = reshape_rows(replace(task, merge_references=False), source._replace(rows=rows))
    rows = source.rows
    key = "task.source_column" if task.kind is TaskKind.text_to_text else "task.text_columns"
    for column in list_input_columns(task):
        if column not in rows.column_names:
            there = [name for name in rows.column_names if name not in _choose_placeholder(task)]
            raise UserError(f"{source.name}: {describe_unknown(key, column, there)}")
        for number, cell in enumerate(rows[column][:], 1):
            if (fault := describe_no_input(task, cell)) is not None:
                raise UserError(f"{source.at(number)}: column {column} holds {fault}.")
    return rows


def _choose_placeholder(task: Task) -> tuple[str, Any]:
    """Return the column of the target, and a value that stands for it and is not read."""
    if task.kind is TaskKind.text_to_text:
        return task.target_column, PLACEHOLDER
    if task.kind in (TaskKind.token_classification, TaskKind.question_answering):
        return task.label_column, []
    return task.label_column, 0.0 if task.kind is TaskKind.regression else 0


def _put_column(rows: Dataset, name: str, cells: Sequence[Any]) -> Dataset:
    """Return the rows with a column of these cells, in the place of one of that name."""
    if rows.column_names == [name]:  # without it there would be no rows
        return Dataset.from_dict({name: cells})
    return rows.remove_columns([name] if name in rows.column_names else []).add_column(name, cells)


def _ask(cell: Any) -> Any:
    """Return a conversation as JSON, in which the assistant has the last turn; what is none stays as it is."""
    try:
        messages = json.loads(cell) if isinstance(cell, str) else cell
    except (json.JSONDecodeError, RecursionError):
        return cell
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return cell
    role = SHARED_ROLES.get(messages[-1].get("from", ""), messages[-1].get("role"))
    if role == ASSISTANT:
        return json.dumps(messages, ensure_ascii=False)
    return json.dumps([*messages, {"role": ASSISTANT, "content": PLACEHOLDER}], ensure_ascii=False)
