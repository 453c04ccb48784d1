"""A model that only predicts: inside `prepared` it computes the same with fewer operations, and is itself again after.

What does not change from token to token is done once: prefixes are folded, affine modifications are merged, a
bottleneck's scale is part of W_up, weights have the dtype that autocast would give them at every call. While a text is
generated token by token each kernel that is not launched counts: a step of BART-large is launches more than arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftbench.modification.composition import Add, Scaled
from peftbench.modification.edit import Edit, SublayerDropout
from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.insertion import parallel
from peftbench.modification.merge import merged, unhooked
from peftbench.modification.state import folded


@contextmanager
def prepared(model: PreTrainedModel, bf16: bool = False) -> Iterator[None]:
    """Inside the block the model, in evaluation mode and without gradients, predicts as before, but for rounding.

    Products are computed in the dtype of autocast or of the backbone.

    Args:
        bf16: it will run under bfloat16 autocast.
    """
    rounded = _weights_in_bfloat16(model) if bf16 else nullcontext()
    with folded(model), merged(model), _direct(model), rounded, _quick(model, bf16):
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
                dropout._forward_hooks.clear()
        yield


@contextmanager
def _quick(model: PreTrainedModel, bf16: bool) -> Iterator[None]:
    """Edits that add a bottleneck do so by `widened` where that is possible, and else by `quick_modify`."""
    quick = [module for module in model.modules() if isinstance(module, Edit) and _adds_bottleneck(module)]
    replaced: list[nn.Linear] = []
    dtype = torch.bfloat16 if bf16 else model.dtype
    with unhooked(model) as unhook:
        try:
            for edit in quick:
                constants = Constants.of(edit, dtype)
                linears = _reads_and_adds(model, edit, constants.down.dtype)
                if linears is None:
                    edit.quick = quick_modify(edit, constants)
                    continue
                unhook(edit)
                replaced += linears
                for linear, forward in zip(linears, widened(*linears, constants), strict=True):
                    vars(linear)["forward"] = forward  # before the class's own; a hook takes longer, at every token
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
        """In the dtype in which they will be used."""
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
    """h + s(f(x W_down + b_down) W_up + b_up) as `edit.modify` has it, with s inside W_up and b_up."""
    down, down_bias, up, up_bias, f = constants
    insertion = edit.insertion

    def modify(h: Tensor, x: Tensor) -> Tensor:
        z = f(F.linear(insertion(h, x).to(down.dtype), down, down_bias))
        return (h + F.linear(z, up, up_bias)).to(h.dtype)

    return modify


def _reads_and_adds(model: nn.Module, edit: Edit, dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear] | None:
    """The Linear whose input a parallel edit reads and the one to whose output it adds, if `widened` can have them."""
    if edit.insertion is not parallel or edit.own_input:
        return None
    sources = [m for m in model.modules() if edit.read in m._forward_pre_hooks.values()]
    targets = [m for m in model.modules() if edit.edit_output in m._forward_hooks.values()]
    if len(sources) != 1 or len(targets) != 1:
        return None
    source, target = sources[0], targets[0]
    if not isinstance(source, nn.Linear) or not isinstance(target, nn.Linear):
        return None
    alone = len(source._forward_pre_hooks) == len(target._forward_hooks) == 1 and not source._forward_hooks
    as_built = "forward" not in vars(source) and "forward" not in vars(target)
    return (source, target) if alone and as_built and source.weight.dtype is target.weight.dtype is dtype else None


Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def widened(source: nn.Linear, target: nn.Linear, constants: Constants) -> tuple[Forward, Forward]:
    """What the two compute so that a parallel bottleneck is r more outputs of the Linear that reads the same x, added
    into the output of the other.

    An FFN with a parallel adapter is a wider FFN: W_2 g(W_1 x) + sW_up f(W_down x). The one matrix product computes
    W_1 x and W_down x, the second one adds to what W_2 gave in place; sb_up is part of b_2. Zeros below W_down, which f
    does not see, make the rows of W_1 x begin at multiples of 16 bytes: attention's kernels take no others.
    """
    down, down_bias, up, up_bias, f = constants
    width, bottleneck = len(source.weight), len(down)
    filling = -(width + bottleneck) % 8
    weight, bias = F.pad(torch.cat([source.weight, down]), (0, 0, 0, filling)), None
    if source.bias is not None or down_bias is not None:
        own = down.new_zeros(width) if source.bias is None else source.bias
        more = down.new_zeros(bottleneck) if down_bias is None else down_bias
        bias = F.pad(torch.cat([own, more]), (0, filling))
    target_weight: Tensor = target.weight
    target_bias: Tensor | None = target.bias
    if up_bias is not None:
        target_bias = up_bias if target_bias is None else target_bias + up_bias
    transposed, activate = up.T, f.forward
    kept: list[Tensor] = []

    def read(x: Tensor) -> Tensor:
        both = F.linear(x, weight, bias)
        # CUDA's autocast computes softmax and powers in float32.
        kept.append(activate(both[..., width : width + bottleneck]).to(both.dtype))
        return both[..., :width]

    def add(x: Tensor) -> Tensor:
        output = F.linear(x, target_weight, target_bias)
        output.view(-1, output.shape[-1]).addmm_(kept.pop().reshape(-1, bottleneck), transposed)
        return output

    return read, add


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
