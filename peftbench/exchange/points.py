"""Which modifications are at the places where another library's adapter is: the way back from modules to the axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftbench.backbones.sites import Layer, Part, Sites, find_sites, measure_projection
from peftbench.config import schema
from peftbench.config.axes import WITHOUT_ATTENTION
from peftbench.exchange.foreign import ForeignAdapter, LowRank, list_names
from peftbench.modification.representation import REPRESENTATIONS, Place
from peftbench.utils.errors import UserError

# From the largest to the smallest: an adapter is described by as few modifications as possible.
LOW_RANK = ("all_linear", "query_value", "key_value", "ffn_weights", "query", "key", "value", "output")
VECTORS = (*LOW_RANK[1:], "ffn_intermediate", "heads_joint")
STACKS = (("encoder", "decoder"), ("encoder",), ("decoder",))
ATTENTIONS = (("self", "cross"), ("self",), ("cross",))


class Cell(NamedTuple):
    """One h: the output or the input of a module, or the part of its output that is one of its projections."""

    path: str
    part: str | None = None
    at: str = "output"


@dataclass(frozen=True)
class Piece:
    """What an adapter does at one cell: B A with a scale, or a vector by which h is multiplied."""

    down: Tensor | None
    up: Tensor | None
    scale: float = 1.0
    bias: Tensor | None = None
    vector: Tensor | None = None

    @property
    def kind(self) -> tuple[int, float]:
        """The rank and the scale, which a modification has only one of; 0 for a vector."""
        return (0 if self.down is None else len(self.down)), self.scale


@dataclass(frozen=True)
class Placed:
    """The modifications that an adapter is, by the prefix of their keys, and the cells of each with their pieces."""

    modifications: dict[str, schema.Modification]
    pieces: dict[str, dict[Cell, Piece]]


def describe_adapter(model: PreTrainedModel, adapter: ForeignAdapter) -> Placed:
    """Return the modifications of an unmodified model that compute what the adapter computes.

    Raises:
        UserError: it changes modules that are no places of the axes, by their names.
    """
    if adapter.prompt is not None:
        prompt = schema.Modification(
            schema.FunctionalForm("softmax"),
            schema.ModifiedRepresentation(schema.Representation.embedding),
            schema.InsertionForm(schema.Insertion.parallel),
            schema.CompositionFunction(schema.Composition.gated),
            bottleneck=len(adapter.prompt),
        )
        return Placed({"": prompt}, {})
    sites, paths = find_sites(model), {module: name for name, module in model.named_modules()}
    pieces = dict(_find_pieces(model, sites, paths, adapter))
    names = LOW_RANK if adapter.low_rank else VECTORS
    candidates = list(_list_candidates(sites, paths, names))
    modifications: dict[str, schema.Modification] = {}
    found: dict[str, dict[Cell, Piece]] = {}
    for kind in dict.fromkeys(piece.kind for piece in pieces.values()):
        left = {cell for cell, piece in pieces.items() if piece.kind == kind}
        while left:
            chosen, layers, covered = max(
                ((one, *one.cover(left)) for one in candidates), key=lambda choice: len(choice[2])
            )
            if not covered:
                raise UserError(
                    f"{adapter.source} changes {list_names({cell.path for cell in left})}, where the axes have no "
                    "point: a modification of low rank is at projections of attentions or at all matrices of FFNs, and "
                    "a vector at projections of attentions or the inputs of W_o and W_2."
                )
            prefix = "" if not modifications else f"mix.{_name_mixed(chosen.name, modifications)}."
            first = pieces[next(iter(covered))]
            modifications[prefix] = _build_modification(chosen, layers, first, adapter.dropout)
            found[prefix] = {cell: pieces[cell] for cell in covered}
            left -= covered
    return Placed(modifications, found)


def _name_mixed(name: str, modifications: Mapping[str, object]) -> str:
    number = sum(prefix.startswith(f"mix.{name}") for prefix in modifications)
    return f"{name}_{number + 1}" if number else name


@dataclass(frozen=True)
class _Candidate:
    """A representation in some stacks and attentions, with its cells by layer."""

    name: str
    stacks: tuple[str, ...]
    attentions: tuple[str, ...]
    layers: Mapping[int, frozenset[Cell]]
    deepest: int  # the number of layers that all of the stacks have

    def cover(self, left: set[Cell]) -> tuple[list[int] | None, frozenset[Cell]]:
        """Return the layers whose cells are all among those that are left, None for all layers, and these cells."""
        layers = [index for index, cells in self.layers.items() if cells <= left]
        if len(layers) == len(self.layers):
            return None, frozenset().union(*self.layers.values())
        layers = [index for index in layers if index < self.deepest]
        return layers, frozenset().union(*(self.layers[index] for index in layers))


def _list_candidates(sites: Sites, paths: Mapping[nn.Module, str], names: tuple[str, ...]) -> Iterator[_Candidate]:
    there = set(sites.family.stacks)
    kinds = {attention.kind for layer in sites.layers for attention in layer.attentions}
    seen: set[tuple[str, frozenset[Cell]]] = set()
    for name, stacks, attentions in product(names, STACKS, ATTENTIONS):
        representation = schema.Representation[name]
        if not set(stacks) & there or (representation in WITHOUT_ATTENTION and attentions != ATTENTIONS[0]):
            continue
        if not set(attentions) & kinds:
            continue
        cells: dict[int, set[Cell]] = {}
        layers = [layer for layer in sites.layers if layer.stack in stacks]
        try:
            for layer in layers:
                cells.setdefault(layer.index, set()).update(_list_cells(layer, name, attentions, paths))
        except UserError:  # the FFNs are mixtures of experts
            continue
        whole = frozenset().union(*cells.values())
        if (name, whole) not in seen and all(cells.values()):
            seen.add((name, whole))
            deepest = min(layer.depth for layer in layers)
            yield _Candidate(name, stacks, attentions, {k: frozenset(v) for k, v in cells.items()}, deepest)


def _list_cells(layer: Layer, name: str, attentions: tuple[str, ...], paths: Mapping[nn.Module, str]) -> Iterator[Cell]:
    chosen = [attention for attention in layer.attentions if attention.kind in attentions]
    for place in REPRESENTATIONS[name](layer, chosen):
        yield _name_cell(place, paths)


def _name_cell(place: Place, paths: Mapping[nn.Module, str]) -> Cell:
    return Cell(paths[place.target], None if place.part is None else place.part.name, place.at)


def _find_pieces(
    model: PreTrainedModel, sites: Sites, paths: Mapping[nn.Module, str], adapter: ForeignAdapter
) -> Iterator[tuple[Cell, Piece]]:
    """Yield what the adapter does at each cell; a change of a module that computes several matrices is several."""
    parts: dict[str, dict[str, Part]] = {}
    for layer in sites.layers:
        for attention in layer.attentions:
            parts[paths[attention.query]] = dict(attention.parts)
        if layer.dense is not None:
            parts[paths[layer.dense.source]] = dict(layer.dense.parts)
    modules = dict(model.named_modules())
    for given, change in adapter.low_rank.items():
        path = _find_path(given, modules, model, adapter)
        _check_widths(path, modules[path], change, adapter)
        yield from _split_low_rank(path, change, parts.get(path) or {})
    for given, (at, vector) in adapter.vectors.items():
        path = _find_path(given, modules, model, adapter)
        widths = measure_projection(modules[path])
        if widths is None or len(vector) != widths[1 if at == "output" else 0]:
            raise UserError(f"{adapter.source} has a vector of {len(vector)} numbers for {path}, which does not fit.")
        own = (parts.get(path) or {}) if at == "output" else {}
        for part in own.values():
            piece = part.take(vector)
            if not torch.equal(piece, torch.ones_like(piece)):  # a part that is not changed
                yield Cell(path, part.name), Piece(None, None, vector=piece)
        if not own:
            yield Cell(path, None, at), Piece(None, None, vector=vector)


def _find_path(given: str, modules: Mapping[str, nn.Module], model: PreTrainedModel, adapter: ForeignAdapter) -> str:
    """Return the path of a module that a file names, which may begin at the model or at its backbone."""
    for path in (given, f"{model.base_model_prefix}.{given}"):
        if path in modules:
            return path
    raise UserError(
        f"{adapter.source} changes {given}, and the backbone ({model.config.model_type}) has no such module; give the "
        "backbone that the adapter was trained on."
    )


def _check_widths(path: str, module: nn.Module, change: LowRank, adapter: ForeignAdapter) -> None:
    widths, given = measure_projection(module), (change.down.shape[1], len(change.up))
    if widths != given:
        raise UserError(
            f"{adapter.source} changes {path} from {given[0]} to {given[1]} numbers, and that of the backbone is "
            + ("no projection." if widths is None else f"from {widths[0]} to {widths[1]}; give the right backbone.")
        )


def _split_low_rank(path: str, change: LowRank, parts: Mapping[str, Part]) -> Iterator[tuple[Cell, Piece]]:
    """Yield the change of each part, without the ranks that it has no use of: columns of B that are zero there."""
    if not parts:
        yield Cell(path), Piece(change.down, change.up, change.scale, change.bias)
        return
    for part in parts.values():
        up = part.take(change.up.T).T
        bias = None if change.bias is None else part.take(change.bias)
        used = up.any(dim=0) if change.up.any() else torch.ones(len(change.down), dtype=torch.bool)
        if used.any() or (bias is not None and bias.any()):
            used = used if used.any() else ~used
            yield Cell(path, part.name), Piece(change.down[used], up[:, used], change.scale, bias)


def _build_modification(
    chosen: _Candidate, layers: list[int] | None, piece: Piece, dropout: float
) -> schema.Modification:
    representation = schema.ModifiedRepresentation(
        schema.Representation[chosen.name],
        stacks=[schema.Stack[name] for name in chosen.stacks],
        attentions=[schema.AttentionKind[name] for name in chosen.attentions],
        layers=layers,
    )
    if piece.down is None:
        return schema.Modification(
            schema.FunctionalForm("constant"),
            representation,
            schema.InsertionForm(schema.Insertion.sequential),
            schema.CompositionFunction(schema.Composition.multiply),
        )
    return schema.Modification(
        schema.FunctionalForm("identity"),
        representation,
        schema.InsertionForm(schema.Insertion.parallel),
        schema.CompositionFunction(schema.Composition.scaled, piece.scale),
        bottleneck=len(piece.down),
        bias=piece.bias is not None,
        dropout=0.0,
        input_dropout=dropout,
    )
