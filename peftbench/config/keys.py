"""The meaning of each key of a run: the help of its field in config/schema.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from peftbench.config.schema import HELP, Run

HIDDEN = ("sizes", "size")  # conf/sizes.yaml, and its column


class Key(NamedTuple):
    """A key and its default in the schema, both as typed, its choices if it has a fixed set, and its meaning."""

    name: str
    default: str
    choices: list[str]
    meaning: str


def list_keys(schema: type = Run, prefix: str = "") -> Iterator[Key]:
    """Yield every key of a dataclass of config/schema.py, including those of nested dataclasses, in file order."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        if not prefix and field.name in HIDDEN:
            continue
        hint = hints[field.name]
        kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
        inner = next((kind for kind in kinds if is_dataclass(kind)), None)
        if inner is not None and get_origin(hint) not in (dict, list):  # a mapping with free names is one key
            yield from list_keys(inner, f"{prefix}{field.name}.")
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        members: Mapping[str, Enum] = next((kind.__members__ for kind in kinds if issubclass(kind, Enum)), {})
        yield Key(f"{prefix}{field.name}", _format_default(default), list(members), field.metadata.get(HELP, ""))


def _format_default(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(_format_default, value))}]"
    return {"None": "null", "True": "true", "False": "false", "???": ""}.get(str(value), str(value))
