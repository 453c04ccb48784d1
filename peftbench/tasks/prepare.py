"""The one place that knows which class serves which kind of task, and what a process has prepared before."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config import Task, TaskKind
from peftbench.tasks.base import TaskData
from peftbench.tasks.classification import Classification
from peftbench.tasks.summarization import Summarization

KINDS: dict[TaskKind, type[TaskData]] = {
    TaskKind.classification: Classification,
    TaskKind.summarization: Summarization,
}

KEPT = 2  # data sets that a process keeps, for a sweep over two tasks or two backbones
_prepared: OrderedDict[str, TaskData] = OrderedDict()


def prepare(task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TaskData:
    """Reads and tokenises the task's splits for a backbone. Raises UserError for data that cannot be used.

    What was read and tokenised for an earlier run of this process is taken again where task, files, tokenizer and the
    backbone's config are the same. Nothing of a run gets into it: rows and tokens are never changed, and the earlier
    run's model is let go.
    """
    key = _key(task, tokenizer, model)
    if key not in _prepared:
        while len(_prepared) >= KEPT:
            _prepared.popitem(last=False)
        _prepared[key] = KINDS[task.kind](task, tokenizer, model).serving(None)
    _prepared.move_to_end(key)
    return _prepared[key].serving(model)


def _key(task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str:
    """All that what is prepared depends on."""
    backbone = [type(model).__name__, model.config.to_json_string(use_diff=False)]
    words = [type(tokenizer).__name__, tokenizer.name_or_path, len(tokenizer), tokenizer.model_max_length]
    return json.dumps([asdict(task), list(_files(task)), words, backbone], default=str)


def _files(task: Task) -> Iterator[tuple[str, int, int]]:
    """The task's own files as they are now: path, size and time of the last change."""
    folders = [Path(task.data_dir).expanduser()] if task.data_dir is not None else []
    named = [Path(file).expanduser() for file in task.data_files.values()]
    for file in sorted([*named, *(file for folder in folders for file in folder.iterdir())]):
        if file.is_file():
            yield str(file), file.stat().st_size, file.stat().st_mtime_ns
