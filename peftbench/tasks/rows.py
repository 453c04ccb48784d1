"""The rows of a split as they were read, and the checks of what they must contain for a task."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from datasets import Dataset

from peftbench.config.schema import Task, TaskKind, is_text_table
from peftbench.config.task_validity import find_label_faults
from peftbench.tasks.answer_rows import check_answers
from peftbench.tasks.file_set import FileSet
from peftbench.tasks.word_rows import OUTSIDE, describe_no_words, get_label_names, list_tags
from peftbench.utils.errors import UserError, describe_unknown, quote

NUMBER = re.compile(r"[+-]?\d*\.?\d+")  # a label that is a number


class Source(NamedTuple):
    """The rows of a split as they were read, with their origin."""

    rows: Dataset
    name: str  # the source's name in messages
    files: FileSet | None = None

    @property
    def has_header(self) -> bool:
        """Return whether the first row of a file named the columns."""
        return self.files is not None and not self.files.layout.column_names and is_text_table(self.files.paths[0])

    def at(self, row: int) -> str:
        """Return where a row (numbered from 1) is, for messages."""
        return self.files.locate(row) if self.files else f"{self.name}, row {row}"


def check_split(task: Task, split: str, source: Source, limit: int | None, *, coded: bool = True) -> Dataset:
    """Return the first `limit` rows of a split (None: all), with every column that the source has.

    Inputs must be texts, and a target a text or a list of texts. Labels, given by name or by code, are returned as
    codes, ints that index `task.labels`, or for a regression as numbers.

    Args:
        coded: `task.labels` is in the order of the codes, so that a number may be a code. Labels that were found as
            names in the training file have no such order.

    Raises:
        UserError: there are no rows, a column is missing, or a cell has another type or an unknown label.
    """
    if not len(source.rows):
        raise UserError(f"{source.name}: the {split} split has no rows.")
    rows = take_head(source.rows, limit)
    _require_columns(source, list_used_columns(task))
    check_cells(task, rows, source)
    if task.kind is TaskKind.text_to_text:
        return rows
    if task.kind is TaskKind.question_answering:
        return check_answers(task, rows, source, training=split == task.train_split)
    feature, codes = rows.features[task.label_column], list[Any]()
    if task.kind is TaskKind.regression:
        codes = _parse_numbers(rows[task.label_column][:], source)
    else:
        cells = _named(task.labels, list(_list_labels(task, rows, source)), get_label_names(feature))
        codes = _encode_labels(task.labels, cells, source, coded)
    if task.kind is TaskKind.token_classification:
        ends = list(accumulate(map(len, rows[task.label_column][:])))
        codes = [codes[start:end] for start, end in pairwise([0, *ends])]
    return rows.remove_columns(task.label_column).add_column(task.label_column, codes)


def take_head(rows: Dataset, limit: int | None) -> Dataset:
    """Return the first `limit` rows, or all rows if there are no more than that."""
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


def list_input_columns(task: Task) -> list[str]:
    """Return the columns that the model reads: one or two texts, or a source."""
    if task.kind is TaskKind.text_to_text:
        return [task.source_column]
    return list(task.text_columns)


def list_used_columns(task: Task) -> list[tuple[str, str]]:
    """Return (key as typed, column) for each column that the task uses."""
    if task.kind is TaskKind.text_to_text:
        return [("task.source_column", task.source_column), ("task.target_column", task.target_column)]
    return [*(("task.text_columns", column) for column in task.text_columns), ("task.label_column", task.label_column)]


def list_file_columns(task: Task) -> list[tuple[str, str]]:
    """Return (key as typed, column) for each column that the task's files must have."""
    named = (("task.messages_column", task.messages_column), ("task.tools_column", task.tools_column))
    return [(key, column) for key, column in named if column is not None] or list_used_columns(task)


def _require_columns(source: Source, keys: Sequence[tuple[str, str]]) -> None:
    there = source.rows.column_names
    missing = [(key, column) for key, column in keys if column not in there]
    if len(missing) == len(keys) and source.has_header:
        raise UserError(_describe_first_row(source, missing))
    if missing:
        raise UserError(*(f"{source.name}: {describe_unknown(key, column, there)}" for key, column in missing))


def _describe_first_row(source: Source, missing: Sequence[tuple[str, str]]) -> str:
    """Return the sentence for a file whose header has none of the columns, and which may have no header."""
    there = source.rows.column_names
    columns = [column for _, column in missing]
    if len(columns) != len(there):
        columns = [*columns[: len(there)], "..."]
    named = " and ".join(f"{column} ({key})" for key, column in missing)
    first = ", ".join(quote(name, most=40) for name in there)
    return (
        f"{source.name}: the first row, {first}, was taken for the names of the columns, and {named} are not among "
        "them; set these keys to names in it or, if the file has no header, add "
        f"task.column_names=[{','.join(columns)}]."
    )


def check_cells(task: Task, rows: Dataset, source: Source) -> None:
    """Check that inputs are texts, and that a target is a text or a list of texts. Raises UserError otherwise."""
    for column in list_input_columns(task):
        for number, cell in enumerate(rows[column][:], 1):
            if (fault := describe_no_input(task, cell)) is not None:
                raise UserError(f"{source.at(number)}: column {column} holds {fault}.")
    if task.kind is TaskKind.text_to_text:
        for number, cell in enumerate(rows[task.target_column][:], 1):
            texts = [cell] if isinstance(cell, str) else cell
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"{source.at(number)}: column {task.target_column} holds {quote(cell)}, "
                    "not text or a list of texts."
                )


def require_texts(task: Task, train: Dataset, split: str) -> None:
    """Raise UserError if no row of the training split has any text: there is nothing to learn from."""
    columns = list_input_columns(task)
    if all(_is_empty(cell) for column in columns for cell in train[column][:]):
        raise UserError(f"All texts of the {split} split are empty (column {' and '.join(columns)}).")


def describe_empty_texts(task: Task, splits: Mapping[str, Dataset]) -> list[str]:
    """Return a note for each column that has texts without a character other than white space."""
    notes = []
    texts = [*list_input_columns(task), *([task.target_column] if task.kind is TaskKind.text_to_text else [])]
    for column in texts:
        counts = {split: sum(map(_is_empty, rows[column][:])) for split, rows in splits.items()}
        if any(counts.values()):
            told = ", ".join(
                f"{count:,} of {len(splits[split]):,} in {split}" for split, count in counts.items() if count
            )
            notes.append(f"Column {column} has rows with an empty text, which are kept: {told}.")
    return notes


def _is_empty(cell: Any) -> bool:
    texts = [cell] if isinstance(cell, str) else cell
    return not texts or not all(text.strip() for text in texts)


def describe_no_input(task: Task, cell: object) -> str | None:
    """Return the end of the sentence for an input that is no text, with the key that makes one of a list of texts; or
    that is no list of words, where the task reads words. None if it is one."""
    if task.kind is TaskKind.token_classification:
        return describe_no_words(cell)
    if isinstance(cell, str):
        return None
    if isinstance(cell, list) and task.kind is TaskKind.text_to_text and task.source_join is None:
        return f"a list, {quote(cell)}; task.source_join joins the texts of a list, as in 'task.source_join=\" | \"'"
    return f"{quote(cell)}, not text"


def has_codes(task: Task, train: Source) -> bool:
    """Return whether the training split says which label each code means, as data sets of the hub do."""
    return get_label_names(train.rows.features.get(task.label_column)) is not None


def set_labels(task: Task, train: Source) -> tuple[Task, str]:
    """Return the task with the labels of its training split, and the note that says so."""
    _require_columns(train, list_used_columns(task))
    cells, of_words = list(_list_labels(task, train.rows, train)), task.kind is TaskKind.token_classification
    names = get_label_names(train.rows.features[task.label_column])  # in the order of their codes
    if names is None:
        for number, cell in cells:
            if cell is None or cell != cell or not str(cell).strip():  # pandas writes a missing value as nan
                raise UserError(f"{train.at(number)}: column {task.label_column} is empty; every row needs a label.")
            if isinstance(cell, (list, dict)):
                raise UserError(f"{train.at(number)}: column {task.label_column} holds {quote(cell)}, not one label.")
        names = sorted({_name_label(cell) for _, cell in cells})
        if of_words and OUTSIDE in names:
            names.sort(key=OUTSIDE.__ne__)  # comes first
        _check_distinct(names, train)
        if all(name.isdecimal() for name in names):
            names.sort(key=int)
    what = "words" if of_words else "rows"
    if len(names) < 2:
        raise UserError(f"{train.name}: all {what} have the label {', '.join(names)}; two or more are needed.")
    if len(names) > max(2, len(cells) // 2):
        raise UserError(
            f"{train.name}: column {task.label_column} holds {len(names)} labels in {len(cells)} {what}; name the "
            "column of labels by task.label_column, or all labels by task.labels."
        )
    if found := list(find_label_faults("task.metric", task.metric, names)):
        raise UserError(*(f"{train.name}: {sentence}" for sentence in found))
    return replace(task, labels=names), f"The labels are those of {train.name}, in this order: {', '.join(names)}."


def _check_distinct(names: Sequence[str], train: Source) -> None:
    """Raise UserError if two names are in all likelihood the same label: Good and good, or 1 and 1.0."""
    seen: dict[object, str] = {}
    for name in names:
        bare = name.strip().casefold()
        key = float(bare) if NUMBER.fullmatch(bare) else bare
        if key in seen:
            raise UserError(
                f"{train.name}: the labels {seen[key]!r} and {name!r} differ only in spelling; write them alike, or "
                "name all labels by task.labels if both are meant."
            )
        seen[key] = name


Cell = tuple[int, Any]  # the number of a row, from 1, and one label in it


def _list_labels(task: Task, rows: Dataset, source: Source) -> Iterable[Cell]:
    """Return the cells of the column of labels; of token classification, one for each word."""
    if task.kind is TaskKind.token_classification:
        return list_tags(task, rows, source)
    return enumerate(rows[task.label_column][:], 1)


def _named(labels: Sequence[str], cells: Sequence[Cell], names: Sequence[str] | None) -> Sequence[Cell]:
    """Return the cells of a column that says which label each code means, by name if the names are the task's labels.
    If no name is one of them, `labels` are other names for the codes, in their order.

    Args:
        names: what the column says; None: nothing.
    """
    if names is None or not set(names) & set(labels):
        return cells
    known = range(len(names))
    return [(row, names[cell] if cell in known else cell) for row, cell in cells]


def _encode_labels(labels: Sequence[str], cells: Sequence[Cell], source: Source, coded: bool) -> list[int]:
    names = {label: code for code, label in enumerate(labels)}
    digits = {str(code): code for code in range(len(labels))}
    # If a name is a number, such as a star rating, a number in a cell can only be a name.
    numbers = any(NUMBER.fullmatch(name) for name in names)
    known = names if numbers or not coded else names | digits
    codes = []
    for number, cell in cells:
        code = (names if isinstance(cell, float) else known).get(_name_label(cell))
        if code is None:
            sentence = f"{source.at(number)}: label {cell!r} is not one of {', '.join(list(known))}"
            if not (numbers or coded or isinstance(cell, float)) and _name_label(cell) in digits:
                order = f"task.labels=[{','.join(names)}]"
                sentence += f"; if it is a code, name the labels in the order of their codes, such as {order}"
            raise UserError(f"{sentence}.")
        codes.append(code)
    return codes


def _name_label(cell: object) -> str:
    """Return a label's name. 1.0 becomes 1: a column of integers is written with .0 if some values are missing."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _parse_numbers(cells: Sequence[Any], source: Source) -> list[float]:
    numbers = []
    for row, cell in enumerate(cells, 1):
        try:
            numbers.append(float(cell))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise UserError(f"{source.at(row)}: label {quote(cell)} is not a number.")
    return numbers
