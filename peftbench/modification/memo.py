"""Results that are remembered for as long as the tensor that they were made from lives, by its identity."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import ref

from torch import Tensor

T = TypeVar("T")


class Memo:
    """`of(tensor, what, make)` is `make()` of the first such call.

    A tensor is not to be changed in place meanwhile, and what is made is not to hold it.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, dict[Hashable, Any]]] = {}  # by id, with what tells that the tensor is gone

    def of(self, tensor: Tensor, what: Hashable, make: Callable[[], T]) -> T:
        """What was made of `tensor` under the name `what`."""
        found = self._found.get(id(tensor))
        if found is None:
            key = id(tensor)
            found = self._found[key] = ref(tensor, lambda _: self._found.pop(key, None)), {}
        made = found[1]
        if what not in made:
            made[what] = make()
        value: T = made[what]
        return value
