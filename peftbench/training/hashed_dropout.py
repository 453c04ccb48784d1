"""Dropout for compiled layers that decides by a hash of an element's position and a seed.

The code that torch.compile generates for dropout draws four random numbers of Philox for each element and uses one.
This takes three times as long as reading and writing the elements, and a mask is kept for the backward pass. A hash
takes some 20 integer operations, and the backward pass computes it again from the seeds. The seeds come from torch's
own generator, so that a run is as reproducible as before, with other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

SEEDS = 2  # per dropout, 32 bits each


def apply_dropout(x: Tensor, p: float, seeds: Tensor) -> Tensor:
    """Return x / (1 - p) for kept elements and 0 for the others; each element is dropped with probability p.

    Args:
        x: fewer than 2^31 elements.
        p: 0 < p < 1; its resolution is 2^-31.
        seeds: (2,), int32; the same seeds drop the same elements.
    """
    index = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    keep = _hash(index, seeds) >= int(p * 2**31)
    return torch.where(keep, x * (1 / (1 - p)), 0.0)


def _hash(index: Tensor, seeds: Tensor) -> Tensor:
    """Hash each int32 to 31 bits, uniform over the seeds.

    The rounds are those of triple32 (C. Wellons, "Prospecting for Hash Functions", 2018), whose products wrap around. A
    second seed is applied after the first round, so that two dropouts never differ by a permutation of elements alone.
    """
    mixed = index ^ seeds[0]
    mixed = (mixed ^ _shift_right(mixed, 17)) * (0xED5AD4BB - 2**32) ^ seeds[1]
    mixed = (mixed ^ _shift_right(mixed, 11)) * (0xAC4C1B51 - 2**32)
    mixed = (mixed ^ _shift_right(mixed, 15)) * 0x31848BAB
    return (mixed ^ _shift_right(mixed, 14)) & 0x7FFFFFFF


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift to the right, filling with zeros from the left: int32's own shift copies the sign."""
    shifted: Tensor = (bits >> count) & (2 ** (32 - count) - 1)
    return shifted


def rewrite_graph(graph: GraphModule) -> GraphModule:
    """Replace every dropout of a graph that torch.compile has traced, in place, by `apply_dropout` with seeds."""
    found = list(_find_dropouts(graph))
    if not found:
        return graph
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    with graph.graph.inserting_before(first):
        device = found[0][0].meta["example_value"].device
        low, high = -(2**31), 2**31
        size = (len(found), SEEDS)
        seeds = graph.graph.call_function(torch.randint, (low, high, size), {"dtype": torch.int32, "device": device})
    for index, (node, p) in enumerate(found):
        with graph.graph.inserting_before(node):
            own = graph.graph.call_function(torch.select, (seeds, 0, index))
            # Read the input now: if a dropout follows a dropout, its input is a new node.
            new = graph.graph.call_function(apply_dropout, (_read_arguments(node)["input"], p, own))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _find_dropouts(graph: GraphModule) -> Iterator[tuple[Node, float]]:
    """Yield the calls of F.dropout that drop something: the node and p."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not F.dropout:
            continue
        given = _read_arguments(node)
        p = given.get("p", 0.5)
        if given.get("training", True) is True and isinstance(p, float) and 0 < p < 1 and not given.get("inplace"):
            yield node, p


def _read_arguments(node: Node) -> dict[str, Any]:
    return dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(node.kwargs)


@cache
def add_hashed_dropout(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backend of torch.compile that gets rewritten graphs; for one backend always the same object."""

    def compile_rewritten(graph: GraphModule, inputs: list[Any]) -> Any:
        return backend(rewrite_graph(graph), inputs)

    return compile_rewritten
