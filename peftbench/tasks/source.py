"""Read the rows of a split: from the user's files, the docstrings of installed packages, or the Hugging Face hub."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import datasets
from datasets import Dataset, load_dataset

from peftbench.backbones.hub import explain_missing_hub
from peftbench.config.roles import HELD_OUT, list_splits
from peftbench.config.schema import Task, TaskKind, list_task_files
from peftbench.tasks.answer_rows import split_answers
from peftbench.tasks.conversations import split_conversations
from peftbench.tasks.deal import number_rows
from peftbench.tasks.docstrings import SPLITS, make_summary_rows, make_topic_rows
from peftbench.tasks.file_set import FileSet, find_split, has_split
from peftbench.tasks.files import Layout
from peftbench.tasks.own_task import read_own_rows
from peftbench.tasks.rows import Source, check_cells, list_file_columns
from peftbench.tasks.word_rows import split_cells
from peftbench.utils.errors import UserError


def read_split(task: Task, split: str) -> Source:
    """Read the rows of a split from the first source that the task has: the user's own task, files, `task.data_dir`,
    `task.packages`, `task.hub_id`. Dicts become columns, and lists become texts or references.

    Raises:
        UserError: there is no source, or it cannot be read.
    """
    return reshape_rows(task, _read_raw(task, split))


def has_source(task: Task, split: str) -> bool:
    """Return whether the split has a source; True also without a training file, so that reading reports the error."""
    if split == HELD_OUT and task._target_ is None and split not in list_task_files(task):
        return task.data_dir is not None and has_split(task.data_dir, split)
    elsewhere = any((task.data_dir, task.packages, task.hub_id)) or task.train_split not in list_task_files(task)
    return split in list_task_files(task) or elsewhere


def find_files(task: Task, split: str) -> FileSet | None:
    """Return the user's files of a split, or None if the task has no files. Raises UserError as `find_split`."""
    used = tuple(column for _, column in list_file_columns(task))
    paths = list_task_files(task).get(split)
    if not paths and task.data_dir is not None:
        paths = find_split(task.data_dir, split, used)
    return FileSet(tuple(paths), used, Layout.of(task), used if task.messages_column else ()) if paths else None


def _read_raw(task: Task, split: str) -> Source:
    for named in task.data_files:
        if named not in list_splits(task):
            raise UserError(
                f"task.data_files.{named} is not a split of this task; its splits are {', '.join(list_splits(task))}."
            )
    if task._target_ is not None and (own := read_own_rows(task, split)) is not None:
        return Source(own, task._target_)
    if (files := find_files(task, split)) is not None:
        return Source(files.read(), files.name, files)
    if task.packages is not None:
        return Source(
            _read_docstrings(task.kind, task.packages, split), f"The docstrings of {', '.join(task.packages)}"
        )
    if task.hub_id is not None:
        return Source(_read_hub(task, task.hub_id, split), " ".join(filter(None, [task.hub_id, task.hub_config])))
    keys = {task.report_split: "test_file", task.selection_split: "validation_file", task.train_split: "train_file"}
    file = f"task.{keys[split]}=FILE" if split in keys else f"+task.data_files.{split}=FILE"
    raise UserError(
        f"task={task.name} has no data for its {split} split; give {file}, or task.data_dir=FOLDER, with files for "
        f"{_name_needed_splits(task)}."
    )


def _read_docstrings(kind: TaskKind, packages: Sequence[str], split: str) -> Dataset:
    for name in SPLITS:
        if name == split:
            make = make_topic_rows if kind is TaskKind.classification else make_summary_rows
            return Dataset.from_list(make(packages, name))
    raise UserError(f"Docstrings have no {split} split; their splits are {', '.join(SPLITS)}.")


def _read_hub(task: Task, hub_id: str, split: str) -> Dataset:
    missing = explain_missing_hub()
    if missing:
        datasets.config.HF_HUB_OFFLINE = True  # saves 20 s of retries; the cache can still be read
    try:
        try:
            return load_dataset(hub_id, task.hub_config, split=split, revision=task.hub_revision)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error) or task.hub_revision is not None:
                raise
            # The hub keeps the output of such a script on a branch of its own.
            return load_dataset(hub_id, task.hub_config, split=split, revision="refs/convert/parquet")
    except ConnectionError as error:
        raise UserError(
            f"task.hub_id={hub_id} is not in this machine's cache and {missing or 'the hub does not answer'}; "
            f"{_describe_missing_hub(task, split)}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # no such dataset, config or split; an incomplete download
        reason = str(error).partition("\n")[0]
        if missing and (isinstance(error, FileNotFoundError) or "find cache" in reason):  # the cache has a part of it
            reason = f"{reason.rstrip('.')}, and {missing}; {_describe_missing_hub(task, split)}"
        raise UserError(
            f"task.hub_id={hub_id}, task.hub_config={task.hub_config or 'null'}: the {split} split cannot be loaded: "
            f"{reason}"
        ) from error


def _describe_missing_hub(task: Task, split: str) -> str:
    """Return what to do on a machine without access to the hub."""
    columns = [column for _, column in list_file_columns(task)]
    return (
        f"give task.data_dir=FOLDER with files for {_name_needed_splits(task)} (such as {split}.jsonl) that have "
        f"the columns {', '.join(columns)}, or set HF_HOME to a copy of the cache of a machine that has loaded it."
    )


def _name_needed_splits(task: Task) -> str:
    return ", ".join(split for split in list_splits(task) if split != HELD_OUT)


def reshape_rows(task: Task, source: Source) -> Source:
    """Turn dicts into columns, so that WMT's `translation: {en, ro}` is two, lists into texts or references, and
    conversations into a source and a target."""
    if task.messages_column is not None:
        return source._replace(rows=split_conversations(task, source))
    rows = source.rows
    if task.kind is TaskKind.question_answering:
        rows = split_answers(task, rows, source)
    flat = rows.flatten()  # also nested dicts, and the hub's Translation type
    if opened := {long: long.rpartition(".")[2] for long in flat.column_names if long not in rows.column_names}:
        names = Counter([*opened.values(), *(name for name in flat.column_names if name not in opened)])
        rows = flat.rename_columns({long: part for long, part in opened.items() if names[part] == 1})
    if task.kind is TaskKind.token_classification:
        rows = split_cells(task, rows)
    if task.kind is TaskKind.text_to_text and {task.source_column, task.target_column} <= set(rows.column_names):
        if task.source_join is not None:
            joined = [_join_texts(task.source_join, cell) for cell in rows[task.source_column][:]]
            rows = rows.remove_columns(task.source_column).add_column(task.source_column, joined)
        if task.merge_references:
            check_cells(task, rows, source)  # while each row is still a row of the file
            rows = _merge_references(task, rows)
    return source._replace(rows=rows)


def _join_texts(between: str, cell: Any) -> Any:
    """Join a list of texts into one; return anything else unchanged, which the check of the cells then reports."""
    is_list = isinstance(cell, list) and all(isinstance(part, str) for part in cell)
    return between.join(cell) if is_list else cell


def _merge_references(task: Task, rows: Dataset) -> Dataset:
    """Keep the first row of each source, with the list of all targets of this source as its target."""
    first: dict[str, int] = {}
    targets: dict[str, list[str]] = defaultdict(list)
    for index, (text, cell) in enumerate(zip(rows[task.source_column][:], rows[task.target_column][:], strict=True)):
        first.setdefault(text, index)
        targets[text].extend([cell] if isinstance(cell, str) else cell)
    kept = number_rows(rows).select(list(first.values())).remove_columns(task.target_column)
    return kept.add_column(task.target_column, list(targets.values()))
