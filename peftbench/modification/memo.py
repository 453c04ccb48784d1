"""Results that are remembered for as long as the tensor that they were made from lives, by its identity."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")


class Memo:
    """`of(tensor, what, make)` is `make()` of the first such call.

    A tensor is not to be changed in place meanwhile, and what is made is not to hold it.
    """

    def __init__(self) -> None:
        self._found: MutableMapping[Tensor, dict[Hashable, Any]] = WeakIdKeyDictionary()

    def of(self, tensor: Tensor, what: Hashable, make: Callable[[], T]) -> T:
        """What was made of `tensor` under the name `what`."""
        made = self._found.setdefault(tensor, {})
        if what not in made:
            made[what] = make()
        found: T = made[what]
        return found
