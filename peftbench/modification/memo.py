"""Results that are remembered for as long as the tensor that they were made from lives, by its identity."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")


class Memo:
    """`of(tensor, what, make)` is `make()` of the first such call. A tensor is not to be changed in place meanwhile, and
    what is made is not to hold it."""

    def __init__(self) -> None:
        self._found = WeakIdKeyDictionary()

    def of(self, tensor: Tensor, what: Hashable, make: Callable[[], T]) -> T:
        """What was made of `tensor` under the name `what`."""
        made: dict[Hashable, T] = self._found.setdefault(tensor, {})
        if what not in made:
            made[what] = make()
        return made[what]
