"""The rows of question answering: a question, a context, and the answers, which are parts of the context."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from peftbench.config.schema import Task
from peftbench.utils.errors import UserError, quote

STARTS = "answer_start"  # the column of the first characters of the answers in the context, -1 if unknown
UNKNOWN = -1


def split_answers(task: Task, rows: Dataset, source: Any) -> Dataset:
    """Return the rows with a list of texts in the column of answers, and where each begins in the column `STARTS`.

    A cell is SQuAD's {"text": [...], "answer_start": [...]}, a list of texts, or one text, whose start a column
    answer_start may tell; an empty one has no answer.

    Raises:
        UserError: a cell is none of these.
    """
    column = task.label_column
    if column not in rows.column_names:
        return rows
    told = rows[STARTS][:] if STARTS in rows.column_names else [None] * len(rows)
    texts, starts = [], []
    for number, (cell, start) in enumerate(zip(rows[column][:], told, strict=True), 1):
        try:
            answers = _read_answers(cell, start)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{source.at(number)}: column {column} holds {quote(cell)}, not answers; give texts, or "
                '{"text": [...], "answer_start": [...]}.'
            ) from error
        texts.append([text for text, _ in answers])
        starts.append([place for _, place in answers])
    rows = rows.remove_columns([name for name in (column, STARTS) if name in rows.column_names])
    return rows.add_column(column, texts).add_column(STARTS, starts)


def _read_answers(cell: Any, start: Any) -> list[tuple[str, int]]:
    """Return the text of each answer that is not empty, with the place of its first character."""
    if isinstance(cell, dict):
        cell, start = cell["text"], cell.get(STARTS)
    texts = [] if cell is None else [cell] if isinstance(cell, str) else list(cell)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    places = start if isinstance(start, list) else [start]
    known = len(places) == len(texts) and all(place not in (None, "") for place in places)
    numbers = [int(place) for place in places] if known else [UNKNOWN] * len(texts)
    return [(text, place) for text, place in zip(texts, numbers, strict=True) if text.strip()]


def check_answers(task: Task, rows: Dataset, source: Any, training: bool) -> Dataset:
    """Return the rows, in training with the place of each answer.

    Raises:
        UserError: a question has no answer although `task.unanswerable` is false, or an answer is not in its context.
    """
    context, starts = rows[task.text_columns[1]][:], []
    for number, (text, answers, places) in enumerate(
        zip(context, rows[task.label_column][:], rows[STARTS][:], strict=True), 1
    ):
        if not answers and not task.unanswerable:
            raise UserError(
                f"{source.at(number)}: the question has no answer in column {task.label_column}; add "
                "task.unanswerable=true if that is meant."
            )
        starts.append([_find_answer(text, *one) for one in zip(answers, places, strict=True)] if training else places)
        if UNKNOWN in starts[-1] and training:
            lost = answers[starts[-1].index(UNKNOWN)]
            raise UserError(
                f"{source.at(number)}: the answer {quote(lost)} is not in the context, or not where {STARTS} says; "
                "correct the row or leave it out."
            )
    return rows.remove_columns(STARTS).add_column(STARTS, starts)


def _find_answer(context: str, answer: str, start: int) -> int:
    """Return the place of an answer: where it is said to be, or where it occurs first; `UNKNOWN` if it is not there."""
    if start == UNKNOWN:
        return context.find(answer)
    return start if context[start : start + len(answer)] == answer else UNKNOWN
