"""The rows of a task before tokenisation: read, checked, and dealt to splits if files are missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from datasets import Dataset

from peftbench.config.roles import HELD_OUT, VALIDATION, Roles, assign_roles, is_reported, limit_splits, list_splits
from peftbench.config.schema import WITH_LABELS, Task, is_text_table, list_task_files
from peftbench.tasks.cache import Recent
from peftbench.tasks.deal import deal_rows, describe_deal
from peftbench.tasks.file_set import has_split, list_candidates
from peftbench.tasks.overlap import describe_overlap
from peftbench.tasks.rows import (
    check_split,
    describe_empty_texts,
    has_codes,
    list_file_columns,
    list_input_columns,
    list_used_columns,
    require_texts,
    set_labels,
    take_head,
)
from peftbench.tasks.source import find_files, has_source, read_split
from peftbench.utils.errors import UserError
from peftbench.utils.files import expand_home


@dataclass(frozen=True, eq=False)
class Loaded:
    """The rows of a task before tokenisation. They are never changed, because several runs may share them."""

    task: Task  # with the labels that were found, if it named none
    roles: Roles
    rows: dict[str, Dataset]  # by split; as many as the role of the split that needs most
    sizes: dict[str, int]  # by split: how many rows it has
    notes: list[str] = field(default_factory=list)  # a sentence for each decision made here, for the record
    labelled: bool = True  # false: rows to predict for, whose labels are placeholders


def load_task(
    task: Task, training: bool = True, dealt: Sequence[str] | None = None, labels: Sequence[str] = ()
) -> Loaded:
    """Load the checked rows of all splits of the task; without `training`, only of the splits that are reported on.

    Args:
        dealt: the splits that were dealt from the training file when another task was loaded; by default the splits
            that are `list_dealt` in this one.
        labels: the labels that were found in the training split when the task was trained, if it names none.

    A split without a source of its own is dealt from the training file (`deal.py`). If the task names no labels, the
    sorted labels of the training split are used. A further split that the user's files do not have is left out. All
    three are noted. Rows that an earlier run of this process has read are reused if the task and its files are the
    same.

    Raises:
        UserError: as `read_split` and `check_split`.
    """
    key = json.dumps([asdict(task), training, dealt, labels, *_stat_files(task)], default=str)
    return _recent.get(key, lambda: _load_splits(task, training, list_dealt(task) if dealt is None else dealt, labels))


def list_dealt(task: Task) -> list[str]:
    """Return the splits without a source of their own, which are dealt from the training file."""
    task, _ = _drop_absent(task)
    return [split for split in list_splits(task) if not has_source(task, split)]


def restrict_to_reported(task: Task, dealt: Sequence[str]) -> Task:
    """Return the task with only those of the user's files that reporting reads: a dealt split is part of the training
    file."""
    read = {split for role, (split, _) in assign_roles(task).items() if is_reported(role)}
    if read & set(_list_still_dealt(task, dealt)):
        read.add(task.train_split)
    return replace(
        task,
        data_files={split: file for split, file in task.data_files.items() if split in read},
        train_file=task.train_file if task.train_split in read else None,
        validation_file=task.validation_file if task.selection_split in read else None,
        test_file=task.test_file if task.report_split in read else None,
    )


def _list_still_dealt(task: Task, dealt: Sequence[str]) -> list[str]:
    """Return the splits that were dealt for another task and for which this one has no file."""
    return [split for split in dealt if split not in list_task_files(task)]


def _load_splits(task: Task, training: bool, dealt: Sequence[str], labels: Sequence[str]) -> Loaded:
    task, notes = _drop_absent(task)
    if training:  # other calls may read some of the files only
        _require_text_tables(task)
        _require_dealt(task, dealt)
        notes.extend(_note_idle_files(task))
    notes.extend(_note_trained_files(task))
    read = cache(partial(read_split, task))
    wanted = {role: place for role, place in assign_roles(task).items() if training or is_reported(role)}
    limits = limit_splits(wanted)
    coded = bool(task.labels)
    if task.kind in WITH_LABELS and not coded:
        if labels:
            task = replace(task, labels=list(labels))
        else:
            coded = has_codes(task, read(task.train_split))
            task, note = set_labels(task, read(task.train_split))
            notes.append(note)
    check = partial(check_split, task, coded=coded)
    rows: dict[str, Dataset] = {}
    still = _list_still_dealt(task, dealt)
    if dealt and limits.keys() & {*still, task.train_split}:
        train = read(task.train_split)
        whole = check(task.train_split, train, None)
        rows = deal_rows(whole, list_input_columns(task), task.train_split, dealt, train.name, task.deal_by)
        notes.append(describe_deal(rows, dealt, train.name, task.deal_by))
        rows = {split: rows[split] for split in (task.train_split, *still)}
    sizes = {split: len(rows[split] if split in rows else read(split).rows) for split in limits}
    for split, limit in limits.items():
        rows[split] = take_head(rows[split], limit) if split in rows else check(split, read(split), limit)
    if task.train_split in limits:
        require_texts(task, rows[task.train_split], task.train_split)
        apart = set(limits) - {task.train_split, *dealt, *_list_trained_files(task)}
        others = {split: rows[split] for split in limits if split in apart}
        notes.extend(describe_overlap(list_input_columns(task), rows[task.train_split], others))
    notes.extend(describe_empty_texts(task, {split: rows[split] for split in limits}))
    return Loaded(task, wanted, {split: rows[split] for split in limits}, sizes, notes)


def _require_text_tables(task: Task) -> None:
    """Raise UserError if a key describes .csv and .tsv files, and the task has none."""
    idle = [key for key in ("column_names", "delimiter") if getattr(task, key)]
    if not idle:
        return
    found = [find_files(task, split) for split in list_splits(task) if has_source(task, split)]
    if not any(is_text_table(path) for files in found if files is not None for path in files.paths):
        raise UserError(
            *(f"task.{key} is for .csv and .tsv files, and the task has none; leave it out." for key in idle)
        )


def _require_dealt(task: Task, dealt: Sequence[str]) -> None:
    """Raise UserError if a key says how splits are dealt, and none is."""
    if task.deal_by is not None and not dealt:
        raise UserError(
            f"task.deal_by={task.deal_by}: no split is dealt, because each has rows of its own; add "
            f"task.selection_split={HELD_OUT}, or leave it out."
        )


_recent: Recent[Loaded] = Recent()


def _stat_files(task: Task) -> Iterator[tuple[str, int, int]]:
    """Yield the current state of the task's own files: path, size and time of the last change."""
    files = [expand_home(file) for files in list_task_files(task).values() for file in files]
    if task.data_dir is not None and (folder := expand_home(task.data_dir)).is_dir():
        files.extend(folder.iterdir())
    for file in sorted(files):
        if file.is_file():
            yield str(file), file.stat().st_size, file.stat().st_mtime_ns


def read_label_names(task: Task) -> list[str]:
    """Return the labels of the task, or of its training split if the task names none."""
    if task.kind not in WITH_LABELS or task.labels:
        return list(task.labels)
    return set_labels(task, read_split(task, task.train_split))[0].labels


def fingerprint_data(task: Task, rows: Dataset) -> str:
    """Return the sha256, in hexadecimal, of the cells that the task uses. Equal text has equal hashes in any source."""
    columns = [column for _, column in list_used_columns(task)]
    digest = hashlib.sha256()
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        for cells in zip(*(batch[column] for column in columns), strict=True):
            digest.update(json.dumps(cells).encode() + b"\n")
    return digest.hexdigest()


def _resolve_files(task: Task) -> dict[str, dict[Path, str]]:
    """Return the names of the user's own files by their paths, for each split."""
    return {
        split: {expand_home(file).resolve(): file for file in files} for split, files in list_task_files(task).items()
    }


def _list_trained_files(task: Task) -> list[str]:
    """Return the other splits that have a file of the training split."""
    splits = _resolve_files(task)
    train = splits.pop(task.train_split, {})
    return [split for split, files in splits.items() if files.keys() & train.keys()]


def _note_trained_files(task: Task) -> list[str]:
    """Return the note that the training file is also the file of another split, if so."""
    splits = _resolve_files(task)
    train, others = splits.pop(task.train_split, {}), _list_trained_files(task)
    if not others:
        return []
    (file, *_) = (name for place, name in train.items() if any(place in files for files in splits.values()))
    return [f"{file} is a file of {task.train_split} and of {' and '.join(others)}: training rows are also scored."]


def _note_idle_files(task: Task) -> list[str]:
    """Return the note that `task.data_dir` has a file to choose on and that no split reads it, if so.

    It does not take the place of another selection split by itself: what is trained on would change with a file that
    nobody named, and the same line has other results on a machine without it.
    """
    if task.data_dir is None or task.selection_split in list_task_files(task):
        return []
    used = [column for _, column in list_file_columns(task)]
    found = list_candidates(task.data_dir, VALIDATION, used)
    read = {file for split in list_splits(task) for file in list_candidates(task.data_dir, split, used)}
    named = {place for files in _resolve_files(task).values() for place in files}
    idle = [file for file in found if file not in read and expand_home(file).resolve() not in named]
    if not idle:
        return []
    verb = "is" if len(idle) == 1 else "are"
    return [
        f"{' and '.join(idle)} {verb} not used, because task.selection_split={task.selection_split}; "
        f"task.selection_split={VALIDATION} chooses on {'it' if len(idle) == 1 else 'one'}."
    ]


def _drop_absent(task: Task) -> tuple[Task, list[str]]:
    """Return the task without the further splits that the user's files, if any, lack, and the note that says so."""
    files = list_task_files(task)
    if not files and task.data_dir is None:
        return task, []
    used = [column for _, column in list_file_columns(task)]
    there = [s for s in task.further_splits if s in files or (task.data_dir and has_split(task.data_dir, s, used))]
    absent = [split for split in task.further_splits if split not in there]
    notes = [f"{', '.join(absent)} is not scored: there is no file for it."] if absent else []
    return replace(task, further_splits=there), notes
