"""What makes two runs the same run: a hash of the keys of the config that can change a result. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

from peftbench.config.schema import Run, task_files
from peftbench.config.stamps import content_stamp

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

_SPECIAL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what a special token may look like: </s>, <|im_start|>, [SEP]


def run_hash(run: Run, stamp: Callable[[str], str] = content_stamp) -> str:
    """Eight hexadecimal digits that name a run.

    Files count by content, not by path. Raises UserError where a path of the config does not exist.

    Args:
        stamp: what stands for the content of a path.
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
    if config["search"] is None:  # one that is settled, see records/choice.py, is the run that it has come to
        del config["search"]

    # What a path wins over has no effect either.
    model, task = config["model"], config["task"]
    path, data_dir = model.pop("path"), task.pop("data_dir")
    for key in ("data_files", "train_file", "validation_file", "test_file"):
        del task[key]
    if path:
        model |= {"hub_id": None, "revision": None, "content": stamp(path)}
    if files := task_files(run.task):
        task["content"] = {split: stamp(file) for split, file in files.items()}
    elif data_dir:
        task["content"] = stamp(data_dir)
    if "content" in task:
        task |= {"hub_id": None, "hub_config": None, "hub_revision": None}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


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
