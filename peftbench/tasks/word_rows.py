"""The rows of token classification: a list of words, and a label for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import ClassLabel, Dataset

from peftbench.config.schema import Task
from peftbench.utils.errors import UserError, quote
from peftbench.utils.text import format_count

OUTSIDE = "O"  # the label of a word that is in no entity


def split_cells(task: Task, rows: Dataset) -> Dataset:
    """Return the rows with lists in the columns of words and labels, in which a text is split at white space."""
    for column in (*task.text_columns, task.label_column):
        if column in rows.column_names and any(isinstance(cell, str) for cell in rows[column][:]):
            cells = [cell.split() if isinstance(cell, str) else cell for cell in rows[column][:]]
            rows = rows.remove_columns(column).add_column(column, cells)
    return rows


def describe_no_words(cell: object) -> str | None:
    """Return the end of the sentence for a cell that is no list of words; None if it is one."""
    if isinstance(cell, list) and all(isinstance(word, str) for word in cell):
        return None
    return f"{quote(cell)}, not a list of words"


def get_label_names(feature: Any) -> list[str] | None:
    """Return the names of a column's labels in the order of their codes, if the data set knows them; `feature` is that
    of a column of labels, or of lists of labels."""
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def list_tags(task: Task, rows: Dataset, source: Any) -> Iterator[tuple[int, Any]]:
    """Yield the row's number, from 1, and the label of each word.

    Raises:
        UserError: a row has not as many labels as words, or a label with white space in it.
    """
    words = rows[task.text_columns[0]][:]
    for number, (text, cells) in enumerate(zip(words, rows[task.label_column][:], strict=True), 1):
        if (fault := describe_no_words(text)) is not None:
            raise UserError(f"{source.at(number)}: column {task.text_columns[0]} holds {fault}.")
        if not isinstance(cells, list):
            where = f"{source.at(number)}: column {task.label_column}"
            raise UserError(f"{where} holds {quote(cells)}, not a list of labels.")
        if len(cells) != len(text):
            raise UserError(
                f"{source.at(number)}: {format_count(len(text), 'word')} in {task.text_columns[0]} "
                f"{'has' if len(text) == 1 else 'have'} {format_count(len(cells), 'label')} in {task.label_column}; "
                "give each word one."
            )
        for cell in cells:
            if isinstance(cell, str) and len(cell.split()) != 1:
                raise UserError(
                    f"{source.at(number)}: {quote(cell)} is no label of a word; give one without white space."
                )
            yield number, cell
