"""The dropout of compiled layers: it drops what it should, independently, and says the same when it is asked again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.nn import functional as F

from peftbench.modification.attach import attach
from peftbench.training.compiled import CompiledLayers
from peftbench.training.hashed_dropout import add_hashed_dropout, apply_dropout
from tests.families import PRESETS, batch, build
from tests.families import dropout as rates

SEEDS = torch.randint(-(2**31), 2**31, (64, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def kept(shape: tuple[int, ...], p: float, seeds: Tensor) -> Tensor:
    return apply_dropout(torch.ones(shape), p, seeds) != 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p: float) -> None:
    """Within five standard errors, in all and in every column and row."""
    shape = (1000, 64)
    drops = torch.stack([~kept(shape, p, seeds) for seeds in SEEDS]).double()
    for count, mean in [(drops.numel(), drops.mean()), (64_000, drops.mean((0, 1))), (4096, drops.mean((0, 2)))]:
        assert (mean - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / count)


def test_elements_and_dropouts_are_independent() -> None:
    """Neighbours at any distance, the same element under other seeds, and the same pattern moved."""
    p, n = 0.3, 1 << 18
    drops = torch.stack([~kept((n,), p, seeds) for seeds in SEEDS[:8]]).double() - p
    error = 5 * p * (1 - p) / math.sqrt(n)  # of the mean of products of independent ones
    for distance in (1, 2, 3, 4, 7, 8, 16, 64, 100, 1024, 4096, 65536):
        assert (drops[:, distance:] * drops[:, :-distance]).mean(1).abs().max() <= error
    for other in range(1, 8):
        assert (drops[0] * drops[other]).mean().abs() <= error
    for bit in range(31):  # seeds that differ in one bit, as two do by chance once in 10^17: nearly independent
        for which in range(2):
            near = SEEDS[0].clone()
            near[which] ^= 1 << bit
            assert (drops[0] * ((~kept((n,), p, near)).double() - p)).mean().abs() <= 0.05 * p * (1 - p)


def test_what_is_kept_is_scaled_and_so_is_its_gradient() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    out = apply_dropout(x, 0.4, SEEDS[0])
    keep = kept((5, 7), 0.4, SEEDS[0])
    assert 0 < keep.sum() < 35
    torch.testing.assert_close(out, torch.where(keep, x / 0.6, 0.0))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, keep.double() / 0.6)


def test_every_dropout_is_rewritten_and_no_mask_is_kept() -> None:
    """Those that drop nothing stay; the backward pass takes seeds in place of masks."""
    torch._dynamo.reset()
    linear, module = nn.Linear(64, 64).requires_grad_(False), nn.Dropout(0.25)
    graphs: list[GraphModule] = []

    def look(graph: GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def layer(x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(linear(x)), p=0.1, training=True)
        return module(F.dropout(hidden, 0.5, training=False)) + F.dropout(F.dropout(F.dropout(x, 0.0), 0.2), 0.3)

    looked = aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(layer, backend=add_hashed_dropout(looked), dynamic=True)
    x = torch.randn(50, 64, requires_grad=True)
    torch.manual_seed(3)
    first = compiled(x)
    second = compiled(x)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), first) and not torch.equal(second, first)
    first.sum().backward()
    forward, backward = graphs
    names = [str(node.target) for node in forward.graph.nodes]
    assert sum("randint" in name for name in names) == 1 and not any("dropout" in name for name in names)
    saved = [node.meta["val"] for node in backward.graph.nodes if node.op == "placeholder"]
    assert not [value for value in saved if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)]
    (shape,) = {tuple(value.shape) for value in saved if isinstance(value, Tensor) and value.dtype == torch.int32}
    assert shape == (4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", "roberta"])
def test_compiled_layers_with_dropout(family: str) -> None:
    """The loss is that of a step with dropout: of the same mean as the uncompiled one's, over many seeds."""
    torch._dynamo.reset()
    model = build(family, **rates(family, hidden=0.2, attention=0.0, activation=0.2))
    attach(model, PRESETS["mam"])
    model.config.use_cache = False
    model.train()
    layers = CompiledLayers(
        model, backend=aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward))
    )
    inputs = batch(family)

    def losses(count: int = 300) -> Tensor:
        """With gradients, as in training: without, what is remembered of a mask would be compiled anew each time."""
        return torch.stack([model(**inputs).loss.detach() for _ in range(count)])

    plain = losses()
    with layers.active():
        compiled = losses()
    error = math.sqrt((plain.var() + compiled.var()) / len(plain))
    assert compiled.std() > 0 and abs(compiled.mean() - plain.mean()) <= 4 * error
    assert 0.8 <= compiled.std() / plain.std() <= 1.25


@pytest.mark.slow
def test_generated_code_drops_what_the_function_drops() -> None:
    """Products of 32-bit integers wrap around there too."""
    torch._dynamo.reset()
    compiled = torch.compile(apply_dropout, dynamic=True)
    for count in (1000, 77_777):
        x = torch.randn(count)
        assert torch.equal(compiled(x, 0.1, SEEDS[1]), apply_dropout(x, 0.1, SEEDS[1]))
