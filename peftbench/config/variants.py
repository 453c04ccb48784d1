"""Points of a sweep that differ only in values on which nothing else of a run depends: seeds, learning rates.

OmegaConf needs 25 ms for a point. Of points that differ in such values alone, one is composed; the others are copies of
its run with values of their own, which OmegaConf has checked and converted like all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from peftbench.config.overrides import apply_override
from peftbench.config.schema import Run, Trainer

# Keys of which `compose.resolve_run` makes nothing but themselves.
FREE = ("seed", "budget", *(f"trainer.{field.name}" for field in fields(Trainer)))

# The interpolations whose keys are plain: ${a.b}, ${.b}, ${a.${b.c}}, ${oc.select:a.b,default}, ${embedded:mini},
# ${column:model.sizes}.
_KEY = r"\.*(\w+)(?:\.\w+)*"
_PLAIN = re.compile(rf"\$\{{(?:(?:oc\.select|oc\.env|embedded|column):)?{_KEY}(?:\.\$\{{{_KEY}\}})?(?:,[^${{}}]*)?\}}")


class Pattern(NamedTuple):
    """A point that was composed, as the pattern of others."""

    cfg: DictConfig  # with the point's overrides; `vary` changes it
    run: Run


def is_free(override: Override) -> bool:
    """Return whether an override gives one of the keys `FREE` a single value."""
    value = override.value()
    return (
        override.key_or_group in FREE
        and override.package is None
        and not (override.is_delete() or override.is_add() or override.is_force_add())
        and (value is None or isinstance(value, bool | int | float | str))
        and not (isinstance(value, str) and ("${" in value or value == "???"))
    )


def can_vary(cfg: DictConfig, free: Sequence[Override]) -> bool:
    """Return whether it is plain to see that no interpolation of a config reads a key that `free` overrides."""
    read: set[str] = set()  # first parts of keys; those of a relative one, such as ${.b}, may be a last part
    for text in _list_texts(OmegaConf.to_container(cfg, resolve=False)):
        if "${" in _PLAIN.sub("", text):
            return False
        read.update(first for match in _PLAIN.finditer(text) for first in match.groups() if first)
    return read.isdisjoint(part for override in free for part in override.key_or_group.split("."))


def _list_texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for below in node.values() if isinstance(node, dict) else node:
            yield from _list_texts(below)


def vary(pattern: Pattern, free: Sequence[Override]) -> Run | None:
    """Return the run of a point that differs from the pattern in its values of `free` only; None if one is refused.

    Args:
        free: overrides of the same keys as those of the pattern, which they replace.
    """
    if any(apply_override(pattern.cfg, override) for override in free):
        return None
    values = {override.key_or_group: OmegaConf.select(pattern.cfg, override.key_or_group) for override in free}
    trainer = {key.removeprefix("trainer."): value for key, value in values.items() if key.startswith("trainer.")}
    own = {key: value for key, value in values.items() if "." not in key}
    return replace(pattern.run, trainer=replace(pattern.run.trainer, **trainer), **own)
