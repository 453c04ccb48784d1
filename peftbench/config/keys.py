"""What each key of a run means: the comments in config/schema.py. Imports no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, get_args, get_type_hints

from peftbench.config.schema import Run

FIELD = re.compile(r"    (\w+): [^#]*?(?:  # (.*))?$")
HIDDEN = ("sizes", "size")  # conf/sizes.yaml, and its column


class Key(NamedTuple):
    """A key as it is typed, the schema's default as it is typed, its choices if it has a fixed set, and its meaning."""

    name: str
    default: str
    choices: list[str]
    meaning: str


def keys(schema: type = Run, prefix: str = "") -> Iterator[Key]:
    """Every key of a dataclass of config/schema.py, those of the dataclasses in it too, in the order of the file."""
    meanings = {name: text for part in reversed(schema.__mro__[:-1]) for name, text in _comments(part)}
    hints = get_type_hints(schema)
    for field in fields(schema):
        if not prefix and field.name in HIDDEN:
            continue
        kinds = [kind for kind in (hints[field.name], *get_args(hints[field.name])) if isinstance(kind, type)]
        inner = next((kind for kind in kinds if is_dataclass(kind)), None)
        if inner is not None and not meanings[field.name] and getattr(hints[field.name], "__origin__", None) is None:
            yield from keys(inner, f"{prefix}{field.name}.")
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        members: Mapping[str, Enum] = next((kind.__members__ for kind in kinds if issubclass(kind, Enum)), {})
        yield Key(f"{prefix}{field.name}", _typed(default), list(members), meanings[field.name])


def _comments(schema: type) -> Iterator[tuple[str, str]]:
    """(field, comment) of a dataclass: what stands on the lines above it, or behind it."""
    above: list[str] = []
    for line in inspect.getsource(schema).splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
        elif match := FIELD.match(line):
            yield match[1], " ".join([*above, match[2] or ""]).strip()
            above = []


def _typed(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return {"None": "null", "True": "true", "False": "false", "???": ""}.get(str(value), str(value))
