"""Lists whose elements are lists or mappings where texts or numbers belong: OmegaConf takes any of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

WANTED: dict[type, str] = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false"}


def find_nested_lists(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield a sentence for each key of a config, a dataclass, with such a list."""
    schema: type = type(config)
    elements = _read_elements(schema)
    for item in fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        below = {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
        for name, one in below.items():
            if is_dataclass(one):
                yield from find_nested_lists(one, f"{name}.")
        wanted = elements.get(item.name)
        if wanted and isinstance(value, list) and any(isinstance(one, list | dict) for one in value):
            yield f"{key}={value}: a list of {wanted} is expected."


@cache
def _read_elements(schema: type) -> dict[str, str]:
    """Return what the lists of a dataclass hold, by their keys, if that is something simple."""
    found = {}
    for name, hint in get_type_hints(schema).items():
        lists = [one for one in (hint, *get_args(hint)) if get_origin(one) is list]
        element = get_args(lists[0])[0] if lists else None
        if element in WANTED:
            found[name] = WANTED[element]
        elif isinstance(element, type) and issubclass(element, Enum):
            found[name] = ", ".join(element.__members__)
    return found
