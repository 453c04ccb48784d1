"""Axis 3, the insertion form: what the function f reads.

`h` is the modified representation, `x` the input of the sub-module that computes h. He et al. 2022, table 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def parallel(h: Tensor, x: Tensor) -> Tensor:
    """Return x, so that Δh = f(x)."""
    return x


def sequential(h: Tensor, x: Tensor) -> Tensor:
    """Return h, so that Δh = f(h)."""
    return h


def sequential_over_residual(h: Tensor, x: Tensor) -> Tensor:
    """Return x + h, so that Δh = f(x + h): a pre-norm layer outputs x + h, with x its residual, and no module holds
    that sum."""
    return x + h


InsertionForm = Callable[[Tensor, Tensor], Tensor]
INSERTION_FORMS: dict[str, InsertionForm] = {"parallel": parallel, "sequential": sequential}
