"""The arithmetic that a method's training step needs, without what an implementation computes in addition."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from peftbench.backbones.quantisation import count_elements
from peftbench.backbones.sites import find_sites
from peftbench.modification.head_attention import HEADS, Prefix
from peftbench.training.batching import Lengths


def count_operations(model: PreTrainedModel, lengths: Lengths) -> float:
    r"""Return the floating point operations of a forward and backward pass over an average example.

    A multiplication with its addition counts as two.

    For each token that is multiplied with a matrix of n weights: 2n forward, 2n for the gradient of its input, and 2n
    more for the matrix's own gradient if it is trained. For each attention, with Q queries, K keys and h heads of width
    d: 4 Q K h d forward and twice that backward. All Q K pairs are counted, even if a causal mask hides half of them,
    and prefix vectors are keys. Nothing is counted for norms, activations, dropout, the optimiser, the prefix's MLP,
    padding, or recomputation. Gradients are assumed to pass through every layer.

    The keys and values of a cross-attention are computed from the source's tokens, everything else in a decoder from
    the target's. The output layer reads the tokens that have a label, a classifier's head one position.
    """
    sites = find_sites(model)
    sources, targets = lengths.sources, lengths.targets
    both = bool(targets) and not lengths.joined
    source = sum(sources) / len(sources)
    target = sum(targets) / len(targets) if targets else source
    total = 0.0
    counted = {id(p) for module in model.modules() if isinstance(module, Prefix) for p in module.parameters()}
    for layer in sites.layers:
        tokens = target if both and layer.stack == "decoder" else source
        for attention in layer.attentions:
            cross = attention.kind == "cross"
            if cross:
                for module in (attention.key, attention.value):
                    total += _count_weights(module, counted) * source
            queries = targets if both and layer.stack == "decoder" else sources
            keys = sources if cross else queries
            length = _count_prefix(attention.module)
            pairs = sum(q * (length + k) for q, k in zip(queries, keys, strict=True)) / len(queries)
            total += layer.passes * 12 * pairs * attention.heads * attention.head_width
        if layer.experts is not None:  # a token passes through few of them
            taken = model.config.num_experts_per_tok / _count_experts(layer.experts)
            total += _count_weights(layer.experts, counted) * tokens * taken
        total += layer.passes * _count_weights(layer.module, counted) * tokens
    head = model.get_output_embeddings()
    if head is not None:
        total += _count_weights(head, counted) * target
    return total


def _count_experts(experts: nn.Module) -> int:
    """Return the number of experts, whose weights are stacked in one parameter for each matrix."""
    return min(len(parameter) for parameter in experts.parameters())


def _count_prefix(attention: nn.Module) -> int:
    """Return the number of prefix vectors of an attention."""
    heads = getattr(attention, HEADS, None)
    return sum(m.function.bottleneck for m in heads.values() if isinstance(m, Prefix)) if heads is not None else 0


def _count_weights(module: nn.Module, counted: set[int]) -> float:
    """Return the operations for each token of the module's matrices, without those that are `counted` already."""
    total = 0.0
    for parameter in module.parameters():
        if parameter.dim() < 2 or id(parameter) in counted:
            continue
        counted.add(id(parameter))
        total += (6 if parameter.requires_grad else 4) * count_elements(parameter)
    return total
