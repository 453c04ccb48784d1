"""Parameter budgets: the meaning of `budget=6.7%`, and the largest sizes within a budget.

`counts/solve.py` measures how many parameters the sizes of a run cost; this module does the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from peftbench.utils.errors import UserError

_WRITTEN = re.compile(r"(?P<amount>\d+(?:\.\d+)?|\.\d+)(?P<unit>%?|[kKmM]?)")
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
EXAMPLES = (
    "a share of the backbone such as budget=6.7%, or a number of stored parameters such as budget=599k, budget=27.4M "
    "or budget=599232"
)


def parse_budget(budget: str, backbone: int) -> int:
    """Return the number of stored parameters that `budget` allows; a share is a share of `backbone` parameters.

    >>> limit("6.7%", 406_291_456), limit("27.4M", 406_291_456)
    (27221527, 27400000)

    Raises:
        UserError: it is neither a share nor a number.
    """
    written = _WRITTEN.fullmatch(budget)
    if written is None:
        raise UserError(f"budget={budget} is not a budget; give {EXAMPLES}.")
    amount = Fraction(written["amount"])
    if written["unit"] == "%":
        return int(amount * backbone / 100)
    number = amount * _UNITS[written["unit"].lower()]
    if number.denominator != 1:
        raise UserError(f"budget={budget} is not a whole number of parameters; give {EXAMPLES}.")
    return int(number)


def find_largest_sizes(weights: Sequence[int], costs: Sequence[int], fixed: int, most: int) -> list[int] | None:
    """Return the largest sizes n_i, in the ratio of `weights` w_i, with fixed + Σ n_i costs_i <= most, or None.

    n_i = max(1, ⌊t w_i + 1/2⌋) for one scale factor t: each size is its share, rounded half up, and at least 1. The
    total can only grow with t, and the result has the largest total that fits. Sizes that grow at the same t grow
    together or not at all. The result is None if no sizes fit.
    """
    grain = 2 * lcm(*weights)  # t w_i + 1/2 is a whole number only at multiples of 1 / grain

    def sizes(step: int) -> list[int]:
        return [max(1, (2 * step * weight + grain) // (2 * grain)) for weight in weights]

    def total(step: int) -> int:
        return fixed + sum(size * cost for size, cost in zip(sizes(step), costs, strict=True))

    if total(0) > most:
        return None
    fits, beyond = 0, grain * (most // costs[0] + 1)  # at that t the first size alone costs more
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if total(middle) <= most else (fits, middle)
    return sizes(fits)
