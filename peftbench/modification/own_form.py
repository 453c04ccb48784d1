"""A functional form of the user's own: `functional_form._target_=mypkg.Swish2`.

It is a torch.nn.Module, which is built for each place with plain numbers: those of `OFFERED` that its `__init__` names,
and its settings. It computes Δh for each position by itself, because padding, packed batches and the cache of a
generation rely on that. All of this is tried on random vectors before anything is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.config.own_parts import FORM, is_own, load_class
from peftbench.config.schema import Init, Insertion, Modification, Representation, Run, list_modifications
from peftbench.modification.functional_form import OwnForm
from peftbench.utils.errors import UserError

OFFERED = ("in_width", "bottleneck", "out_width", "groups", "bias", "dropout", "init")
WIDTHS, HEADS = (24, 40), 2  # of the trial
VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def build_own_form(
    m: Modification, in_width: int, out_width: int, own_dropout: float, *, groups: int = 1, prefix: str = ""
) -> OwnForm:
    """Return the form of a modification, for one place.

    A form whose `__init__` does not name `groups` is built once for each group.

    Args:
        own_dropout: the backbone's rate, for `dropout=null`.
        prefix: of the modification's keys, for messages.

    Raises:
        UserError: the class is no module, does not take what it is given, or fails.
    """
    typed = f"{prefix}{FORM}={m.functional_form.name}"
    make = load_class(f"{prefix}{FORM}", m.functional_form.name, nn.Module)
    taken = _list_taken(make, typed)
    if faults := list(_find_key_faults(m, taken, typed, prefix)):
        raise UserError(*faults)
    numbers: dict[str, Any] = {
        "in_width": in_width,
        "bottleneck": m.bottleneck,
        "out_width": out_width,
        "groups": groups,
        "bias": m.bias,
        "dropout": own_dropout if m.dropout is None else m.dropout,
        "init": m.init.name,
    }
    given = {name: number for name, number in numbers.items() if name in taken} | m.functional_form.settings
    try:
        one = make(**given)
        form = (
            one
            if groups == 1 or "groups" in taken
            else nn.ModuleList([one, *(make(**given) for _ in range(1, groups))])
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{typed} fails: {_describe(error)}") from error
    return OwnForm(
        form, in_width, out_width, groups=groups, input_dropout=m.input_dropout, layer_norm=m.layer_norm.name
    )


def _list_taken(make: type[nn.Module], typed: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a form's `__init__` by name. Raises UserError if it takes no widths."""
    taken = {name: one for name, one in inspect.signature(make).parameters.items() if one.kind not in VARIABLE}
    if lacking := [name for name in ("in_width", "out_width") if name not in taken]:
        raise UserError(
            f"{typed} needs the parameter{'s' if len(lacking) > 1 else ''} {' and '.join(lacking)} in its __init__; it "
            f"may also name {', '.join(name for name in OFFERED if name not in ('in_width', 'out_width'))}."
        )
    return taken


def _find_key_faults(m: Modification, taken: dict[str, inspect.Parameter], typed: str, prefix: str) -> Iterator[str]:
    """Yield the faults of keys and settings that a form does not take, and of parameters that nothing sets."""
    settings = m.functional_form.settings
    not_taken = {
        "bottleneck": ("null", m.bottleneck is not None),
        "bias": ("false", m.bias),
        "dropout": ("null", m.dropout is not None and m.dropout > 0),
        "init": ("lora", m.init is not Init.lora),
    }
    for name, (instead, is_set) in not_taken.items():
        if is_set and name not in taken:
            value = getattr(m, name)
            value = value.name if isinstance(value, Init) else str(value).lower()
            yield (
                f"{prefix}{name}={value} with {typed}: its __init__ has no parameter {name}; set "
                f"{prefix}{name}={instead}, or give it one."
            )
    own = [name for name in taken if name not in OFFERED]
    for name, value in settings.items():
        if name in OFFERED:
            yield f"{prefix}functional_form.settings.{name}={value}: a form gets {name} from the run; leave it out."
        elif name not in taken:
            takes = f"its settings are {', '.join(own)}" if own else "it takes no settings"
            yield f"{prefix}functional_form.settings.{name}={value}: {m.functional_form.name} has no {name}; {takes}."
    for name, one in taken.items():
        if one.default is not inspect.Parameter.empty or name in settings:
            continue
        if name == "bottleneck" and m.bottleneck is None:
            yield f"{prefix}bottleneck=null with {typed}, which needs one; give a whole number of at least 1."
        elif name not in OFFERED:
            yield f"{typed} needs {name}; give {prefix}functional_form.settings.{name}=VALUE."


def find_own_form_faults(run: Run) -> list[str]:
    """Return the faults of a run's own forms, each of which is tried on random vectors. Loads nothing."""
    found: list[str] = []
    for prefix, m in list_modifications(run).items():
        if is_own(m.functional_form.name):
            try:
                _try_form(m, prefix)
            except UserError as error:
                found.extend(error.faults)
    return found


def _try_form(m: Modification, prefix: str) -> None:
    """Raise UserError if a form does not do what `OwnForm` needs."""
    typed = f"{prefix}{FORM}={m.functional_form.name}"
    at_heads = m.modified_representation.name is Representation.heads
    is_square = m.insertion_form.name is Insertion.sequential
    in_width, out_width = (WIDTHS[0], WIDTHS[0] if is_square else WIDTHS[1])
    groups = HEADS if at_heads else 1

    def build(seed: int, device: str = "cpu") -> OwnForm:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            bare = replace(m, input_dropout=0.0)
            return build_own_form(bare, in_width, out_width, 0.0, groups=groups, prefix=prefix).eval()

    form, other = build(0), build(1)
    _check_tensors(form, other, typed)
    build(0, "meta")  # as counting does
    shape = (2, groups, 3, in_width) if at_heads else (2, 3, in_width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _, parameter in sorted(form.named_parameters()):  # a form that starts at Δh = 0 says nothing
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        try:
            delta, alone = form(x), form(x[:1, ..., :1, :])
        except UserError as error:
            raise UserError(f"{typed}: {error}") from error
        except Exception as error:
            raise UserError(f"{typed} fails on vectors of shape {tuple(shape)}: {_describe(error)}") from error
    _check_result(delta, alone, (*shape[:-1], out_width), typed)


def _check_tensors(form: OwnForm, other: OwnForm, typed: str) -> None:
    """Raise UserError unless a checkpoint, which stores what is trained, is all that a form needs.

    Args:
        other: the same form, built with another seed.
    """
    if not any(parameter.requires_grad for parameter in form.parameters()):
        raise UserError(f"{typed} has no parameter that is trained.")
    fixed = {
        name: tensor for name, tensor in [*form.named_parameters(), *form.named_buffers()] if not tensor.requires_grad
    }
    others = dict([*other.named_parameters(), *other.named_buffers()])
    for name, tensor in fixed.items():
        if not torch.equal(tensor, others[name]):
            raise UserError(
                f"{typed}: its {name.partition('form.')[2]} is random and not trained, so that a checkpoint would not "
                "store it; train it, or compute it without random numbers."
            )


def _check_result(delta: Tensor, alone: Tensor, shape: tuple[int, ...], typed: str) -> None:
    """Raise UserError unless Δh has its shape, is finite, and depends on nothing but the same position.

    Args:
        alone: Δh of the first position of the first example, computed by itself.
    """
    if delta.shape != shape:
        raise UserError(f"{typed} returns Δh of shape {tuple(delta.shape)}, and {shape} is expected: (..., out_width).")
    if not bool(delta.isfinite().all()):
        raise UserError(f"{typed} returns values that are not finite for vectors from N(0, 1).")
    if not torch.allclose(delta[:1, ..., :1, :], alone, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"{typed} computes a position's Δh from other positions or examples too, which padding would change; it "
            "must compute each by itself."
        )


def count_parameters(m: Modification, bottleneck: int) -> int:
    """Return how many parameters a form trains at one place of the trial's widths."""
    with torch.device("meta"):
        return build_own_form(replace(m, bottleneck=bottleneck), *WIDTHS, 0.0).formula()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
