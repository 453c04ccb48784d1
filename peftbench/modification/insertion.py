"""Axis 3, the insertion form: what the function f reads.

`h` is the representation that is modified, `x` the input of the sub-module that computes it. He et al. 2022, table 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def parallel(h: Tensor, x: Tensor) -> Tensor:
    """Δh = f(x)."""
    return x


def sequential(h: Tensor, x: Tensor) -> Tensor:
    """Δh = f(h)."""
    return h


def sequential_over_residual(h: Tensor, x: Tensor) -> Tensor:
    """Δh = f(x + h): a pre-norm layer ends in x + h, with x its residual, and no module holds that sum."""
    return x + h


InsertionForm = Callable[[Tensor, Tensor], Tensor]
INSERTION_FORMS: dict[str, InsertionForm] = {"parallel": parallel, "sequential": sequential}
