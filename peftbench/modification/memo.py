"""Results that are computed from a tensor and cached by its identity for as long as the tensor lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import ref

from torch import Tensor

T = TypeVar("T")


class Memo:
    """A cache in which `of(tensor, what, make)` is the `make()` of the first such call.

    Do not change the tensor in place meanwhile, and do not let the result hold a reference to the tensor.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, dict[Hashable, Any]]] = {}  # by id, with the sign that the tensor is gone

    def of(self, tensor: Tensor, what: Hashable, make: Callable[[], T]) -> T:
        """Return the result for `tensor` under the key `what`; the first call makes it."""
        found = self._found.get(id(tensor))
        if found is None:
            key = id(tensor)
            found = self._found[key] = ref(tensor, lambda _: self._found.pop(key, None)), {}
        made = found[1]
        if what not in made:
            made[what] = make()
        value: T = made[what]
        return value
