"""The four axes in the paper's notation, for every point of them, as in He et al.'s table 1.

`config.notation` has the notation of each choice of an axis; `describe_modification` combines one choice of each axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.config.axes import format_composition
from peftbench.config.notation import COMPOSITIONS, FORMS, REPRESENTATIONS, describe_choice
from peftbench.config.own_parts import is_own
from peftbench.config.peft_methods import TYPE, get_method, read_point
from peftbench.config.schema import (
    Composition,
    FFNInput,
    HeadInput,
    Insertion,
    LayerNormPlace,
    Modification,
    Representation,
    Run,
)

LAYER_OVER_RESIDUAL = "the feed-forward sub-layer's output, to which the residual x is added afterwards"

# The paper's name of a point and its table: functional form, representations, insertion form, composition function.
_SUBLAYERS = (Representation.attention, Representation.ffn, Representation.attention_ffn)
POINTS = (
    ("prefix tuning (table 1)", "softmax", (Representation.heads,), Insertion.parallel, Composition.gated),
    ("adapter (table 1)", "relu", _SUBLAYERS, Insertion.sequential, Composition.add),
    ("LoRA (table 1)", "identity", (Representation.query_value,), Insertion.parallel, Composition.scaled),
    ("parallel adapter (table 1)", "relu", _SUBLAYERS, Insertion.parallel, Composition.add),
    ("multi-head parallel adapter (table 1)", "relu", (Representation.heads,), Insertion.parallel, Composition.add),
    ("scaled parallel adapter (table 1)", "relu", _SUBLAYERS, Insertion.parallel, Composition.scaled),
    (
        "prefix tuning without the gate (table 4)",
        "softmax",
        (Representation.heads,),
        Insertion.parallel,
        Composition.add,
    ),
    (
        "LoRA at the FFN (tables 5 and 6)",
        "identity",
        (Representation.ffn_weights,),
        Insertion.parallel,
        Composition.scaled,
    ),
    ("Pfeiffer adapter (table 6)", "relu", (Representation.layer,), Insertion.sequential, Composition.add),
    ("prompt tuning (table 6)", "softmax", (Representation.embedding,), Insertion.parallel, Composition.gated),
)


@dataclass(frozen=True)
class Description:
    """One modification in the paper's notation."""

    prefix: str  # prefix of the modification's keys, "" or "mix.NAME."
    name: str | None  # the paper's name and its table; None: the paper has no result for this point
    axes: dict[str, tuple[str, str]]  # each axis: the choice, and its meaning
    formula: str  # h ← ...


def describe_modification(prefix: str, m: Modification, over_residual: bool = False) -> Description:
    """Return the row of a modification.

    `over_residual`: the backbone's layers end in a sum that no module holds. For the representation `layer`, h is then
    h + x, see `insertion.sequential_over_residual`.
    """
    representation, insertion = m.modified_representation.name, m.insertion_form.name
    over_residual = over_residual and representation is Representation.layer
    if representation is Representation.embedding:
        formula, h = "h ← [P; h]", "the embedded input; P: trained vectors of the same width"
        function = "every attention has l more keys and values, computed from P"
        read, composed = "P is next to the tokens", "the attention itself weighs P against the tokens"
    else:
        read = _name_input(m, over_residual)
        function, composed = _write_delta(m, read), COMPOSITIONS[m.composition_function.name]
        factor = m.composition_function.name not in (Composition.add, Composition.multiply)
        formula = "h ← " + composed.format(delta=f"({function})" if factor and _is_sum(function) else function)
        h = LAYER_OVER_RESIDUAL if over_residual else REPRESENTATIONS[representation].h
        function, composed = f"Δh = {function}", composed.format(delta="Δh") + _describe_weight(m, read)
        read = _describe_input(m, over_residual)
    return Description(
        prefix,
        _find_name(m),
        {
            "functional form": (m.functional_form.name, function),
            "modified representation": (representation.name, f"h: {h}"),
            "insertion form": (insertion.name, read),
            "composition function": (m.composition_function.name.name, composed),
        },
        formula,
    )


def describe_peft_method(run: Run) -> Description:
    """Return the row of a method of peft, with the axes that it has."""
    point, method, typed = read_point(run), get_method(run), run.peft[TYPE]
    known = Representation.__members__.get(point.modified_representation, Representation.none)
    h = f"h: {REPRESENTATIONS[known].h}" if known in REPRESENTATIONS else "modules by peft's names"
    axes = {"modified representation": (point.modified_representation, h)}
    if method.axes is not None:
        axes = {
            "functional form": (point.functional_form, describe_choice("functional_form", point.functional_form)),
            **axes,
            "insertion form": (point.insertion_form, describe_choice("insertion_form", point.insertion_form)),
            "composition function": (
                format_composition(point.composition_function, point.scale, False),
                describe_choice("composition_function", point.composition_function),
            ),
        }
    formula = f"h ← {method.formula}" if method.formula else f"h ← as peft's documentation of {typed} has it"
    return Description("", f"{typed} of the peft library", axes, formula)


def _reads_query(m: Modification) -> bool:
    return (
        m.modified_representation.name is Representation.heads
        and m.insertion_form.name is Insertion.parallel
        and m.modified_representation.head_input is not HeadInput.hidden
    )


def _name_input(m: Modification, over_residual: bool) -> str:
    """Return the symbol of what f reads."""
    if over_residual:
        return "(h + x)"
    if m.insertion_form.name is Insertion.sequential:
        return "h"
    return "q" if _reads_query(m) else "x"


def _describe_input(m: Modification, over_residual: bool) -> str:
    if over_residual:
        return "f reads h + x, the layer's output"
    if m.functional_form.name == "constant":
        return "f reads nothing"
    if m.insertion_form.name is Insertion.sequential:
        return "f reads h itself"
    x = REPRESENTATIONS[m.modified_representation.name].x
    if m.modified_representation.ffn_input is FFNInput.residual:
        x = "the residual stream, before the norm of the feed-forward sub-layer"
    if not _reads_query(m):
        return f"x: {x}"
    if m.modified_representation.head_input is HeadInput.normed_query:
        return f"q: the head's part of LN(x) W_q, not scaled, LN trained; x: {x}"
    return f"q: the head's query x W_q, as the attention scales it; x: {x}"


def _write_delta(m: Modification, read: str) -> str:
    """Return f(x W_down) W_up as a formula."""
    name = m.functional_form.name
    if name == "constant":
        return "l"
    if is_own(name):
        seen = f"LN({read})" if m.layer_norm is LayerNormPlace.input else read
        delta = f"{name.rpartition('.')[2]}({seen.strip('()') if seen == '(h + x)' else seen})"
        return f"LN({delta})" if m.layer_norm is LayerNormPlace.output else delta
    f = FORMS.get(name, name)
    plain = not m.bias and m.layer_norm is LayerNormPlace.none
    if name == "softmax" and _reads_query(m) and plain:
        return "softmax(q P_kᵀ) P_v"  # eq. 7: W_down = P_kᵀ, W_up = P_v
    if m.layer_norm is LayerNormPlace.input:
        read = f"LN{read}" if read.startswith("(") else f"LN({read})"
    inner = f"{read} W_down" + (" + b_down" if m.bias else "")
    delta = (f"{f}({inner})" if f or m.bias else inner) + " W_up" + (" + b_up" if m.bias else "")
    return f"LN({delta})" if m.layer_norm is LayerNormPlace.output else delta


def _is_sum(formula: str) -> bool:
    """Return whether the formula has a + outside all parentheses."""
    depth = 0
    for character in formula:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "+" and depth == 0:
            return True
    return False


def _describe_weight(m: Modification, read: str) -> str:
    """Return the explanation of s or λ."""
    composition = m.composition_function
    if composition.name is Composition.scaled:
        return f", s = {composition.scale:g}" + (" at first, trained" if composition.learned else "")
    if composition.name in (Composition.gated, Composition.gated_add):
        if composition.name is Composition.gated and m.functional_form.name == "softmax" and _reads_query(m):
            return ", λ: the share of the attention that the prefix gets (eq. 8)"
        return f", λ = σ({read} w + b), trained"
    return ""


def _find_name(m: Modification) -> str | None:
    for name, form, representations, insertion, composition in POINTS:
        point = (m.functional_form.name, m.insertion_form.name, m.composition_function.name)
        if point == (form, insertion, composition) and m.modified_representation.name in representations:
            return name
    return None
