"""The number of parameters as a formula: (2·r·d + r + d) × 24 places = (2·512·1024 + 512 + 1024) × 24 = 25,202,688.

The formula is derived from the actual tensors: each axis of each tensor has a letter, and the terms are their products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from peftbench.config.schema import Modification, Representation

if TYPE_CHECKING:
    from peftbench.backbones.sites import Sites
    from peftbench.counts.run_counts import Group

MEANINGS = {
    "r": "bottleneck",
    "l": "number of vectors",
    "d": "width of the hidden states",
    "d_ff": "inner width of the feed-forward",
    "d_h": "width of a head",
    "N_h": "heads",
    "N_kv": "heads of keys and values",
}
ORDER = ("N_h", "N_kv", "r", "l", "d", "d_ff", "d_h")  # order of the factors of a product

# The letters of a stored tensor's axes. A tensor that is not listed has numbers instead of letters.
AXES: Mapping[str, tuple[str, ...]] = {
    "function.down": ("groups", "bottleneck", "in"),
    "function.up": ("groups", "out", "bottleneck"),
    "function.down_bias": ("groups", "", "bottleneck"),
    "function.up_bias": ("groups", "", "out"),
    "function.norm_in.weight": ("in",),
    "function.norm_in.bias": ("in",),
    "function.norm_out.weight": ("out",),
    "function.norm_out.bias": ("out",),
    "function.vector": ("groups", "", "out"),
    "query_norm.weight": ("in",),
    "query_norm.bias": ("in",),
    "composition.weight": ("groups", "in", ""),
    "composition.bias": ("groups", "", ""),
    "vectors": ("bottleneck", "in"),
}

VECTORS = (Representation.heads, Representation.embedding)  # whose softmax bottleneck is a number of vectors

Term = tuple[str, ...]  # the letters of a product


@dataclass(frozen=True)
class Size:
    """The stored parameters of a group of places: the `terms` at each place, with their coefficients."""

    label: str
    prefix: str  # prefix of the modification's keys
    terms: dict[Term, int]
    values: dict[str, int]  # values of the letters
    places: int

    @property
    def stored(self) -> int:
        """Return the value of the formula."""
        return self.places * sum(
            factor * prod(self.values[letter] for letter in term) for term, factor in self.terms.items()
        )

    @property
    def formula(self) -> str:
        """Return the formula in letters: (2·r·d + r + d) × 24 places."""
        return self._sum({letter: letter for letter in self.values}, " places")

    @property
    def numbers(self) -> str:
        """Return the formula in numbers: (2·512·1024 + 512 + 1024) × 24."""
        return self._sum({letter: str(value) for letter, value in self.values.items()}, "")

    def _sum(self, written: Mapping[str, str], unit: str) -> str:
        text = " + ".join(
            "·".join([*([str(factor)] if factor > 1 or not term else []), *(written[letter] for letter in term)])
            for term, factor in self.terms.items()
        )
        if self.places == 1:
            return text
        return f"({text}) × {self.places}{unit}" if len(self.terms) > 1 else f"{text} × {self.places}{unit}"


def describe_size(group: Group, m: Modification, sites: Sites) -> Size:
    """Return the formula of a group of places of the modification `m`."""
    assert group.prefix is not None, "the backbone's own parameters have no formula"
    terms: Counter[Term] = Counter()
    values: dict[str, int] = {}
    for name, shape in group.tensors.items():
        term: list[str] = []
        for axis, number in zip(AXES.get(name, ("other",) * len(shape)), shape, strict=True):
            for letter, value in _find_letters(axis, number, m, sites):
                term.append(letter)
                values[letter] = value
        terms[tuple(sorted(term, key=lambda letter: ORDER.index(letter) if letter in ORDER else -1))] += 1
    ordered = dict(sorted(terms.items(), key=lambda item: -len(item[0])))
    return Size(group.label, group.prefix, ordered, values, group.places)


def _find_letters(axis: str, number: int, m: Modification, sites: Sites) -> Iterator[tuple[str, int]]:
    """Yield the letters whose product is `number`, the length of an axis; none for an axis that does not count."""
    attention = sites.layers[0].attentions[0]
    heads, kv_heads, head = attention.heads, attention.kv_heads, attention.head_width
    at_heads = m.modified_representation.name is Representation.heads
    ffn = next((layer.dense for layer in sites.layers if layer.dense is not None), None)
    inner = 0 if ffn is None else ffn.second.get_parameter("weight").numel() // sites.width  # W_2 is d_ff to d
    found: tuple[tuple[str, int], ...]
    if axis == "bottleneck":
        is_vectors = m.functional_form.name == "softmax" and m.modified_representation.name in VECTORS
        found = (("l" if is_vectors else "r", number),)
    elif axis == "groups":
        found = (("N_h" if number == heads else "N_kv", number),) if at_heads else ()
    elif axis in ("in", "out"):
        letters: dict[int, tuple[tuple[str, int], ...]] = {
            kv_heads * head: (("N_kv", kv_heads), ("d_h", head)),
            heads * head: (("N_h", heads), ("d_h", head)),
            inner: (("d_ff", inner),),
            sites.width: (("d", sites.width),),
            **({head: (("d_h", head),)} if at_heads else {}),
        }
        found = letters.get(number, ((str(number), number),))
    else:
        found = ((str(number), number),) if number != 1 else ()
    yield from found
