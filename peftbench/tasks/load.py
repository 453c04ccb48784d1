"""The raw rows of a task, from the user's files, the docstrings of installed packages, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import datasets
from datasets import ClassLabel, Dataset, load_dataset

from peftbench.config import Task, TaskKind, task_files
from peftbench.errors import UserError, unknown
from peftbench.hub import hub_missing
from peftbench.tasks.cache import Recent
from peftbench.tasks.deal import deal, numbered
from peftbench.tasks.docstrings import Split, summary_rows, topic_rows
from peftbench.tasks.files import find_split, has_split, place, read_file

Roles = dict[str, tuple[str, int | None]]  # the split of each role, and how many rows at most


@dataclass(frozen=True, eq=False)
class Loaded:
    """The rows of a task before a tokenizer has seen them. Never changed, for several runs may share it."""

    task: Task  # with the labels that were found, where it named none
    roles: Roles
    rows: dict[str, Dataset]  # by split; as many as any role of the split needs
    sizes: dict[str, int]  # by split: how many rows there are
    notes: list[str] = field(default_factory=list)  # what was decided here, a sentence each, for the record


class Source(NamedTuple):
    """The rows of a split as they were read, and where they come from."""

    rows: Dataset
    name: str  # what to call it in a message
    file: str | None = None

    def at(self, row: int) -> str:
        """Where a row (numbered from 1) stands."""
        return place(self.file, row) if self.file else f"{self.name}, row {row}"


def load(task: Task, training: bool = True, dealt: Sequence[str] | None = None) -> Loaded:
    """The checked rows of all splits of the task, see `load_rows`; without `training`, of those that are reported on.

    Args:
        dealt: the splits that were dealt from the training file, where that was for another task; by default those
            that are `homeless` in this one.

    A split without a source of its own is dealt from the training file (`deal.py`); where the task names no labels,
    those of the training split are taken, sorted; a further split that the user's files do not have is left out. All
    three are noted. Raises UserError as `load_rows` does.

    What an earlier run of this process has read is given again where the task and its files are the same.
    """
    key = json.dumps([asdict(task), training, dealt, *_stats(task)], default=str)
    return _recent.get(key, lambda: _load(task, training, homeless(task) if dealt is None else dealt))


def homeless(task: Task) -> list[str]:
    """The splits without a source of their own, which are dealt from the training file."""
    task, _ = _without_absent(task)
    return [split for split in splits(task) if not _has_source(task, split)]


def _load(task: Task, training: bool, dealt: Sequence[str]) -> Loaded:
    task, notes = _without_absent(task)
    read = cache(partial(_read, task))
    wanted = (
        roles(task) if training else {name: role for name, role in roles(task).items() if name.startswith("report")}
    )
    limits = _limits(wanted)
    if task.kind is TaskKind.classification and not task.labels:
        task, note = _with_labels(task, read(task.train_split))
        notes.append(note)
    rows: dict[str, Dataset] = {}
    if dealt and limits.keys() & {*dealt, task.train_split}:
        train = read(task.train_split)
        whole = _checked(task, task.train_split, train, None)
        rows = deal(whole, input_columns(task), task.train_split, dealt, train.name)
        rows = {split: part for split, part in rows.items() if split not in task_files(task) or split not in dealt}
        each = "each have" if len(dealt) > 1 else "has"
        notes.append(
            f"{train.name} is dealt by a hash of the input: {' and '.join(dealt)} {each} one in ten of the "
            "different inputs."
        )
    sizes = {split: len(rows[split] if split in rows else read(split).rows) for split in limits}
    for split, limit in limits.items():
        rows[split] = head(rows[split], limit) if split in rows else _checked(task, split, read(split), limit)
    return Loaded(task, wanted, {split: rows[split] for split in limits}, sizes, notes)


_recent: Recent[Loaded] = Recent()


def _stats(task: Task) -> Iterator[tuple[str, int, int]]:
    """The task's own files as they are now: path, size and time of the last change."""
    files = [Path(file).expanduser() for file in task_files(task).values()]
    if task.data_dir is not None and (folder := Path(task.data_dir).expanduser()).is_dir():
        files.extend(folder.iterdir())
    for file in sorted(files):
        if file.is_file():
            yield str(file), file.stat().st_size, file.stat().st_mtime_ns


def load_rows(task: Task, split: str, limit: int | None = None) -> Dataset:
    """The first `limit` rows of `split` (null: all), with every column that the source has.

    The source is the first that is set of the user's files, `task.data_dir`, `task.packages`, `task.hub_id`.
    Text columns are checked to hold text, and labels, given by name or by code, come out as codes: ints that index
    `task.labels`, or as numbers for a regression. Raises UserError for a source that cannot be read, a missing column,
    and a cell without text or with an unknown label.
    """
    return _checked(task, split, _read(task, split), limit)


def label_names(task: Task) -> list[str]:
    """The labels of the task, or, where it names none, of its training split."""
    if task.kind is not TaskKind.classification or task.labels:
        return list(task.labels)
    return _with_labels(task, _read(task, task.train_split))[0].labels


def head(rows: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows; all of them where there are no more than that."""
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


def input_columns(task: Task) -> list[str]:
    """The columns that the model reads: one or two texts to classify, or a source."""
    if task.kind is TaskKind.text_to_text:
        return [task.source_column]
    return list(task.text_columns)


def splits(task: Task) -> list[str]:
    """The splits that the task reads, each named once."""
    return list(_limits(roles(task)))


def roles(task: Task) -> Roles:
    """The roles that data has in a run: to train on, to select a state, to report on, and to report on further."""
    return {
        "train": (task.train_split, task.max_train),
        "selection": (task.selection_split, task.max_selection),
        "report": (task.report_split, task.max_eval),
        **{f"report_{other}": (other, task.max_eval) for other in task.further_splits if other != task.report_split},
    }


def _limits(wanted: Roles) -> dict[str, int | None]:
    """How many rows of each split are needed; null: all of them."""
    limits: dict[str, list[int | None]] = defaultdict(list)
    for split, limit in wanted.values():
        limits[split].append(limit)
    return {split: _largest(of_split) for split, of_split in limits.items()}


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
    if task.kind is TaskKind.text_to_text:
        return [("task.source_column", task.source_column), ("task.target_column", task.target_column)]
    return [*(("task.text_columns", column) for column in task.text_columns), ("task.label_column", task.label_column)]


def _checked(task: Task, split: str, source: Source, limit: int | None) -> Dataset:
    """What `load_rows` promises, of rows that have been read."""
    if not len(source.rows):
        raise UserError(f"{source.name}: the {split} split has no rows.")
    rows = head(source.rows, limit)
    _require_columns(source, _keys(task))
    _check_cells(task, rows, source)
    if task.kind is TaskKind.text_to_text:
        return rows
    cells = rows[task.label_column][:]
    regression = task.kind is TaskKind.regression
    codes: Sequence[float] = _numbers(cells, source) if regression else _codes(task.labels, cells, source)
    return rows.remove_columns(task.label_column).add_column(task.label_column, codes)


def _shaped(task: Task, source: Source) -> Source:
    """Dicts opened, so that WMT's `translation: {en, ro}` is two columns, and lists made into texts or references."""
    rows = source.rows
    dicts = [name for name, feature in rows.features.items() if isinstance(feature, dict)]
    if dicts:
        opened = {f"{name}.{part}": part for name in dicts for part in rows.features[name]}
        free = {long: part for long, part in opened.items() if part not in rows.column_names}
        rows = rows.flatten().rename_columns(free)
    if task.kind is TaskKind.text_to_text and {task.source_column, task.target_column} <= set(rows.column_names):
        if task.source_join is not None:
            joined = [_joined(task.source_join, cell) for cell in rows[task.source_column][:]]
            rows = rows.remove_columns(task.source_column).add_column(task.source_column, joined)
        if task.merge_references:
            _check_cells(task, rows, source)  # while a row is a row of the file
            rows = _merged(task, rows)
    return source._replace(rows=rows)


def _joined(between: str, cell: Any) -> Any:
    """A list of texts as one; anything else as it is, for the check of the cells to name."""
    is_list = isinstance(cell, list) and all(isinstance(part, str) for part in cell)
    return between.join(cell) if is_list else cell


def _merged(task: Task, rows: Dataset) -> Dataset:
    """One row for each source, the first with it, whose target is the list of all its targets."""
    first: dict[str, int] = {}
    targets: dict[str, list[str]] = defaultdict(list)
    for index, (text, cell) in enumerate(zip(rows[task.source_column][:], rows[task.target_column][:], strict=True)):
        first.setdefault(text, index)
        targets[text].extend([cell] if isinstance(cell, str) else cell)
    kept = numbered(rows).select(list(first.values())).remove_columns(task.target_column)
    return kept.add_column(task.target_column, list(targets.values()))


def _require_columns(source: Source, keys: Sequence[tuple[str, str]]) -> None:
    there = source.rows.column_names
    missing = [unknown(key, column, there) for key, column in keys if column not in there]
    if missing:
        raise UserError(*(f"{source.name}: {sentence}" for sentence in missing))


def _check_cells(task: Task, rows: Dataset, source: Source) -> None:
    """Inputs are texts; a target is a text or a list of them."""
    for column in input_columns(task):
        for number, cell in enumerate(rows[column][:], 1):
            if not isinstance(cell, str):
                raise UserError(f"{source.at(number)}: column {column} holds {cell!r:.40}, not text.")
    if task.kind is TaskKind.text_to_text:
        for number, cell in enumerate(rows[task.target_column][:], 1):
            texts = [cell] if isinstance(cell, str) else cell
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"{source.at(number)}: column {task.target_column} holds {cell!r:.40}, not text or a list of texts."
                )


def _with_labels(task: Task, train: Source) -> tuple[Task, str]:
    """The task with the labels of its training split, and the note that says so."""
    _require_columns(train, _keys(task))
    feature = train.rows.features[task.label_column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)  # in the order of their codes
    else:
        cells = train.rows[task.label_column][:]
        for number, cell in enumerate(cells, 1):
            if cell is None or not str(cell).strip():
                raise UserError(f"{train.at(number)}: column {task.label_column} is empty; every row needs a label.")
        names = sorted({str(cell) for cell in cells})
        if all(name.isdecimal() for name in names):
            names.sort(key=int)
    if len(names) < 2:
        raise UserError(f"{train.name}: all rows have the label {', '.join(names)}; two or more are needed.")
    if len(names) > max(2, len(train.rows) // 2):
        raise UserError(
            f"{train.name}: column {task.label_column} holds {len(names)} labels in {len(train.rows)} rows; name the "
            "column of labels by task.label_column, or all labels by task.labels."
        )
    return replace(task, labels=names), f"The labels are those of {train.name}, in this order: {_listed(names)}."


def _without_absent(task: Task) -> tuple[Task, list[str]]:
    """The task without the further splits that the user's files, where there are any, lack; the note that says so."""
    files = task_files(task)
    if not files and task.data_dir is None:
        return task, []
    there = [s for s in task.further_splits if s in files or (task.data_dir and has_split(task.data_dir, s))]
    absent = [split for split in task.further_splits if split not in there]
    notes = [f"{_listed(absent)} is not scored: there is no file for it."] if absent else []
    return replace(task, further_splits=there), notes


def _has_source(task: Task, split: str) -> bool:
    """Whether there is anything to read the split from; without even a training file reading is left to say so."""
    elsewhere = any((task.data_dir, task.packages, task.hub_id)) or task.train_split not in task_files(task)
    return split in task_files(task) or elsewhere


def _read(task: Task, split: str) -> Source:
    """The rows of a split, its columns in shape."""
    return _shaped(task, _read_raw(task, split))


def _read_raw(task: Task, split: str) -> Source:
    for named in task.data_files:
        if named not in splits(task):
            raise UserError(
                f"task.data_files.{named} is no split of this task; its splits are {_listed(splits(task))}."
            )
    if file := task_files(task).get(split):
        return Source(read_file(file), file, file)
    if task.data_dir is not None:
        found = str(find_split(task.data_dir, split))
        return Source(read_file(found), found, found)
    if task.packages is not None:
        return Source(_read_docstrings(task.kind, task.packages, split), f"The docstrings of {_listed(task.packages)}")
    if task.hub_id is not None:
        return Source(_read_hub(task, task.hub_id, split), " ".join(filter(None, [task.hub_id, task.hub_config])))
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
        try:
            return load_dataset(hub_id, task.hub_config, split=split, revision=task.hub_revision)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error) or task.hub_revision is not None:
                raise
            # The hub keeps what such a script yielded on a branch of its own.
            return load_dataset(hub_id, task.hub_config, split=split, revision="refs/convert/parquet")
    except ConnectionError as error:
        columns = [column for _, column in _keys(task)]
        raise UserError(
            f"task.hub_id={hub_id} is not in this machine's cache and {missing or 'the hub does not answer'}; give "
            f"task.data_dir=FOLDER with files for {_listed(splits(task))} (such as {split}.jsonl) that hold the "
            f"columns {_listed(columns)}, or set HF_HOME to a copy of the cache of a machine that has loaded it."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # no such dataset, config or split; a torn download
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"task.hub_id={hub_id}, task.hub_config={task.hub_config or 'null'}: the {split} split cannot be loaded: "
            f"{reason}"
        ) from error


def _codes(labels: Sequence[str], cells: Sequence[object], source: Source) -> list[int]:
    names = {label: code for code, label in enumerate(labels)}
    digits = {str(code): code for code in range(len(labels))}
    # Where a name is a number, such as a star rating, a number in a cell can only be meant as a name.
    known = names if names.keys() & digits.keys() else names | digits
    for number, cell in enumerate(cells, 1):
        if str(cell) not in known:
            raise UserError(f"{source.at(number)}: label {cell!r} is none of {_listed(list(known))}.")
    return [known[str(cell)] for cell in cells]


def _numbers(cells: Sequence[Any], source: Source) -> list[float]:
    numbers = []
    for row, cell in enumerate(cells, 1):
        try:
            numbers.append(float(cell))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise UserError(f"{source.at(row)}: label {cell!r:.40} is no number.")
    return numbers


def _largest(limits: Sequence[int | None]) -> int | None:
    numbers = [limit for limit in limits if limit is not None]
    return max(numbers) if len(numbers) == len(limits) else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
