"""Axis 2, the modified representation: which hidden vectors h of a layer are changed, and which x belongs to each.

Each function in `REPRESENTATIONS` yields the places of one layer. The order of Δh, dropout, residual and norm follows
the paper's code: for attention, Δh is added after W_o but before dropout; for the FFN, after dropout (modeling_bart.py
at 3222ce2, lines 369-378 and 460-479).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from peftbench.backbones.sites import Attention, Layer, Part, Sites, measure_projection
from peftbench.config.axes import WITHOUT_ATTENTION
from peftbench.config.schema import Modification
from peftbench.modification.insertion import INSERTION_FORMS, InsertionForm, sequential_over_residual
from peftbench.utils.errors import UserError


@dataclass(frozen=True)
class Place:
    """One h and its x, on leaf modules."""

    name: str  # path, from the top of the model, of the module that h belongs to
    target: nn.Module  # h is its output or its input
    source: nn.Module  # x is its input
    in_attention: bool  # which of the backbone's dropout rates applies
    at: str = "output"
    over_residual: bool = False  # the sequential form reads x + h
    part: Part | None = None  # the slice of the target's output that is h; None: all of it

    def insertion(self, name: str) -> InsertionForm:
        """Return the insertion form `name` at this place."""
        return sequential_over_residual if self.over_residual else INSERTION_FORMS[name]

    def widths(self, hidden: int, insertion: str) -> tuple[int, int]:
        """Return (width of the input of f, width of h). A module without weights has the width of hidden states."""
        source_in, _ = measure_projection(self.source) or (hidden, hidden)
        target_in, target_out = measure_projection(self.target) or (hidden, hidden)
        h = target_out if self.at == "output" else target_in
        if self.part is not None:
            h = self.part.width
        return (source_in if insertion == "parallel" else h), h


def _projections(*parts: str) -> Callable[[Layer, Iterable[Attention]], Iterator[Place]]:
    """Return a function that yields the outputs of the named projections; x is the projection's own input."""

    def places(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
        for attention in attentions:
            for part in parts:
                module = getattr(attention, part)
                name = f"{attention.name}.{part}"
                yield Place(name, module, module, in_attention=True, part=attention.parts.get(part))

    return places


def _heads_joint(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
    """Yield the concatenated heads before W_o; x is the attention's input. The paper's code calls this the parallel
    attention adapter."""
    for a in attentions:
        yield Place(f"{a.name}.heads_joint", a.output, a.source, in_attention=True, at="input")


def _attention(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
    """Yield the output of W_o; x is the attention's input."""
    for a in attentions:
        yield Place(a.name, a.output, a.source, in_attention=True)


def _ffn(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
    """Yield the FFN sub-layer's output, after its dropout; x is the sub-layer's input."""
    yield Place(layer.ffn.name, _ffn_output(layer), layer.ffn.source, in_attention=False)


def _ffn_weights(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
    """Yield the outputs of the FFN's matrices, each with its own input as x. Matrices that one Linear computes, such as
    Phi-3's gate and up, are modified each by itself, as if they were Linears of their own."""
    for name, module in (*layer.ffn.first.items(), ("second", layer.ffn.second)):
        place = f"{layer.ffn.name}.{name}"
        yield Place(place, module, module, in_attention=False, part=layer.ffn.parts.get(name))


def _ffn_intermediate(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
    """Yield the input of W_2, after the activation, its gate and its dropout; x is the sub-layer's input."""
    yield Place(f"{layer.ffn.name}.intermediate", layer.ffn.second, layer.ffn.source, in_attention=False, at="input")


def _attention_ffn(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
    """Yield the outputs of both sub-layers (Houlsby et al. 2019)."""
    yield from _attention(layer, attentions)
    yield from _ffn(layer, attentions)


def _all_linear(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
    """Yield the outputs of all matrices of the attentions and the FFN, each with its own input as x (Dettmers et al.
    2023; peft's target_modules="all-linear")."""
    yield from _projections("query", "key", "value", "output")(layer, attentions)
    yield from _ffn_weights(layer, attentions)


def _layer(layer: Layer, attentions: Iterable[Attention]) -> Iterator[Place]:
    """Yield the layer's output, after the FFN's add & norm (Pfeiffer et al. 2021)."""
    if layer.parallel:
        raise UserError(
            "modified_representation=layer: this backbone adds attention and FFN to one residual at once, so that no "
            "module returns the layer's output; use modified_representation=ffn or attention_ffn."
        )
    if layer.norm is not None:
        yield Place(layer.name, layer.norm, layer.norm, in_attention=False)
    else:
        assert layer.residual is not None, "a family must name its layers' last norm or their residual"
        if layer.residual_multiplier != 1:
            raise UserError(
                "modified_representation=layer: this backbone multiplies the FFN's output by residual_multiplier="
                f"{layer.residual_multiplier:g} before it adds it to the residual, so that no module returns the "
                "layer's output; use modified_representation=ffn or attention_ffn."
            )
        last = layer.ffn.post_norm or _ffn_output(layer)  # what is added to the residual
        yield Place(layer.name, last, layer.residual, in_attention=False, over_residual=True)


def _ffn_output(layer: Layer) -> nn.Module:
    """Return the module at which the sub-layer's output can be changed: its dropout, or W_2 in a family without one.

    `attach` turns functional dropout into a module before it asks for places.
    """
    return layer.ffn.second if layer.ffn.dropout is None else layer.ffn.dropout


Places = Callable[[Layer, Iterable[Attention]], Iterator[Place]]

# `heads` and `embedding` have no place on a leaf module: `attach` has a separate function for each.
REPRESENTATIONS: dict[str, Places] = {
    "heads_joint": _heads_joint,
    "attention": _attention,
    "query": _projections("query"),
    "key": _projections("key"),
    "value": _projections("value"),
    "query_value": _projections("query", "value"),
    "key_value": _projections("key", "value"),
    "output": _projections("output"),
    "ffn": _ffn,
    "ffn_weights": _ffn_weights,
    "ffn_intermediate": _ffn_intermediate,
    "attention_ffn": _attention_ffn,
    "all_linear": _all_linear,
    "layer": _layer,
}


def choose_sites(sites: Sites, m: Modification, prefix: str) -> Iterator[tuple[Layer, list[Attention]]]:
    """Yield the layers and attentions that the representation's options name. A name that matches nothing is an
    error."""
    r = m.modified_representation
    stacks = {stack.name for stack in r.stacks}
    kinds = {kind.name for kind in r.attentions}
    key = f"{prefix}modified_representation"
    if not stacks & {layer.stack for layer in sites.layers}:
        there = ", ".join(sites.family.stacks)
        raise UserError(f"{key}.stacks=[{', '.join(sorted(stacks))}] names no stack of the backbone; it has: {there}.")
    there_are = {a.kind for layer in sites.layers if layer.stack in stacks for a in layer.attentions}
    if r.name not in WITHOUT_ATTENTION and not kinds & there_are:
        raise UserError(
            f"{key}.attentions=[{', '.join(sorted(kinds))}] names no attention in the {', '.join(sorted(stacks))} of "
            f"this backbone; it has: {', '.join(sorted({a.kind for layer in sites.layers for a in layer.attentions}))}."
        )
    for layer in sites.layers:
        if layer.stack not in stacks:
            continue
        if r.layers is not None:
            if layer.passes > 1:
                raise UserError(
                    f"{key}.layers: the {layer.passes} layers of this backbone share one module and so its "
                    "modifications; leave it out."
                )
            wrong = [index for index in r.layers if not -layer.depth <= index < layer.depth]
            if wrong:
                raise UserError(
                    f"{key}.layers: {wrong[0]} is outside the {layer.stack}'s layers 0 to {layer.depth - 1}."
                )
            if layer.index not in {index % layer.depth for index in r.layers}:
                continue
        yield layer, [attention for attention in layer.attentions if attention.kind in kinds]
