r"""Merge affine modifications into the frozen weights, so that they cost nothing.

A Linear computes h = W x + b. With f the identity, Δh = W_up W_down x, the modified h = W x + b + sΔh is W' x + b with
W' = W + s W_up W_down (Hu et al. 2022, section 4.1). With a constant, h ∘ (1 + l) is diag(1 + l) W x + (1 + l) ∘ b (Liu
et al. 2022, section 3.3). The values of an affine map at the origin and at the unit vectors determine it: b' is the
modified h of x = 0, and row i of W'^T is the modified h of x = e_i minus b'. Evaluating the modules themselves
therefore covers every layout and order. They are evaluated in float64, and W' and b' are rounded once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peftbench.backbones.unpacking import is_packed
from peftbench.config.schema import name_module
from peftbench.modification.composition import Gated, Multiply
from peftbench.modification.edit import Edit
from peftbench.modification.functional_form import Bottleneck, OwnForm
from peftbench.modification.head_attention import HeadModification, Prefix
from peftbench.modification.insertion import sequential
from peftbench.modification.peft_method import find_peft_obstacle, list_added, merge_peft
from peftbench.modification.prompt import Prompt

Hooks = OrderedDict[int, Callable[..., Any]]


def find_obstacles(model: nn.Module) -> dict[str, str]:
    """Return why each modification that cannot be merged cannot, one reason each, by its name (the last part of the
    module's name).

    The result is empty if all of them can be merged. Works on the meta device.
    """
    found: dict[str, str] = {}
    if (reason := find_peft_obstacle(model)) is not None:
        found[name_module("")] = reason
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, HeadModification):
                found.setdefault(name, "it changes single heads between the attention's weights")
            elif isinstance(child, Prefix | Prompt):
                found.setdefault(name, "it adds vectors for the attention to look at, which no weight can hold")
        for edit in list_edits_before(module) + list_edits_after(module):
            if reason := _find_obstacle(edit, module):
                found.setdefault(_find_name(module, edit), reason)
    return found


def merge(model: nn.Module) -> float:
    """Put every affine modification into the weights, permanently; the others stay. Return the relative rounding error.

    The error is the norm of the difference that rounding to the weights' dtype makes, divided by the norm of the merged
    change. It is about 1e-5 for float32. It is not small for bfloat16, in which a small change to a large weight is
    less than half a step.
    """
    if list_added(model):
        return merge_peft(model)
    lost, changed = 0.0, 0.0
    hooked = _list_hooked(model)
    for module in _list_mergeable(model):
        weight, bias = compute_merged_weights(module)
        parameter = _get_weight(module)
        rounded = weight.to(parameter.dtype)
        lost += float((rounded.double() - weight).square().sum())
        changed += float((weight - parameter.double()).square().sum())
        _put_weights(module, rounded, bias)
        for edit in list_edits_before(module) + list_edits_after(module):
            _unhook(hooked, edit)
    return (lost / changed) ** 0.5 if changed else 0.0


@contextmanager
def merge_temporarily(model: nn.Module) -> Iterator[None]:
    """Inside the block, affine modifications are part of the weights; afterwards the original tensors are restored.

    W' is computed in float64 and rounded to the weight's dtype once. If the change is small, a bfloat16 W' keeps only
    the part that reaches the next step of the weight. The same holds for a float32 W' under bfloat16 autocast, which
    rounds it: both predict alike. An unmerged modification is rounded in its products instead.
    """
    replaced: list[tuple[nn.Module, Tensor, Tensor | None]] = []
    with unhook_temporarily(model) as unhook:
        try:
            for module in _list_mergeable(model):
                weight, bias = _get_weight(module), _get_bias(module)
                replaced.append((module, weight.data, None if bias is None else bias.data))
                _put_weights(module, *compute_merged_weights(module))
                for edit in list_edits_before(module) + list_edits_after(module):
                    unhook(edit)
            yield
        finally:
            for module, old, old_bias in replaced:
                _put_weights(module, old, old_bias)


@torch.no_grad()
def compute_merged_weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return W' and b' of a Linear or Conv1D whose edits are all affine, in float64; W' has the module's layout."""
    weight, bias = _get_weight(module).double(), _get_bias(module)
    transposed = weight if isinstance(module, Conv1D) else weight.T  # (in, out)
    inputs = transposed.shape[0]
    x = F.pad(torch.eye(inputs, dtype=torch.float64, device=weight.device), (0, 0, 1, 0))  # the origin, then each e_i
    before, after = list_edits_before(module), list_edits_after(module)
    seen = x
    for edit in before:
        seen = _to_double(edit).change(seen, seen)
    h = seen @ transposed if before else F.pad(transposed, (0, 0, 1, 0))
    if bias is not None:
        h = h + bias.double()
    for edit in after:
        h = _to_double(edit).change(h, seen)
    rows = h[1:] - h[0]
    return (rows if isinstance(module, Conv1D) else rows.T), None if bias is None else h[0]


@contextmanager
def unhook_temporarily(model: nn.Module) -> Iterator[Callable[[nn.Module], None]]:
    """Yield a function that removes all hooks of a modification from the model; afterwards all hooks are restored."""
    saved = [
        (hooks, hooks.copy())
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]
    hooked = _list_hooked(model)
    try:
        yield lambda modification: _unhook(hooked, modification)
    finally:
        for hooks, before in saved:
            hooks.clear()
            hooks.update(before)


def _list_hooked(model: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    """Return the hooks of the modules that have any: `_unhook` goes through them for each edit, not through all."""
    return [h for module in model.modules() for h in (module._forward_hooks, module._forward_pre_hooks) if h]


def _unhook(hooked: list[dict[int, Callable[..., Any]]], modification: nn.Module) -> None:
    for hooks in hooked:
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is modification]:
            del hooks[key]


def _list_mergeable(model: nn.Module) -> list[nn.Module]:
    """Return the projections whose edits are all affine. Packed weights take no change: their edits stay next to
    them."""
    found = []
    for module in model.modules():
        if is_packed(module):
            continue
        edits = list_edits_before(module) + list_edits_after(module)
        if edits and all(_find_obstacle(edit, module) is None for edit in edits):
            found.append(module)
    return found


def _find_obstacle(edit: Edit, module: nn.Module) -> str | None:
    """Return why `edit` of `module` is not an affine map of the input of the module's own weights, or None if it is."""
    function, composition = edit.function, edit.composition
    if isinstance(composition, Gated):
        return "its gate depends on the input"
    if isinstance(function, OwnForm):
        return "nobody knows whether a form of your own is linear"
    if isinstance(function, Bottleneck):
        if not isinstance(function.f, nn.Identity):
            return "its functional form is not linear"
        if not isinstance(function.norm_in, nn.Identity) or not isinstance(function.norm_out, nn.Identity):
            return "its LayerNorm is not linear"
        if isinstance(composition, Multiply):
            return "h ∘ (1 + Δh) is not linear where Δh depends on the input"
    if not isinstance(module, nn.Linear | Conv1D):
        return f"it follows a {type(module).__name__}, which has no weights to merge into"
    if edit.insertion is not sequential and not edit.own_input:
        return "its input is not the input of the weights that would hold it"
    if module.bias is None and _adds_constant(edit):
        return "the weights that would hold it have no bias to take its own"
    if any(
        isinstance(hook.__self__, HeadModification) and hook.__self__.query_norm for hook in _list_bound_hooks(module)
    ):
        return "the heads' modification needs the weights that would hold it as they are in the backbone"
    return None


def _adds_constant(edit: Edit) -> bool:
    if isinstance(edit.function, Bottleneck):
        return edit.function.down_bias is not None
    return not isinstance(edit.composition, Multiply)


def list_edits_before(module: nn.Module) -> list[Edit]:
    """Return the edits of the module's input, in order."""
    return [hook.__self__ for hook in _list_bound_hooks(module) if hook.__func__ is Edit.edit_input]


def list_edits_after(module: nn.Module) -> list[Edit]:
    """Return the edits of the module's output, in order."""
    return [hook.__self__ for hook in _list_bound_hooks(module) if hook.__func__ is Edit.edit_output]


def _list_bound_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that are methods."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if hasattr(hook, "__self__")]


def _find_name(module: nn.Module, edit: Edit) -> str:
    path: str = next(path for path, child in module.named_modules() if child is edit)
    return path.rpartition(".")[2]


def _to_double(edit: Edit) -> Edit:
    return deepcopy(edit).double().eval()


def _get_weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def _get_bias(module: nn.Module) -> Tensor | None:
    return None if module.bias is None else module.get_parameter("bias")


def _put_weights(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Store the values in the same Parameters, so that optimisers and tied weights keep theirs."""
    parameter = _get_weight(module)
    parameter.data = weight.to(parameter.dtype).contiguous()
    if bias is not None:
        own = module.get_parameter("bias")
        own.data = bias.to(own.dtype)
