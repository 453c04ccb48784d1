"""The valid points of the four axes: one table of rules, and the points that they allow.

`find_refusals` says what is wrong with a modification and names the nearest point that runs; `is_allowed` consults only
the rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from peftbench.config.own_parts import FORM, is_own, list_entry_points
from peftbench.config.schema import (
    FUNCTIONAL_FORMS,
    AttentionKind,
    Composition,
    CompositionFunction,
    FFNInput,
    FunctionalForm,
    HeadInput,
    Init,
    Insertion,
    InsertionForm,
    LayerNormPlace,
    Modification,
    ModifiedRepresentation,
    Representation,
    Stack,
)
from peftbench.utils.errors import describe_unknown


class Point(NamedTuple):
    """One choice of each axis, by name."""

    functional_form: str
    modified_representation: str
    insertion_form: str
    composition_function: str


# All choices of each axis. No rule distinguishes activations, so that relu represents them all.
CHOICES: dict[str, tuple[str, ...]] = {
    "functional_form": ("identity", "relu", "softmax", "constant"),
    "modified_representation": tuple(choice.name for choice in Representation if choice is not Representation.none),
    "insertion_form": ("parallel", "sequential"),
    "composition_function": ("add", "scaled", "multiply", "gated", "gated_add"),
}


def _names_twice(representation: ModifiedRepresentation) -> bool:
    named = (representation.layers or [], representation.stacks, representation.attentions)
    return any(len({*places}) < len(places) for places in named)


@dataclass(frozen=True)
class Rule:
    """A combination that is refused: `broken(m)` tells whether m breaks it, `sentence` why and what would be right."""

    broken: Callable[[Modification], bool]
    sentence: str  # {p} is the prefix of the keys: "" or "mix.NAME."


# Representations for which `attentions` has nothing to choose from.
WITHOUT_ATTENTION = (
    Representation.ffn,
    Representation.ffn_weights,
    Representation.ffn_intermediate,
    Representation.layer,
    Representation.embedding,
)

RULES = (
    Rule(
        lambda m: "none" in read_axes(m),  # a root whose four axes are all none is not a modification
        "{p}functional_form={f}, {p}modified_representation={r}, {p}insertion_form={i}, {p}composition_function={c}: "
        "a modification needs all four axes; give each a value other than none, or start from a preset such as "
        "method=lora.",
    ),
    Rule(
        lambda m: m.composition_function.name is Composition.gated and m.insertion_form.name is Insertion.sequential,
        "{p}composition_function=gated with {p}insertion_form=sequential means nothing: the gate weighs h against a Δh "
        "that is computed in parallel from the same x; use insertion_form=parallel, or composition_function=gated_add, "
        "which has a gate on Δh alone, add or scaled.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.layer and m.insertion_form.name is Insertion.parallel
        ),
        "{p}modified_representation=layer with {p}insertion_form=parallel means nothing: the layer's output is read "
        "after its add & norm, and no sub-layer is parallel to it; use insertion_form=sequential, or "
        "modified_representation=ffn.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.embedding
            and (m.functional_form.name, m.insertion_form.name, m.composition_function.name)
            != ("softmax", Insertion.parallel, Composition.gated)
        ),
        "{p}modified_representation=embedding is prompt tuning: the layers attend to vectors put before the input, so "
        "it needs functional_form=softmax, insertion_form=parallel and composition_function=gated.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.heads
            and m.insertion_form.name is Insertion.parallel
            and m.functional_form.name == "softmax"
            and m.composition_function.name is Composition.gated
            and m.modified_representation.head_input is not HeadInput.query
        ),
        "{p}composition_function=gated weighs by the attention mass on the prefix (eq. 8), which is a function of the "
        "query: use {p}modified_representation.head_input=query, or composition_function=add or scaled.",
    ),
    Rule(
        lambda m: (
            m.functional_form.name == "softmax"
            and m.composition_function.name is Composition.gated
            and m.modified_representation.name in (Representation.heads, Representation.embedding)
            and (m.bias, m.layer_norm, m.dropout, m.input_dropout) != (False, LayerNormPlace.none, None, 0.0)
        ),
        "{p}functional_form=softmax with {p}composition_function=gated is part of the attention itself, under the "
        "backbone's own dropout: {p}bias, {p}layer_norm, {p}dropout and {p}input_dropout must keep their "
        "defaults false, none, null and 0.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.head_input is not HeadInput.query
            and (m.modified_representation.name, m.insertion_form.name) != (Representation.heads, Insertion.parallel)
        ),
        "{p}modified_representation.head_input is what a parallel form over heads reads; with "
        "{p}modified_representation={r} and {p}insertion_form={i} leave it out.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.ffn_input is not FFNInput.normed
            and (
                m.modified_representation.name not in (Representation.ffn, Representation.attention_ffn)
                or m.insertion_form.name is not Insertion.parallel
            )
        ),
        "{p}modified_representation.ffn_input is what a parallel form over the FFN reads; with "
        "{p}modified_representation={r} and {p}insertion_form={i} leave it out.",
    ),
    Rule(
        lambda m: (
            m.prefix_mlp is not None
            and (
                m.modified_representation.name is not Representation.heads
                or (
                    m.insertion_form.name is Insertion.parallel
                    and m.modified_representation.head_input is HeadInput.hidden
                )
            )
        ),
        "{p}prefix_mlp={mlp} makes vectors of a head's width: it requires modified_representation=heads and does not "
        "work with head_input=hidden; set {p}prefix_mlp=null.",
    ),
    Rule(
        lambda m: m.functional_form.name == "constant" and m.insertion_form.name is not Insertion.sequential,
        "{p}functional_form=constant reads neither x nor h, so that both insertion forms are one point; its name is "
        "{p}insertion_form=sequential.",
    ),
    Rule(
        lambda m: (
            m.functional_form.name == "constant"
            and (m.bottleneck, m.bias, m.layer_norm, m.dropout, m.input_dropout, m.prefix_mlp)
            != (None, False, LayerNormPlace.none, None, 0.0, None)
        ),
        "{p}functional_form=constant is a vector of h's width and has no bottleneck: set {p}bottleneck=null, "
        "{p}bias=false, {p}layer_norm=none, {p}dropout=null, {p}input_dropout=0 and {p}prefix_mlp=null.",
    ),
    Rule(
        lambda m: (
            m.functional_form.name == "constant"
            and m.modified_representation.name
            in (Representation.key, Representation.key_value, Representation.all_linear)
            and m.composition_function.name in (Composition.add, Composition.scaled)
        ),
        "{p}functional_form=constant with {p}modified_representation={r} and {p}composition_function={c} means "
        "nothing: softmax does not see a vector that is added to every key; use composition_function=multiply, or "
        "modified_representation=value.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.layer
            and m.composition_function.name is Composition.multiply
        ),
        "{p}modified_representation=layer with {p}composition_function=multiply means nothing: a layer ends in a norm, "
        "whose weight scales it already, or in a sum that no module holds; use unfreeze=norm, or "
        "modified_representation=ffn.",
    ),
    Rule(
        lambda m: (
            m.functional_form.name != "constant"
            and (m.bottleneck is None or m.bottleneck < 1)
            and not (m.bottleneck is None and is_own(m.functional_form.name))  # which may have no size
        ),
        "{p}bottleneck={b}: the bottleneck must be a whole number of at least 1.",
    ),
    Rule(
        lambda m: m.prefix_mlp is not None and m.prefix_mlp < 1,
        "{p}prefix_mlp={mlp}: the MLP's width must be at least 1, or null for none.",
    ),
    Rule(
        lambda m: m.prefix_mlp is not None and is_own(m.functional_form.name),
        "{p}prefix_mlp={mlp} makes W_down and W_up, and {p}functional_form={f} is a form of your own; set "
        "{p}prefix_mlp=null.",
    ),
    Rule(
        lambda m: m.dropout is not None and not 0 <= m.dropout < 1,
        "{p}dropout={dropout}: a rate is in [0, 1), or null for the backbone's own.",
    ),
    Rule(
        lambda m: not 0 <= m.input_dropout < 1,
        "{p}input_dropout={input_dropout}: a rate is in [0, 1).",
    ),
    Rule(
        lambda m: m.composition_function.learned and m.composition_function.name is not Composition.scaled,
        "{p}composition_function.learned=true needs {p}composition_function=scaled: only a scale can be learned.",
    ),
    Rule(
        lambda m: m.composition_function.scale == 0,
        "{p}composition_function.scale=0 would switch the modification off; give any other number.",
    ),
    Rule(
        lambda m: not m.modified_representation.stacks,
        "{p}modified_representation.stacks=[] leaves nothing to modify; choices: encoder, decoder.",
    ),
    Rule(
        lambda m: not m.modified_representation.attentions,
        "{p}modified_representation.attentions=[] leaves nothing to modify; choices: self, cross.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name in WITHOUT_ATTENTION
            and list(m.modified_representation.attentions) != list(AttentionKind)
        ),
        "{p}modified_representation.attentions chooses among attentions, and {p}modified_representation={r} has none; "
        "leave it out.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.embedding
            and (list(m.modified_representation.stacks) != list(Stack) or m.modified_representation.layers is not None)
        ),
        "{p}modified_representation=embedding comes before the first stack: leave {p}modified_representation.stacks "
        "and layers out.",
    ),
    Rule(
        lambda m: m.modified_representation.layers == [],
        "{p}modified_representation.layers=[] leaves nothing to modify; give indices such as [0,1,-1], or null for "
        "all.",
    ),
    Rule(
        lambda m: _names_twice(m.modified_representation),
        "{p}modified_representation names a layer, stack or attention twice, which is modified once; name each once.",
    ),
)


# The name of `unfreeze` in a table, in the place of a modification's axes.
UNFROZEN = {"bias": "the biases", "norm": "the norms", "all": "all parameters"}


def format_composition(name: str, scale: float, learned: bool) -> str:
    """Return the name of a composition function in a table, with its scale: scaled 4, or scaled 1 learned."""
    return name + (f" {scale:g}" + (" learned" if learned else "") if name == Composition.scaled.name else "")


def format_axes(*names: str) -> str:
    """Return the names of a modification's axes in one line; a method of peft may lack some."""
    return " · ".join(filter(None, names))


def read_axes(m: Modification) -> Point:
    """Return the point of a modification."""
    return Point(
        m.functional_form.name,
        m.modified_representation.name.name,
        m.insertion_form.name.name,
        m.composition_function.name.name,
    )


def build_modification(point: Point) -> Modification:
    """Return a modification at a point of the axes, with no option set."""
    form, representation, insertion, composition = point
    return Modification(
        FunctionalForm(form),
        ModifiedRepresentation(Representation[representation]),
        InsertionForm(Insertion[insertion]),
        CompositionFunction(Composition[composition]),
        bottleneck=None if form == "constant" else 1,
    )


def list_points(*more_forms: str) -> Iterator[Point]:
    """Yield every combination of `CHOICES`, whether it runs or not, also with further activations."""
    forms, *others = CHOICES.values()
    return itertools.starmap(Point, itertools.product(dict.fromkeys((*more_forms, *forms)), *others))


@cache
def is_allowed(point: Point) -> bool:
    """Return whether no rule refuses the point."""
    return not any(rule.broken(build_modification(point)) for rule in RULES)


def find_nearest(point: Point) -> Point:
    """Return the point that runs and differs in the fewest axes; on a tie, the one that keeps representation and
    form."""
    costs = (1.02, 1.03, 1.0, 1.01)  # of another form, representation, insertion, composition

    def distance(other: Point) -> float:
        return sum(cost for cost, old, new in zip(costs, point, other, strict=True) if old != new)

    return min(filter(is_allowed, list_points(point.functional_form)), key=distance)


def find_refusals(prefix: str, m: Modification) -> Iterator[str]:
    """Yield a sentence for each rule that the modification breaks; `prefix` is that of its keys, "" or "mix.NAME."."""
    if m.functional_form.name not in FUNCTIONAL_FORMS and not is_own(m.functional_form.name):
        choices = (*FUNCTIONAL_FORMS, *list_entry_points(FORM))
        yield describe_unknown(f"{prefix}functional_form.name", m.functional_form.name, choices)
        return
    point = read_axes(m)
    form, representation, insertion, composition = point
    for rule in RULES:
        if rule.broken(m):
            sentence = rule.sentence.format(
                p=prefix,
                f=form,
                r=representation,
                i=insertion,
                c=composition,
                b="null" if m.bottleneck is None else m.bottleneck,
                mlp=m.prefix_mlp,
                dropout=m.dropout,
                input_dropout=m.input_dropout,
            )
            if rule is RULES[0]:  # if an axis is missing, the other rules would only repeat that
                yield sentence
                return
            yield (
                f"{sentence} {_describe_nearest(prefix, point)}" if rule.broken(build_modification(point)) else sentence
            )


def find_steep_starts(prefix: str, m: Modification) -> Iterator[str]:
    """Yield a sentence if the first gradients of the modification are far larger than the others of a run."""
    is_made = m.functional_form.name == "constant" or m.prefix_mlp is not None  # not drawn as `init` says
    if m.layer_norm is LayerNormPlace.output and m.init is Init.lora and not is_made:
        yield (
            f"{prefix}layer_norm=output with {prefix}init=lora: Δh starts at 0, where the LayerNorm multiplies the "
            f"gradient of W_up by 316, which is 1/√ε; {prefix}init=bert starts elsewhere."
        )


def _describe_nearest(prefix: str, point: Point) -> str:
    changed = [
        f"{prefix}{axis}={new}" for axis, new in find_nearest(point)._asdict().items() if new != getattr(point, axis)
    ]
    return f"The nearest point that runs: {' '.join(changed)}."
