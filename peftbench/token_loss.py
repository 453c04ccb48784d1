"""The cross-entropy of target tokens, with label smoothing, without the logits of a whole batch.

The logits of 64 targets of 64 tokens over BART's 50,265 words are 0.8 GB in float32, and a training step holds several
copies of them. `cross_entropy` computes them in chunks, each with its part of the gradient, and keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

IGNORED = -100  # a label that is no token
CHUNK = 1024  # target tokens whose logits are there at a time


def output_layer(model: PreTrainedModel) -> nn.Linear | None:
    """The frozen Linear that gives a model's logits; None where there is none or it is trained, which needs its
    gradient too."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or any(p.requires_grad for p in layer.parameters()):
        return None
    return layer


@contextmanager
def hidden_states(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a forward pass leaves in the list what `layer` reads, and `layer` itself is given no token to compute."""
    seen: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0][:, :0],)

    hook = layer.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        hook.remove()


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float = 0.0,
    *,
    count: Tensor | float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """sum over tokens of (1-ε) (-log p_label) + ε mean_v (-log p_v), p = softmax(W hidden + b), divided by `count`.

    As transformers' LabelSmoother, in float32, with a gradient for `hidden` alone; but 0 where there is no token.

    Args:
        hidden: (..., d).
        weight: W, (vocabulary, d), frozen; the logits are computed in the dtype of `hidden`.
        bias: b, (vocabulary,), frozen.
        labels: (...,), those that are `IGNORED` left out.
        smoothing: ε.
        count: what the sum is divided by; None: the number of labels that are not `IGNORED`.
        chunk: tokens at a time.

    Returns a scalar.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if count is None:
        count = (labels != IGNORED).sum()
    summed: Any = _Summed
    total: Tensor = summed.apply(hidden, weight, bias, labels, smoothing, chunk)
    return total / torch.as_tensor(count).clamp(min=1)


class _Summed(torch.autograd.Function):
    """The sum of `cross_entropy`. Each chunk's gradient, (softmax - target) W, is made while its logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, chunk: int
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            log_p = F.linear(hidden[part], weight, bias).float().log_softmax(-1)
            active = (labels[part] != IGNORED).unsqueeze(-1)
            index = labels[part].clamp(min=0).unsqueeze(-1)
            words = log_p.shape[-1]
            loss = (1 - smoothing) * log_p.gather(-1, index) + smoothing / words * log_p.sum(-1, keepdim=True)
            total -= (loss * active).sum()
            if gradient is not None:
                slope = log_p.exp_().sub_(smoothing / words)
                slope.scatter_add_(-1, index, slope.new_full((), smoothing - 1).expand(index.shape))
                gradient[part] = (slope * active).to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None, None


def logits_bias(model: PreTrainedModel) -> Tensor | None:
    """What a model adds to its logits behind the output layer: BART's `final_logits_bias`, (1, vocabulary)."""
    bias: Tensor | None = getattr(model, "final_logits_bias", None)
    return None if bias is None else bias.flatten()
