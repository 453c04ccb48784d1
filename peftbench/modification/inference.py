"""A model that only predicts: inside `prepared` it computes the same with fewer operations, and is itself again after.

What does not change from token to token is done once: prefixes are folded, affine modifications are merged, a
bottleneck's scale is part of W_up, weights have the dtype that autocast would give them at every call. While a text is
generated token by token each kernel that is not launched counts: a step of BART-large is launches more than arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peftbench.modification.composition import Add, Scaled
from peftbench.modification.edit import Edit, SublayerDropout
from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.head_attention import Prefix
from peftbench.modification.memo import Memo
from peftbench.modification.merge import merged, unhooked
from peftbench.modification.state import folded


@contextmanager
def prepared(model: nn.Module, bf16: bool = False) -> Iterator[None]:
    """Inside the block the model, in evaluation mode and without gradients, predicts as before, but for rounding.

    Args:
        bf16: it will run under bfloat16 autocast.
    """
    with folded(model), merged(model), _direct(model), _quick(model, bf16), _remembering(model):
        if bf16:
            with _weights_in_bfloat16(model):
                yield
        else:
            yield


@contextmanager
def _direct(model: nn.Module) -> Iterator[None]:
    """The hooks of a `SublayerDropout`, which drops nothing in evaluation, stand on the Linear in front of it."""
    with unhooked(model):
        for module in model.modules():
            hooks = module._forward_hooks
            for key, hook in list(hooks.items()):
                dropout = getattr(hook, "__self__", None)
                if not isinstance(dropout, SublayerDropout):
                    continue
                del hooks[key]  # the last one: it is hooked on when all edits stand
                hooks.update(dropout._forward_hooks)
        yield


@contextmanager
def _quick(model: nn.Module, bf16: bool) -> Iterator[None]:
    """Edits that add a bottleneck do so by `quick_modify`."""
    quick = [module for module in model.modules() if isinstance(module, Edit) and _adds_bottleneck(module)]
    for edit in quick:
        edit.quick = quick_modify(edit, torch.bfloat16 if bf16 else None)
    try:
        yield
    finally:
        for edit in quick:
            edit.quick = None


def _adds_bottleneck(edit: Edit) -> bool:
    function = edit.function
    plain = isinstance(function, Bottleneck) and isinstance(function.norm_in, nn.Identity)
    return plain and isinstance(function.norm_out, nn.Identity) and isinstance(edit.composition, Add | Scaled)


@torch.no_grad()
def quick_modify(edit: Edit, dtype: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
    """h + s(f(x W_down + b_down) W_up + b_up) as `edit.modify` has it, in four kernels: s is part of W_up and b_up, and
    all are of the dtype in which they will be used (None: their own)."""
    function = edit.function
    assert isinstance(function, Bottleneck)
    scale = edit.composition.scale if isinstance(edit.composition, Scaled) else 1.0
    weights = function.weights()
    dtype = dtype or weights[0].dtype
    down, up = weights[0][0].to(dtype), (scale * weights[1][0]).to(dtype)
    down_bias = None if function.down_bias is None else function.down_bias[0, 0].to(dtype)
    up_bias = None if function.up_bias is None else (scale * function.up_bias[0, 0]).to(dtype)
    f, insertion = function.f, edit.insertion

    def modify(h: Tensor, x: Tensor) -> Tensor:
        z = f(F.linear(insertion(h, x).to(dtype), down, down_bias))
        return (h + F.linear(z, up, up_bias)).to(h.dtype)

    return modify


@contextmanager
def _remembering(model: nn.Module) -> Iterator[None]:
    """Prefixes join keys and values that stay the same, those of a cross-attention, once; see `Prefix`."""
    memo = Memo()
    prefixes = [module for module in model.modules() if isinstance(module, Prefix)]
    for prefix in prefixes:
        prefix.memo = memo
    try:
        yield
    finally:
        for prefix in prefixes:
            prefix.memo = None


@contextmanager
def _weights_in_bfloat16(model: nn.Module) -> Iterator[None]:
    """The projections' weights and biases as autocast rounds them, which keeps no copy of a weight without gradient and
    so rounds it again for every token. A tied output embedding is rounded, the input embedding is not."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype is torch.float32:
                    replaced.append((module, name, parameter))
                    setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
        yield
    finally:
        for module, name, parameter in replaced:
            setattr(module, name, parameter)
