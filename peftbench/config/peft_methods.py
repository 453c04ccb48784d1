"""Methods of the peft library as rows of data: what each computes, its size, and what is refused of it.

`peft.type` names one of `METHODS`, or any other member of peft's own `PeftType`. The other keys of `peft` are those of
peft's config class for it. peft is an extra: it is imported only where a run asks for it, because it imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from peftbench.config.schema import (
    AttentionKind,
    Composition,
    Init,
    Insertion,
    LayerNormPlace,
    Modification,
    Run,
    Stack,
    list_modifications,
)
from peftbench.utils.errors import describe_unknown, suggest

TYPE = "type"  # the key of `peft` that names the method
LINEAR = ("identity", "parallel", "scaled")  # h + s f(x W_down) W_up with f the identity


@dataclass(frozen=True)
class PeftMethod:
    """A value of `peft.type`."""

    formula: str  # h ← ..., with W the projection's own weights; empty if we do not know it
    library: str = ""  # the member of peft's PeftType; empty: the same name
    settings: dict[str, Any] = field(default_factory=dict)  # keys of peft's config that make the method
    axes: tuple[str, str, str] | None = None  # functional form, insertion form, composition; None: no point of the axes
    size: str = "r"  # the key of peft's config that `bottleneck` sets; empty: none
    even: bool = False  # whether a run begins as the backbone only with an even rank


METHODS: dict[str, PeftMethod] = {
    "LORA": PeftMethod("h + s x W_down W_up", axes=LINEAR),
    "RSLORA": PeftMethod("h + s x W_down W_up, s = α / √r", "LORA", {"use_rslora": True}, LINEAR),
    "PISSA": PeftMethod(
        "h + s x (W_down W_up - W_down⁰ W_up⁰), which start at the r largest singular values of W",
        "LORA",
        {"init_lora_weights": "pissa"},
        LINEAR,
    ),
    "DORA": PeftMethod("x m ∘ (W + s W_down W_up) / ‖W + s W_down W_up‖", "LORA", {"use_dora": True}),
    "ADALORA": PeftMethod("h + s x W_down diag(e) W_up, with entries of e pruned in training", axes=LINEAR),
    "VERA": PeftMethod(
        "h + x A diag(d) B diag(b), A and B random, frozen and shared", axes=("identity", "parallel", "add")
    ),
    "RANDLORA": PeftMethod("h + s x Σ A_i diag(d_i) B diag(b_i), A_i and B random, frozen and shared"),
    "LOHA": PeftMethod("h + s x (A B ∘ C D)"),
    "LOKR": PeftMethod("h + s x (A ⊗ B), B of rank r"),
    "HIRA": PeftMethod("x (W ∘ (1 + A B))"),
    "MISS": PeftMethod("h + x expand(D), each row of D shared by d / r inputs", even=True),
    "BONE": PeftMethod("x (W + W D), in blocks of r inputs", "MISS", {"init_weights": "bat"}),
    "SHIRA": PeftMethod("h + x S, S with r (d_in + d_out) entries at random places"),
    "OFT": PeftMethod("x R W, R orthogonal and block-diagonal (oft_block_size)", size=""),
    "BOFT": PeftMethod("x R W, R a product of orthogonal butterfly factors (boft_block_size)", size=""),
    "HRA": PeftMethod("x (I - 2 u_1 u_1ᵀ) ... (I - 2 u_r u_rᵀ) W", even=True),
    "ROAD": PeftMethod("h rotated and scaled in pairs (variant)", size=""),
    "IA3": PeftMethod("h ∘ l", axes=("constant", "sequential", "multiply"), size=""),
    "LN_TUNING": PeftMethod("the norms' weights", size=""),
    "FOURIERFT": PeftMethod("h + s x F(c), F the inverse Fourier transform of few coefficients", size="n_frequency"),
    "WAVEFT": PeftMethod("h + s x W(c), W a wavelet transform of few coefficients", size="n_frequency"),
}

# Members of PeftType that are no change of single modules, and what to take instead.
REFUSED = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"),
        "puts vectors before the input in a wrapper of its own; use method=prompt",
    ),
    **dict.fromkeys(
        ("PREFIX_TUNING", "P_TUNING", "CARTRIDGE", "ADAPTION_PROMPT"),
        "puts vectors before the keys or the input in a wrapper of its own; use method=prefix",
    ),
    "XLORA": "mixes adapters that are trained already",
    "POLY": "needs the number of a task with each example",
    "SHADOW": "runs a second model beside the backbone",
    "TRAINABLE_TOKENS": "trains rows of the embedding, not a modification",
    "ADAMSS": "has a size that only the weights tell, which no count or budget could know before",
    "FROD": "has a size that only the weights tell, which no count or budget could know before",
    "OSF": "replaces the weights of the backbone by parts of them, which no adapter file holds",
}
# Keys of peft's configs that peftbench sets, or that would change what is counted or compared.
OWN_KEYS = {
    **dict.fromkeys(("task_type", "inference_mode", "peft_type", "auto_mapping", "peft_version"), "peftbench sets it"),
    **dict.fromkeys(("base_model_name_or_path", "revision"), "model.hub_id and model.path name the backbone"),
    "modules_to_save": "a task head is trained anyway",
    "bias": "unfreeze=bias trains the backbone's biases",
    "fan_in_fan_out": "peft finds it out",
    "trainable_token_indices": "rows of the embedding are no modification",
    "layer_replication": "it makes another backbone",
    "rank_pattern": "ranks differ by layer only as peft decides; use modified_representation.layers for places",
    "total_step": "it is the number of optimiser steps",
    "target_r": "bottleneck is AdaLoRA's target rank",
}
NEEDS_DATA = ("eva", "corda", "lora_ga", "loftq")  # values of init_lora_weights that read data or other weights

# Representations that are outputs of projections, which is what peft modifies.
PROJECTIONS = ("query", "key", "value", "query_value", "key_value", "output", "ffn_weights", "all_linear")


class PeftPoint(NamedTuple):
    """A method of peft as a row of a table: the four axes, "" where it has no choice of them."""

    functional_form: str
    modified_representation: str
    insertion_form: str
    composition_function: str
    scale: float
    bottleneck: int | None


def get_method(run: Run) -> PeftMethod:
    """Return the row of `peft.type`; one that `METHODS` lacks has a rank if peft's config has an `r`."""
    known = METHODS.get(str(run.peft[TYPE]))
    return PeftMethod("") if known is None else known


def name_library_type(run: Run) -> str:
    """Return the name of the run's method in peft's PeftType."""
    return get_method(run).library or str(run.peft[TYPE])


def read_point(run: Run) -> PeftPoint:
    """Return the point of a run whose method is one of peft."""
    method, targets = get_method(run), run.peft.get("target_modules")
    where = str(run.modified_representation.name.name)
    if targets is not None:
        where = targets if isinstance(targets, str) else ", ".join(map(str, targets))
    elif where == "none":
        where = "peft's choice"
    form, insertion, composition = method.axes or (str(run.peft[TYPE]).lower(), "", "")
    return PeftPoint(form, where, insertion, composition, compute_scale(run), run.bottleneck)


def compute_scale(run: Run) -> float:
    """Return s of a method that has one: that of `composition_function.scale`, or the one of a typed alpha."""
    settings, r = {**get_method(run).settings, **run.peft}, run.bottleneck
    alpha = settings.get("lora_alpha", settings.get("alpha"))
    rooted = bool(settings.get("use_rslora"))
    if alpha is not None and r:
        return round(float(alpha) / (math.sqrt(r) if rooted else r), 4)
    return run.composition_function.scale * (math.sqrt(r) if rooted and r else 1)


def has_identity_form(run: Run) -> bool:
    """Return whether a run has the two matrices of LoRA, f(x W_down) W_up with f the identity."""
    if run.peft:
        return run.peft.get(TYPE) is not None and name_library_type(run) in ("LORA", "ADALORA")
    return any(m.functional_form.name == "identity" for m in list_modifications(run).values())


def has_rank(run: Run) -> bool:
    """Return whether a run's method is one of peft that has a size for `bottleneck` to set."""
    if not run.peft or not is_peft_installed() or run.peft.get(TYPE) not in list_types():
        return False
    size = get_method(run).size
    return bool(size) and size in list_options(name_library_type(run))


def is_peft_installed() -> bool:
    """Return whether the peft library is there, without importing it."""
    return find_spec("peft") is not None


def list_options(library_type: str) -> dict[str, Any]:
    """Return the keys of peft's config class for a member of PeftType, with their defaults. Imports peft."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[library_type]]
    return {
        item.name: item.default_factory() if item.default_factory is not MISSING else item.default
        for item in fields(found)
    }


def list_types() -> list[str]:
    """Return the values that `peft.type` can have with the installed peft. Imports peft."""
    from peft import PeftType

    members = {member.name for member in PeftType}
    known = [name for name, method in METHODS.items() if (method.library or name) in members]
    return [*known, *sorted(members - {*known, *REFUSED})]


def find_dropout_key(options: dict[str, Any], library_type: str) -> str | None:
    """Return the key of peft's config for dropout on x, which `input_dropout` sets."""
    names = ("lora_dropout", f"{library_type.lower()}_dropout")
    return next((name for name in names if name in options and library_type != "BOFT"), None)


def find_alpha_key(options: dict[str, Any]) -> str | None:
    """Return the key of peft's config from which s is computed."""
    return next((name for name in ("lora_alpha", "alpha") if name in options), None)


def find_peft_faults(run: Run) -> Iterator[str]:
    """Yield a sentence for each fault of a run's `peft`, if it has one."""
    if not run.peft:
        return
    typed = run.peft.get(TYPE)
    if typed is None and run.method != "peft":
        yield f"peft.{next(iter(run.peft))} is for methods of peft, and method={run.method} is none; use method=peft."
        return
    if run.functional_form.name != "none" or run.mix:
        other = "a modification of its own" if run.functional_form.name != "none" else f"mix=[{','.join(run.mix)}]"
        yield f"peft.type={typed} with {other} (method={run.method}): use method=peft without it, or leave peft out."
        return
    if typed is None:
        yield "method=peft needs peft.type, such as peft.type=DORA."
        return
    if not is_peft_installed():
        yield f"peft.type={typed} needs peft, which is not installed: pip install peftbench[peft]."
        return
    if typed in REFUSED:
        yield f"peft.type={typed} is not supported, because it {REFUSED[typed]}."
        return
    types = list_types()
    if typed in METHODS and typed not in types:
        yield f"peft.type={typed} needs a newer peft than {version('peft')}, which has no such method."
        return
    if typed not in types:
        yield describe_unknown("peft.type", typed, types)
        return
    library_type = name_library_type(run)
    options = list_options(library_type)
    yield from _find_option_faults(run, library_type, options)
    yield from _find_root_faults(run, library_type, options)


def _find_option_faults(run: Run, library_type: str, options: dict[str, Any]) -> Iterator[str]:
    method = get_method(run)
    for key, value in run.peft.items():
        if key == TYPE:
            continue
        if key in OWN_KEYS or key.endswith("_config"):
            yield f"peft.{key}={value} cannot be set: {OWN_KEYS.get(key, 'it is an object that no key can hold')}."
        elif key == method.size:
            yield f"peft.{key}={value}: use bottleneck={value}, which is this size in all methods."
        elif key not in options:
            choices = sorted({*options} - {*OWN_KEYS} - {one for one in options if one.endswith("_config")})
            yield f"peft.{key} is no key of peft's {library_type}{suggest(key, choices)}"
        elif key in method.settings and value != method.settings[key]:
            yield f"peft.{key}={value} is not peft.type={run.peft[TYPE]}; use peft.type={library_type}."
        elif key == "init_lora_weights" and str(value) in NEEDS_DATA:
            yield f"peft.{key}={value} reads data or other weights before the training, which peftbench does not do."


def _find_root_faults(run: Run, library_type: str, options: dict[str, Any]) -> Iterator[str]:
    """Yield faults of keys of `Modification`, of which a method of peft takes few."""
    typed, bare, method = f"peft.type={run.peft[TYPE]}", Modification(), get_method(run)
    representation, composition = run.modified_representation, run.composition_function
    where = representation.name.name
    if where not in (*PROJECTIONS, "none"):
        choices = ", ".join(PROJECTIONS)
        yield f"modified_representation={where} with {typed}: peft modifies projections; choices: {choices}, none."
    if where == "none" and representation.layers is not None:
        yield f"modified_representation.layers with {typed} needs a modified_representation; choose query_value."
    if where == "none" and (list(representation.stacks), list(representation.attentions)) != (
        list(Stack),
        list(AttentionKind),
    ):
        yield f"modified_representation.stacks and attentions with {typed} need a modified_representation."
    has_size = bool(method.size) and (method.size in options)
    if run.bottleneck is not None and not has_size:
        yield f"bottleneck={run.bottleneck} with {typed}, which has no rank: leave it out (bottleneck=null)."
    elif run.bottleneck is not None and method.even and run.bottleneck % 2:
        yield f"bottleneck={run.bottleneck} with {typed}: it must be even, so that the run begins as the backbone."
    elif run.bottleneck is not None and run.bottleneck < 1:
        yield f"bottleneck={run.bottleneck}: it must be a whole number of at least 1."
    if run.input_dropout and find_dropout_key(options, library_type) is None:
        yield f"input_dropout={run.input_dropout} with {typed}, which has no dropout on x: use input_dropout=0."
    elif not 0 <= run.input_dropout < 1:
        yield f"input_dropout={run.input_dropout}: a rate is in [0, 1)."
    if composition.name not in (Composition.none, Composition.scaled) or composition.learned:
        yield f"composition_function={composition.name.name} with {typed}: use composition_function=scaled, or none."
    if composition.name is Composition.scaled and find_alpha_key(options) is None:
        yield f"composition_function=scaled with {typed}, which has no scale: use composition_function=none."
    if run.insertion_form.name is not Insertion.none:
        yield f"insertion_form={run.insertion_form.name.name} with {typed}: the method decides it; leave it out."
    for key in ("bias", "dropout", "prefix_mlp"):
        if getattr(run, key) not in (getattr(bare, key), None):
            yield f"{key}={getattr(run, key)} with {typed} has no effect; leave it out."
    if run.layer_norm is not LayerNormPlace.none or run.init is not Init.lora:
        yield f"layer_norm and init are for our own modifications, and {typed} has none; leave them out."
