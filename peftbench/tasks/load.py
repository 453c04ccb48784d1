"""The raw rows of a split, from the user's files, the docstrings of installed packages, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import get_args

import datasets
from datasets import Dataset, load_dataset

from peftbench.config import Task, TaskKind
from peftbench.errors import UserError, unknown
from peftbench.hub import hub_missing
from peftbench.tasks.docstrings import Split, summary_rows, topic_rows
from peftbench.tasks.files import find_split, read_file


def load_rows(task: Task, split: str, limit: int | None = None) -> Dataset:
    """The first `limit` rows of `split` (null: all), with every column that the source has.

    The source is the first that is set of `task.data_files`, `task.data_dir`, `task.packages`, `task.hub_id`.
    Text columns are checked to hold text, and labels, given by name or by code, come out as codes: ints that index
    `task.labels`. Raises UserError for a source that cannot be read, a missing column, and a cell without text or
    with an unknown label.
    """
    keys = _keys(task)
    rows, source = _read(task, split)
    if not len(rows):
        raise UserError(f"{source}: the {split} split has no rows.")
    rows = head(rows, limit)
    missing = [unknown(key, column, rows.column_names) for key, column in keys if column not in rows.column_names]
    if missing:
        raise UserError(*(f"{source}: {sentence}" for sentence in missing))
    for column in text_columns(task):
        for number, cell in enumerate(rows[column][:], 1):
            if not isinstance(cell, str):
                raise UserError(f"{source}, row {number}: column {column} holds {cell!r:.40}, not text.")
    if task.kind is TaskKind.classification:
        codes = _codes(task.labels, rows[task.label_column][:], source)
        rows = rows.remove_columns(task.label_column).add_column(task.label_column, codes)
    return rows


def head(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows; all of them where there are no more than that."""
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


def text_columns(task: Task) -> list[str]:
    """The columns that hold text: one or two to classify, or a source and its target."""
    return [column for key, column in _keys(task) if key != "task.label_column"]


def splits(task: Task) -> list[str]:
    """The splits that the task reads, each named once."""
    return list(dict.fromkeys([task.train_split, task.selection_split, task.report_split]))


def data_fingerprint(task: Task, rows: Dataset) -> str:
    """The sha256, in hexadecimal, of the cells that the task uses: for equal text it is equal, whatever the source."""
    columns = [column for _, column in _keys(task)]
    digest = hashlib.sha256()
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        for cells in zip(*(batch[column] for column in columns), strict=True):
            digest.update(json.dumps(cells).encode() + b"\n")
    return digest.hexdigest()


def _keys(task: Task) -> list[tuple[str, str]]:
    """(key as typed, column) for each column that the task uses."""
    if task.kind is TaskKind.summarization:
        return [("task.source_column", task.source_column), ("task.target_column", task.target_column)]
    if len(task.text_columns) not in (1, 2):
        raise UserError(f"task.text_columns=[{','.join(task.text_columns)}] must name one column, or two for a pair.")
    return [*(("task.text_columns", column) for column in task.text_columns), ("task.label_column", task.label_column)]


def _read(task: Task, split: str) -> tuple[Dataset, str]:
    """The rows of a split and what to call their source in a message."""
    for named in task.data_files:
        if named not in splits(task):
            raise UserError(
                f"task.data_files.{named} is no split of this task; its splits are {_listed(splits(task))}."
            )
    if split in task.data_files:
        return read_file(task.data_files[split]), task.data_files[split]
    if task.data_dir is not None:
        file = find_split(task.data_dir, split)
        return read_file(file), str(file)
    if task.packages is not None:
        return _read_docstrings(task.kind, task.packages, split), f"The docstrings of {_listed(task.packages)}"
    if task.hub_id is not None:
        return _read_hub(task, task.hub_id, split), " ".join(filter(None, [task.hub_id, task.hub_config]))
    raise UserError(f"task={task.name} has no data; give task.data_dir=FOLDER, with files for {_listed(splits(task))}.")


def _read_docstrings(kind: TaskKind, packages: Sequence[str], split: str) -> Dataset:
    names: tuple[Split, ...] = get_args(Split)
    for name in names:
        if name == split:
            make = topic_rows if kind is TaskKind.classification else summary_rows
            return Dataset.from_list(make(packages, name))
    raise UserError(f"Docstrings have no {split} split; their splits are {_listed(names)}.")


def _read_hub(task: Task, hub_id: str, split: str) -> Dataset:
    missing = hub_missing()
    if missing:
        datasets.config.HF_HUB_OFFLINE = True  # spares 20 s of retries; what is in the cache still loads
    try:
        return load_dataset(hub_id, task.hub_config, split=split)
    except ConnectionError as error:
        columns = [column for _, column in _keys(task)]
        raise UserError(
            f"task.hub_id={hub_id} is not in this machine's cache and {missing or 'the hub does not answer'}; give "
            f"task.data_dir=FOLDER with files for {_listed(splits(task))} that hold the columns {_listed(columns)}."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # no such dataset, config or split; a torn download
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"task.hub_id={hub_id}, task.hub_config={task.hub_config or 'null'}: the {split} split cannot be loaded: "
            f"{reason}"
        ) from error


def _codes(labels: Sequence[str], cells: Sequence[object], source: str) -> list[int]:
    names = {label: code for code, label in enumerate(labels)}
    digits = {str(code): code for code in range(len(labels))}
    # Where a name is a number, such as a star rating, a number in a cell can only be meant as a name.
    known = names if names.keys() & digits.keys() else names | digits
    for number, cell in enumerate(cells, 1):
        if str(cell) not in known:
            raise UserError(f"{source}, row {number}: label {cell!r} is none of {_listed(list(known))}.")
    return [known[str(cell)] for cell in cells]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
