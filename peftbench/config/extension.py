"""The further values of a search (`search.extend`): what comes after the outermost value that was tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peftbench.config.schema import Search


def find_next_value(tried: Sequence[Any], best: int) -> Any | None:
    """Return the value to try next where the best one is the outermost; None if it is not, or if there is none beyond.

    It is the outermost times the ratio of the next two values, so that steps repeat two by two: 1, 3, 10 goes on with
    30 and 100. Two values have one ratio: 1, 3 goes on with 9. A float has 12 significant digits. An integer is
    rounded, moves by at least 1, and stays above 0.

    Args:
        tried: positive numbers, of which two or more differ; all of them integers, or floats.
        best: the index of the best one.
    """
    value, ascending = tried[best], sorted(set(tried))
    if value not in (ascending[0], ascending[-1]):
        return None
    outward = ascending if value == ascending[-1] else ascending[::-1]
    further = value * (outward[-2] / outward[-3] if len(outward) > 2 else value / outward[-2])
    if all(isinstance(one, int) for one in tried):
        whole = max(round(further), value + 1) if further > value else min(round(further), value - 1)
        return whole if whole >= 1 else None
    return float(f"{further:.12g}") if 0 < further < math.inf else None


def find_extension_fault(search: Search, tried: Mapping[str, Sequence[Any]]) -> str | None:
    """Return why a search cannot try further values, or None if it can or need not.

    Args:
        tried: the values of each of its keys, without further ones.
    """
    if search.further and search.trial is None:
        return "search.further is set by peftbench; give search.extend, the number of further values."
    if not search.extend and not search.further:
        return None
    said = f"search.extend={search.extend}"
    if search.extend < 0:
        return f"{said}: it is a number of further values, at least 0."
    if len(tried) != 1:
        return f"{said} is for a search over one key, and this one has {len(tried)}: {', '.join(tried)}."
    ((key, values),) = tried.items()
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in (*values, *search.further)):
        return f"{said} needs numbers, and {key} is tried at {_list([*values, *search.further])}."
    if min(values) <= 0:
        return f"{said} needs values above 0, which have multiples, and {key} is tried at {_list(values)}."
    if len(set(values)) < 2:
        return f"{said} needs two different values, whose ratio is the step, and {key} is tried at {_list(values)}."
    return None


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
