"""What is remembered of a tensor lives as long as the tensor."""

from __future__ import annotations

import weakref

import torch

from peftbench.modification.memo import Memo


def test_made_once_for_each_tensor_and_name() -> None:
    memo, one, other = Memo(), torch.zeros(2), torch.zeros(2)
    made = [memo.of(tensor, name, lambda: torch.ones(2)) for tensor in (one, other, one) for name in ("a", "b")]
    ids = [id(result) for result in made]
    assert ids[4:] == ids[:2] and len(set(ids)) == 4


def test_gone_with_the_tensor() -> None:
    memo, tensor = Memo(), torch.zeros(2)
    gone = weakref.ref(memo.of(tensor, "a", lambda: torch.ones(2)))
    assert gone() is not None
    del tensor
    assert gone() is None
    assert memo.of(torch.zeros(2), "a", lambda: 7) == 7
