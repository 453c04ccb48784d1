"""The choices of the four axes in the notation of He et al. (2022, table 1). Their symbols and words are defined here.

h is the modified representation, x what a parallel form reads, W_down and W_up the trained bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.config.schema import ACTIVATIONS, Composition, Representation

# f in Δh = f(x W_down) W_up. The identity is not written; activations that are not listed keep their own name.
FORMS = {
    "identity": "",
    "relu": "ReLU",
    "gelu": "GELU",
    "silu": "SiLU",
    "sigmoid": "σ",
    "relu6": "ReLU6",
    "relu2": "ReLU²",
    "leaky_relu": "LeakyReLU",
}

COMPOSITIONS = {
    Composition.add: "h + {delta}",
    Composition.scaled: "h + s · {delta}",
    Composition.gated: "(1 - λ) h + λ {delta}",
    Composition.gated_add: "h + λ {delta}",
    Composition.multiply: "h ∘ (1 + {delta})",
}


@dataclass(frozen=True)
class Described:
    """A modified representation in words."""

    h: str
    x: str  # what a parallel form reads; "" if no form is parallel


REPRESENTATIONS = {
    Representation.heads: Described("the attention's output at each head, before W_o", "the attention's input"),
    Representation.heads_joint: Described("the concatenated heads, before W_o", "the attention's input"),
    Representation.attention: Described("the attention's output, after W_o", "the attention's input"),
    Representation.query: Described("the queries, the output of W_q", "the input of W_q"),
    Representation.key: Described("the keys, the output of W_k", "the input of W_k"),
    Representation.value: Described("the values, the output of W_v", "the input of W_v"),
    Representation.query_value: Described(
        "the queries and the values, the outputs of W_q and W_v", "the input of W_q or W_v"
    ),
    Representation.key_value: Described(
        "the keys and the values, the outputs of W_k and W_v", "the input of W_k or W_v"
    ),
    Representation.output: Described("the output of W_o", "the input of W_o: the concatenated heads"),
    Representation.ffn: Described("the feed-forward sub-layer's output", "the feed-forward sub-layer's input"),
    Representation.ffn_intermediate: Described(
        "the feed-forward's inner activations, the input of W_2", "the feed-forward sub-layer's input"
    ),
    Representation.ffn_weights: Described(
        "the outputs of the feed-forward sub-layer's weights, W_1 and W_2", "the input of the same weight"
    ),
    Representation.attention_ffn: Described(
        "the outputs of the attention and of the feed-forward sub-layer", "the input of the same sub-layer"
    ),
    Representation.all_linear: Described(
        "the outputs of all linear layers: W_q, W_k, W_v, W_o and the feed-forward sub-layer's weights",
        "the input of the same weight",
    ),
    Representation.layer: Described("the layer's output, after the feed-forward's add & norm", ""),
    Representation.embedding: Described("the embedded input", ""),
}

INSERTIONS = {"parallel": "f reads x, the input of what computes h", "sequential": "f reads h"}

_AFTER_COMPOSITION = {
    "scaled": ", s fixed or learned",
    "gated": ", λ the share of the attention that a prefix gets, or a learned gate",
    "gated_add": ", λ a learned gate",
}
_FUNCTIONS = {
    "identity": "Δh = x W_down W_up",
    "softmax": "Δh = softmax(x W_down) W_up: prefixes, whose keys and values are W_down and W_up",
    "constant": "Δh = l, a trained vector",
}


def describe_choice(axis: str, choice: str) -> str:
    """Return the meaning of a choice of an axis, on one line.

    Args:
        axis: a key of `axes.CHOICES`; `choice` one of its values.

    Raises:
        KeyError: the axis has no such choice.
    """
    if axis == "insertion_form":
        return INSERTIONS[choice]
    if axis == "composition_function":
        return COMPOSITIONS[Composition[choice]].format(delta="Δh") + _AFTER_COMPOSITION.get(choice, "")
    if axis == "modified_representation":
        h = REPRESENTATIONS[Representation[choice]].h
        return f"{h} (prompts)" if choice == "embedding" else h
    if choice in _FUNCTIONS:
        return _FUNCTIONS[choice]
    if choice not in ACTIVATIONS:
        raise KeyError(choice)
    others = ", ".join(name for name in ACTIVATIONS if name != choice)
    function = f"Δh = {FORMS.get(choice, choice)}(x W_down) W_up"
    return f"{function}; also {others}" if choice == "relu" else function
