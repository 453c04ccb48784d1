"""The keys in which runs differ, and what is said of several things that may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of nested dicts and dataclasses."""
    for key, value in (values if isinstance(values, dict) else vars(values)).items():
        if isinstance(value, dict) or is_dataclass(value):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find_differing(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that do not have the same value in all of `values`, in the order of their first occurrence."""
    keys = dict.fromkeys(key for one in values for key in one)
    absent = object()
    return [key for key in keys if any(one.get(key, absent) != values[0].get(key, absent) for one in values)]


def find_distinctive(typed: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys that were typed with different values for different runs.

    Keys below a group that distinguishes the runs equally well are left out: task.data_dir, if each task has its own.
    """

    def tells_as_much(group: str, key: str) -> bool:
        values = {one.get(group) for one in typed}
        return group != key and len(values) == len({(one.get(group), one.get(key)) for one in typed})

    keys = find_differing(typed)
    return [key for key in keys if not ((group := key.partition(".")[0]) in keys and tells_as_much(group, key))]


def merge_alike(said: Sequence[tuple[str, str]]) -> list[str]:
    """Return what is said of several things, (what is said, name): once, or with each name where it differs."""
    alike = len({what for what, _ in said}) == 1
    return [said[0][0]] if alike else [f"{what} ({name})" for what, name in said]
