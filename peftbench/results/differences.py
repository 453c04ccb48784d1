"""In which keys runs differ. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that do not have the same value in all of `values`, in the order in which they first come."""
    keys = dict.fromkeys(key for one in values for key in one)
    absent = object()
    return [key for key in keys if any(one.get(key, absent) != values[0].get(key, absent) for one in values)]


def distinctive(typed: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys in which what was typed for runs differs, but for those below a group that differs and says as much:
    task.data_dir where each task has one."""

    def says_as_much(group: str, key: str) -> bool:
        values = {one.get(group) for one in typed}
        return group != key and len(values) == len({(one.get(group), one.get(key)) for one in typed})

    keys = differing(typed)
    return [key for key in keys if not ((group := key.partition(".")[0]) in keys and says_as_much(group, key))]
