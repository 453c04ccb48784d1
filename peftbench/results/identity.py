"""What makes two runs the same run: a hash of the keys of the config that can change a result. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from peftbench.config import Run, task_files
from peftbench.errors import UserError

# Keys that change no result but by rounding: where the run happens, how fast and how it is guarded, tables that have
# already had their effect on other keys, what only counting reads, and the budget: by then it has become bottlenecks,
# and two budgets that come to the same ones are the same run.
IGNORED = (
    "output_dir",
    "rerun",
    "retry",
    "jobs",
    "mps",
    "allow_unused",
    "fidelity.name",
    "budget",
    "budget_split",
    "sizes",
    "size",
    "model.sizes",
    "model.architecture",
    "task.sizes",
    "task.paper",
    "task.quick",
    "trainer.device",
    "trainer.compile",
    "trainer.graphs",
    "trainer.fused_loss",
    "trainer.checkpoint_minutes",
    "trainer.micro_batch",
    "trainer.padding_free",
    "trainer.eval_batch_size",
    "trainer.eval_batch_tokens",
)

_WHOLE = 1 << 20  # bytes; files smaller than this are hashed whole, of larger ones
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what a special token may look like: </s>, <|im_start|>, [SEP]
_END = 1 << 16  # only so many bytes at either end, beside the size


def run_hash(run: Run) -> str:
    """Eight hexadecimal digits that name a run.

    Files count by content, not by path. Raises UserError where a path of the config does not exist.
    """
    config = plain(run)
    for key in IGNORED:
        *groups, leaf = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        del node[leaf]
    prompt = config["task"]["prompt"]
    if prompt is not None and _SPECIAL.search(prompt):  # which earlier versions read as ordinary characters
        config["task"]["special_tokens"] = "kept"
    if config["search"] is None:  # one that is settled, see results/choice.py, is the run that it has come to
        del config["search"]

    # What a path wins over has no effect either.
    model, task = config["model"], config["task"]
    path, data_dir = model.pop("path"), task.pop("data_dir")
    for key in ("data_files", "train_file", "validation_file", "test_file"):
        del task[key]
    if path:
        model |= {"hub_id": None, "revision": None, "content": content_stamp(path)}
    if files := task_files(run.task):
        task["content"] = {split: content_stamp(file) for split, file in files.items()}
    elif data_dir:
        task["content"] = content_stamp(data_dir)
    if "content" in task:
        task |= {"hub_id": None, "hub_config": None, "hub_revision": None}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def run_dir(run: Run) -> Path:
    """The folder of a run: OUTPUT_DIR/TASK/MODEL/METHOD/HASH. Raises UserError as `run_hash` does."""
    return Path(run.output_dir).expanduser() / run.task.name / run.model.name / run.method / run_hash(run)


def content_stamp(path: str | Path) -> str:
    """Twelve hexadecimal digits that stand for a file, or for a folder with all files in it but hidden ones.

    Cheap also for gigabytes of weights: see `_WHOLE`. Raises UserError where there is no such path.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{path} does not exist; give the path of an existing file or folder.")
    found = [(file.relative_to(root).as_posix(), file) for file in root.rglob("*")] if root.is_dir() else []
    digest = hashlib.sha256()
    for name, file in sorted(found) or [(root.name, root)]:
        if file.is_file() and not any(part.startswith(".") for part in name.split("/")):
            size = file.stat().st_size
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            with file.open("rb") as content:
                if size < _WHOLE:
                    digest.update(content.read())
                else:
                    digest.update(content.read(_END))
                    content.seek(-_END, os.SEEK_END)
                    digest.update(content.read(_END))
    return digest.hexdigest()[:12]


def plain(config: object) -> dict[str, Any]:
    """A run, or a part of one, as nested dicts and lists of JSON values.

    Enum members go by their names, and a whole number where the schema has a float is one. It is what OmegaConf makes
    of it, which needs 50 ms for a run.
    """
    assert is_dataclass(config) and not isinstance(config, type)
    kinds = _kinds(type(config))
    return {field.name: _plain(getattr(config, field.name), kinds[field.name]) for field in fields(config)}


def _plain(value: Any, kinds: frozenset[object]) -> Any:
    """A value of a key whose type is made of `kinds`."""
    if is_dataclass(value):
        return plain(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(below, kinds) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below, kinds) for below in value]
    return float(value) if type(value) is int and float in kinds else value


@cache
def _kinds(schema: type) -> dict[str, frozenset[object]]:
    """Of each key the types that its type is made of: float and None of `float | None`, float of `list[float]`."""
    return {name: frozenset(_parts(kind)) for name, kind in get_type_hints(schema).items()}


def _parts(kind: Any) -> list[object]:
    parts = [part for below in get_args(kind) for part in _parts(below)]
    return parts or [kind]
