"""The identity of a run: a hash of the keys of the config that can change a result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

from peftbench.config.own_parts import TARGET, find_code, list_own_code
from peftbench.config.schema import Run, list_task_files
from peftbench.config.stamps import stamp_content

# Keys that change no result except by rounding: where the run happens, how fast and with which guards; tables that have
# already had their effect on other keys; keys that only counting reads; and the budget, which has already been turned
# into bottlenecks: two budgets with the same bottlenecks are the same run.
IGNORED = (
    "output_dir",
    "rerun",
    "retry",
    "jobs",
    "trackers",
    "trackers_group",
    "retention",
    "speed",
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
    "task.group_column",
    "task.paper",
    "task.quick",
    "trainer.device",
    "trainer.devices",
    "trainer.sharding",
    "trainer.compile",
    "trainer.graphs",
    "trainer.fused_loss",
    "trainer.checkpoint_minutes",
    "trainer.micro_batch",
    "trainer.padding_free",
    "trainer.eval_batch_size",
    "trainer.eval_batch_tokens",
)

# Keys that runs of earlier versions did not have: at their defaults they are no part of a name.
LATER = (
    "model.quantization",
    "model.attn_implementation",
    "model.chat_template",
    "trainer.optimizer",
    "trainer.early_stopping",
    "trainer.class_weights",
    "trainer.lora_plus",
    "task.chat",
    "task.messages_column",
    "task.tools_column",
    "task.max_length",
    "task.stride",
    "task.max_answer_length",
    "task.unanswerable",
    "task.deal_by",
    "task.column_names",
    "task.delimiter",
    "task._target_",
    "task.settings",
)

_SPECIAL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # what a special token may look like: </s>, <|im_start|>, [SEP]


def hash_run(run: Run, stamp: Callable[..., str] = stamp_content) -> str:
    """Return the name of a run: eight hexadecimal digits.

    Files count by content, not by path, and so does the code of the user's own form, task and callbacks. Runs that an
    `output_dir` in `task.data_dir` has do not count. Raises UserError if a path of the config does not exist, or such
    code cannot be imported.

    Args:
        stamp: a function from a path, and a folder in it that is left out, to a hash of the content.
    """
    config = to_plain(replace(run, sizes=None, size=None))  # most of a run, and `IGNORED`
    for key in IGNORED:
        *groups, leaf = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        del node[leaf]
    prompt = config["task"]["prompt"]
    if prompt is not None and _SPECIAL.search(prompt):  # earlier versions read them as ordinary characters
        config["task"]["special_tokens"] = "kept"
    for group in ("model", "trainer", "task"):
        drop_later_defaults(group, config[group])
    for name in ("peft", "callbacks"):  # earlier runs had no such keys
        if not config[name]:
            del config[name]
    for modification in (config, *config["mix"].values()):
        form = modification["functional_form"]
        del form[TARGET]  # which `name_own_parts` has put into the name
        if not form["settings"]:
            del form["settings"]
    if own := list_own_code(run):
        config["own_code"] = {part.name: stamp(str(find_code(part))) for part in own}
    if config["search"] is not None and config["search"]["trials"] is None:  # as earlier versions had it
        for key in ("trials", "sampler", "sampler_seed", "prune", "study"):
            del config["search"][key]
        for variation in config["search"]["keys"].values():
            for key in ("low", "high", "log"):
                del variation[key]
    if config["search"] is not None:  # where scores are computed, and when no trial begins, changes none of them
        for key in ("report", "minutes"):
            del config["search"][key]
    for key in ("extend", "further"):  # at their defaults, as earlier versions had it
        if config["search"] is not None and not config["search"][key]:
            del config["search"][key]
    if config["search"] is None:  # a settled search (records/choice.py) is the run that it chose
        del config["search"]

    # Keys that a path overrides have no effect either.
    model, task = config["model"], config["task"]
    path, data_dir = model.pop("path"), task.pop("data_dir")
    for key in ("data_files", "train_file", "validation_file", "test_file"):
        del task[key]
    if run.model.chat_template is not None:
        model["chat_template"] = stamp(run.model.chat_template)
    if path:
        model |= {"hub_id": None, "revision": None, "content": stamp(path)}
    if files := list_task_files(run.task):
        task["content"] = {split: _stamp_files(names, stamp) for split, names in files.items()}
    elif data_dir:
        task["content"] = stamp(data_dir, run.output_dir)
    if "content" in task:
        task |= {"hub_id": None, "hub_config": None, "hub_revision": None}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def _stamp_files(files: Sequence[str], stamp: Callable[[str], str]) -> str | list[str]:
    """Return the hash of a file's content, or those of several files in their order."""
    found = [stamp(file) for file in files]
    return found[0] if len(found) == 1 else found


def drop_later_defaults(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """Delete from the values of a group the keys of `LATER` that are at their defaults; return the values."""
    for key in LATER:
        prefix, leaf = key.split(".")
        if prefix == group and values[leaf] == _get_default(key):
            del values[leaf]
    return values


@cache
def _get_default(key: str) -> Any:
    """Return the JSON value of a key's default."""
    group, leaf = key.split(".")
    (found,) = (field for field in fields(get_type_hints(Run)[group]) if field.name == leaf)
    default = found.default if found.default_factory is MISSING else found.default_factory()
    return default.name if isinstance(default, Enum) else default


def to_plain(config: object) -> dict[str, Any]:
    """Return a run, or a part of one, as nested dicts and lists of JSON values.

    Enum members become their names, and an int becomes a float if the schema has a float. OmegaConf has the same
    result, but needs 50 ms for a run.
    """
    assert is_dataclass(config) and not isinstance(config, type)
    kinds = _list_kinds(type(config))
    return {field.name: _to_plain_value(getattr(config, field.name), kinds[field.name]) for field in fields(config)}


def _to_plain_value(value: Any, kinds: frozenset[object]) -> Any:
    """Return the JSON value of a key whose type consists of `kinds`."""
    if is_dataclass(value):
        return to_plain(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _to_plain_value(below, kinds) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain_value(below, kinds) for below in value]
    return float(value) if type(value) is int and float in kinds else value


@cache
def _list_kinds(schema: type) -> dict[str, frozenset[object]]:
    """Return for each key the types in its type: float and None for `float | None`, float for `list[float]`."""
    return {name: frozenset(_flatten_kind(kind)) for name, kind in get_type_hints(schema).items()}


def _flatten_kind(kind: Any) -> list[object]:
    parts = [part for below in get_args(kind) for part in _flatten_kind(below)]
    return parts or [kind]
