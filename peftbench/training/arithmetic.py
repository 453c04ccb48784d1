"""How much arithmetic a method's training step needs, whatever is then computed besides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_sites
from peftbench.modification.head_attention import HEADS, Prefix


def operations(model: PreTrainedModel, sources: Sequence[int], targets: Sequence[int]) -> float:
    r"""Floating point operations of a forward and backward pass over an average example, a multiplication with its
    addition counted as two.

    For each token that a matrix of n weights meets: 2n forward, 2n for the gradient of its input, and 2n more for its
    own gradient where it is trained. For each attention, with Q queries, K keys and h heads of width d: 4 Q K h d
    forward and twice that backward; all Q K pairs are counted, also where a causal mask hides half of them, and prefix
    vectors are keys. Nothing is counted for norms, activations, dropout, the optimiser, the prefix's MLP, padding, or
    what is computed again. Gradients are taken to pass through every layer.

    Keys and values of a cross-attention meet the source's tokens, all else of a decoder the target's. The output layer
    meets the target's tokens (all of them, in a decoder alone), a classifier's head one position.

    Args:
        sources: of each example, the tokens of its input; in a decoder alone with its completion.
        targets: those of its target, where there is an encoder too; else empty.
    """
    sites = find_sites(model)
    both = bool(targets)
    source = sum(sources) / len(sources)
    target = sum(targets) / len(targets) if both else source
    total = 0.0
    counted = {id(p) for module in model.modules() if isinstance(module, Prefix) for p in module.parameters()}
    for layer in sites.layers:
        tokens = target if both and layer.stack == "decoder" else source
        for attention in layer.attentions:
            cross = attention.kind == "cross"
            if cross:
                for module in (attention.key, attention.value):
                    total += _weights(module, counted) * source
            queries = targets if both and layer.stack == "decoder" else sources
            keys = sources if cross else queries
            length = _prefix(attention.module)
            pairs = sum(q * (length + k) for q, k in zip(queries, keys, strict=True)) / len(queries)
            total += 12 * pairs * attention.heads * attention.head_width
        total += _weights(layer.module, counted) * tokens
    head = model.get_output_embeddings()
    if head is not None:
        total += _weights(head, counted) * target
    return total


def _prefix(attention: nn.Module) -> int:
    """The number of prefix vectors of an attention."""
    heads = getattr(attention, HEADS, None)
    return sum(m.function.bottleneck for m in heads.values() if isinstance(m, Prefix)) if heads is not None else 0


def _weights(module: nn.Module, counted: set[int]) -> float:
    """Operations for each token that meets the module's matrices, but those that are `counted` already."""
    total = 0.0
    for parameter in module.parameters():
        if parameter.dim() < 2 or id(parameter) in counted:
            continue
        counted.add(id(parameter))
        total += (6 if parameter.requires_grad else 4) * parameter.numel()
    return total
