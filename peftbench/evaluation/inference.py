"""Prediction with fewer operations: inside `prepare_inference` a model computes the same; afterwards it is unchanged.

What does not change from token to token is computed once: prefixes are folded, affine modifications are merged, a
bottleneck's scale becomes part of W_up, and weights have the dtype that autocast would give them at every call. While a
text is generated token by token, every kernel counts: a step of BART-large spends more time on launches than on
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftbench.backbones.sites import Layer, find_sites
from peftbench.modification.composition import Add, Scaled
from peftbench.modification.edit import Edit, SublayerDropout
from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.insertion import parallel
from peftbench.modification.merge import merge_temporarily, unhook_temporarily
from peftbench.modification.state import fold_tensors


@contextmanager
def prepare_inference(model: PreTrainedModel, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside the block, the model predicts as before, except for rounding, in evaluation mode and without gradients.

    Products are computed in the dtype of autocast or of the backbone.

    Args:
        autocast_dtype: of the autocast that the model will run under; None: without.
    """
    rounded = nullcontext() if autocast_dtype is None else _round_weights(model, autocast_dtype)
    dtype = autocast_dtype or model.dtype
    with fold_tensors(model), merge_temporarily(model), _hook_directly(model), rounded, _modify_quickly(model, dtype):
        yield


@contextmanager
def _hook_directly(model: nn.Module) -> Iterator[None]:
    """Inside the block, the hooks of a `SublayerDropout`, which now drops nothing, are on the Linear before it."""
    with unhook_temporarily(model):
        for module in model.modules():
            hooks = module._forward_hooks
            for key, hook in list(hooks.items()):
                dropout = getattr(hook, "__self__", None)
                if not isinstance(dropout, SublayerDropout):
                    continue
                del hooks[key]  # it is the last one, because it is added after all edits
                hooks.update(dropout._forward_hooks)
                dropout._forward_hooks.clear()
        yield


@contextmanager
def _modify_quickly(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, edits that add a bottleneck use `widen_ffn` if possible, and otherwise `quick_modify`."""
    quick = [module for module in model.modules() if isinstance(module, Edit) and _adds_bottleneck(module)]
    layers = find_sites(model).layers if quick else ()
    replaced: list[nn.Linear] = []
    with unhook_temporarily(model) as unhook:
        try:
            for edit in quick:
                constants = Constants.of(edit, dtype)
                ffn = _find_ffn(edit, layers)
                if ffn is None or any(linear.weight.dtype is not dtype for linear in ffn):
                    edit.quick = quick_modify(edit, constants)
                    continue
                unhook(edit)
                for linear, forward in zip(ffn, widen_ffn(constants, *ffn), strict=True):
                    vars(linear)["forward"] = forward  # hides the class's own; a hook would take longer, at every token
                    replaced.append(linear)
            yield
        finally:
            for edit in quick:
                edit.quick = None
            for linear in replaced:
                del vars(linear)["forward"]


def _adds_bottleneck(edit: Edit) -> bool:
    function = edit.function
    plain = isinstance(function, Bottleneck) and isinstance(function.norm_in, nn.Identity)
    return plain and isinstance(function.norm_out, nn.Identity) and isinstance(edit.composition, Add | Scaled)


class Constants(NamedTuple):
    """W_down, b_down, sW_up, sb_up of an edit with one group, laid out as in `torch.nn.Linear`, and f."""

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    f: nn.Module

    @classmethod
    @torch.no_grad()
    def of(cls, edit: Edit, dtype: torch.dtype) -> Constants:
        """Return an edit's constants in the dtype in which they will be used."""
        function = edit.function
        assert isinstance(function, Bottleneck)
        down, up = (weight[0] for weight in function.weights())
        down_bias, up_bias = (None if b is None else b[0, 0] for b in (function.down_bias, function.up_bias))
        scale = edit.composition.scale if isinstance(edit.composition, Scaled) else 1.0
        return cls(
            down.to(dtype),
            None if down_bias is None else down_bias.to(dtype),
            (scale * up).to(dtype),
            None if up_bias is None else (scale * up_bias).to(dtype),
            function.f,
        )


def quick_modify(edit: Edit, constants: Constants) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `edit.modify`, h + s(f(x W_down + b_down) W_up + b_up), with s inside W_up and b_up."""
    down, down_bias, up, up_bias, f = constants
    insertion = edit.insertion

    def modify(h: Tensor, x: Tensor) -> Tensor:
        z = f(F.linear(insertion(h, x).to(down.dtype), down, down_bias))
        return (h + F.linear(z, up, up_bias)).to(h.dtype)

    return modify


def _find_ffn(edit: Edit, layers: Sequence[Layer]) -> tuple[nn.Linear, ...] | None:
    """Return W_1 and W_2 of the FFN to which a parallel edit, and no other one, adds; None if it cannot be `widen_ffn`.

    The input of W_2 is an activation of each column by itself, or a product of such an activation with the same column
    of a second W_1, which is then returned too.
    """
    if edit.insertion is not parallel or edit.own_input:
        return None
    for ffn in (layer.dense for layer in layers if layer.dense is not None):
        first, second = ffn.source, ffn.second
        ahead, after = first._forward_pre_hooks, second._forward_hooks
        if edit.read not in ahead.values() or edit.edit_output not in after.values():
            continue
        others = [module for module in ffn.first.values() if module is not first]
        found = [module for module in (first, second, *others) if isinstance(module, nn.Linear)]
        if ffn.parts or len(others) > 1 or len(found) < 2 + len(others):
            return None
        hooked = [first._forward_hooks, second._forward_pre_hooks]
        hooked += [hooks for module in others for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        return tuple(found) if len(ahead) == len(after) == 1 and not any(hooked) else None
    return None


Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def widen_ffn(constants: Constants, first: nn.Linear, second: nn.Linear, *others: nn.Linear) -> tuple[Forward, ...]:
    """Return functions for the matrices of an FFN that treat a parallel bottleneck as r more inner columns:

        W_2 g(W_1 x + b_1) + b_2 + s(W_up f(W_down x + b_down) + b_up)
            = [W_2, sW_up] [g(W_1 x + b_1), f(W_down x + b_down)] + (b_2 + sb_up)

    The layer applies g to all columns; then those of the bottleneck are overwritten. The columns are padded to a
    multiple of 8 with zeros, which g leaves finite and W_2 multiplies by zero, because products of bfloat16 matrices
    need rows of multiples of 16 bytes to be fast.

    Args:
        others: a second W_1, if the input of W_2 is g(W_1 x) times it or g of it times W_1 x. Its further columns are
            zero, so that the products are finite.
    """
    down, down_bias, up, up_bias, f = constants
    width, bottleneck = len(first.weight), len(down)
    filling = -(width + bottleneck) % 8
    weight_1 = F.pad(torch.cat([first.weight, down]), (0, 0, 0, filling))
    weight_2 = F.pad(torch.cat([second.weight, up], dim=1), (0, filling))
    bias_1, bias_2 = None, _add_optional(second.bias, up_bias)
    if first.bias is not None or down_bias is not None:
        parts = (first.bias, first.weight.new_zeros(width)), (down_bias, down.new_zeros(bottleneck))
        bias_1 = F.pad(torch.cat([zeros if own is None else own for own, zeros in parts]), (0, filling))
    relu, kept = isinstance(f, nn.ReLU), list[Tensor]()
    more = bottleneck + filling

    def widen(other: nn.Linear) -> Forward:
        weight = F.pad(other.weight, (0, 0, 0, more))
        bias = None if other.bias is None else F.pad(other.bias, (0, more))
        return lambda x: F.linear(x, weight, bias)

    def read(x: Tensor) -> Tensor:
        inner = F.linear(x, weight_1, bias_1)
        kept[:] = (inner,)  # replaces one that an error may have left here
        return inner

    def add(x: Tensor) -> Tensor:
        z, into = kept.pop().narrow(-1, width, bottleneck), x.narrow(-1, width, bottleneck)
        if relu:
            torch.clamp_min(z, 0.0, out=into)  # in one kernel
        else:
            into.copy_(f(z))
        return F.linear(x, weight_2, bias_2)

    return read, add, *map(widen, others)


def _add_optional(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


@contextmanager
def _round_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, the projections' weights and biases are rounded as autocast to `dtype` rounds them.

    Autocast caches no copy of a weight without gradient, and so rounds it again for every token. A tied output
    embedding is rounded, the input embedding is not.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype is torch.float32:
                    replaced.append((module, name, parameter))
                    setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        yield
    finally:
        for module, name, parameter in replaced:
            setattr(module, name, parameter)
