"""The cross-entropy of target tokens, with label smoothing, without the logits of a whole batch.

The logits of 64 targets of 64 tokens over BART's 50,265 words are 0.8 GB in float32, and a training step holds several
copies of them. `compute_cross_entropy` computes them in chunks, together with their part of the gradient, and keeps
none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from peftbench.backbones.precision import cast_for_autocast
from peftbench.backbones.sites import adds_router_loss, has_plain_logits
from peftbench.tasks.batch import NO_TOKEN, make_decoder_inputs

CHUNK = 1024  # target tokens whose logits exist at a time
ROWS = 64  # a GPU's matrix products take much longer if the number of words is odd, as BART's is

Chunk = Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor]]


class TokenLoss:
    """The loss of a model's target tokens, computed from the input of its output layer, which gets no gradient.

    Args:
        smoothing: ε of `compute_cross_entropy`.
        compiled: the operations on a chunk's logits are compiled into one kernel.
        pack: selects the tokens that have a label from (B, S, ...), as (1, T, ...).
        recorded: without `pack`, tokens without a label are computed too: to find the others, a step would have to wait
            for the GPU, which a recorded one cannot.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer: nn.Linear,
        smoothing: float,
        *,
        compiled: bool = False,
        pack: Callable[[Tensor], Tensor] | None = None,
        recorded: bool = False,
    ) -> None:
        self.model, self.layer, self.smoothing = model, layer, smoothing
        self.pack, self.recorded = pack, recorded
        self.chunk: Chunk = torch.compile(_compute_chunk, dynamic=True) if compiled else _compute_chunk
        self._kept: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, inputs: Mapping[str, Tensor], count: Tensor | float | None = None) -> Tensor:
        """Run a forward pass and return its loss.

        Args:
            inputs: the model's inputs, with labels.
            count: the divisor of the sum over tokens, see `compute_cross_entropy`.
        """
        given, labels = _separate_labels(self.model, inputs)
        with capture_hidden_states(self.layer) as read:
            self.model(**given)
        hidden = read[0]
        if self.pack is not None:
            hidden, labels = self.pack(hidden), self.pack(labels)
        elif not self.recorded:
            labelled = labels != NO_TOKEN
            hidden, labels = hidden[labelled], labels[labelled]
        weight, bias = self._weights(hidden.dtype)
        return compute_cross_entropy(
            hidden, weight, bias, labels, self.smoothing, count=count, words=len(self.layer.weight), of=self.chunk
        )

    @torch.no_grad()
    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return W and b in `dtype` with rows of zeros appended, up to a multiple of `ROWS`; computed once."""
        if dtype not in self._kept:
            weight = self.layer.weight.detach()
            bias = self.layer.bias.detach() if self.layer.bias is not None else find_logits_bias(self.model)
            more = -len(weight) % ROWS
            self._kept[dtype] = (
                F.pad(weight.to(dtype), (0, 0, 0, more)) if more else weight.to(dtype),
                None if bias is None else F.pad(bias.to(dtype), (0, more)),
            )
        return self._kept[dtype]


def find_output_layer(model: PreTrainedModel) -> nn.Linear | None:
    """Return the frozen Linear that computes a model's logits; None if there is none, if it is trained and so needs
    its gradient too, or if the model's loss is not that of W h + b: it changes the logits afterwards, or adds the
    auxiliary loss of its experts' routers."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or any(p.requires_grad for p in layer.parameters()):
        return None
    if not has_plain_logits(model) or adds_router_loss(model):
        return None
    return layer


def sum_own_losses(model: PreTrainedModel, inputs: Mapping[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """Return the sum over tokens of `compute_cross_entropy`, from the logits that the model returns; a scalar.

    For a model whose logits are more than W h + b. Few examples pass at a time, so that the logits of about `CHUNK`
    tokens exist at once.

    Args:
        inputs: the model's inputs (B, ...), with labels.
        smoothing: ε of `compute_cross_entropy`.
    """
    given, labels = _separate_labels(model, inputs)
    rows = max(1, CHUNK // labels.shape[1])
    total = torch.zeros((), device=labels.device)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        logits = model(**{name: tensor[part] for name, tensor in given.items()}).logits.flatten(0, 1)
        total += _compute_chunk(logits, labels[part].flatten(), smoothing, logits.shape[-1])[0]
    return total


def _separate_labels(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return a model's inputs without the labels, and the label that the logits at each position predict."""
    labels = inputs["labels"]
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    if not model.config.is_encoder_decoder:  # the logits at a token predict the next token
        return given, F.pad(labels[:, 1:], (0, 1), value=NO_TOKEN)
    if "decoder_input_ids" not in given:
        given["decoder_input_ids"] = make_decoder_inputs(model, labels)
    return given, labels


@contextmanager
def capture_hidden_states(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block, a forward pass leaves the input of `layer` in the list, and `layer` itself gets no tokens.

    The input is in the dtype in which `layer` would have multiplied it. Autocast is on inside the forward pass alone,
    and a norm's output is float32 there.
    """
    seen: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(cast_for_autocast(args[0]))
        return (args[0][:, :0],)

    hook = layer.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        hook.remove()


def _compute_chunk(logits: Tensor, labels: Tensor, smoothing: float, words: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the tokens' losses and its gradient for the logits, in the dtype and shape of the logits.

    logits: (n, V or more columns, which do not count); labels: (n,).
    """
    log_p = logits[:, :words].log_softmax(-1, dtype=torch.float32)
    active = (labels != NO_TOKEN).unsqueeze(-1)
    index = labels.clamp(min=0).unsqueeze(-1)
    loss = (1 - smoothing) * log_p.gather(-1, index)
    if smoothing:
        loss = loss + smoothing / words * log_p.sum(-1, keepdim=True)
    slope = log_p.exp_()  # in place: each further tensor of this size costs as much time as the softmax
    if smoothing:
        slope -= smoothing / words
    slope.scatter_add_(-1, index, slope.new_full((1, 1), smoothing - 1).expand_as(index))
    slope *= active
    return -(loss * active).sum(), F.pad(slope.to(logits.dtype), (0, logits.shape[-1] - words))


def compute_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float = 0.0,
    *,
    count: Tensor | float | None = None,
    words: int | None = None,
    chunk: int = CHUNK,
    of: Chunk = _compute_chunk,
) -> Tensor:
    """Sum over tokens (1-ε) (-log p_label) + ε mean_v (-log p_v), p = softmax(W hidden + b), and divide by `count`.

    This is transformers' LabelSmoother, in float32, with a gradient only for `hidden`; but it is 0 if there is no
    token.

    Args:
        hidden: (..., d).
        weight: W, (vocabulary or more, d), frozen; the logits are computed in its dtype.
        bias: b, as long as W, frozen.
        labels: (...,); those that are `NO_TOKEN` are left out.
        smoothing: ε.
        count: the divisor of the sum; None: the number of labels that are not `NO_TOKEN`.
        words: the size of the vocabulary; None: the number of rows of W.
        chunk: tokens at a time.
        of: computes the loss and the gradient of a chunk.

    Returns a scalar.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if count is None:
        count = (labels != NO_TOKEN).sum()
    summed: Any = _Summed
    total: Tensor = summed.apply(hidden, weight, bias, labels, smoothing, words or len(weight), chunk, of)
    return total / torch.as_tensor(count).clamp(min=1)


class _Summed(torch.autograd.Function):
    """The sum of `compute_cross_entropy`. Each chunk's gradient, (softmax - target) W, is computed with its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        smoothing: float,
        words: int,
        chunk: int,
        of: Chunk,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part].to(weight.dtype), weight, bias)
            loss, slope = of(logits, labels[part], smoothing, words)
            total += loss
            if gradient is not None:
                gradient[part] = (slope @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), *(7 * [None])


def find_logits_bias(model: PreTrainedModel) -> Tensor | None:
    """Return the bias that a model adds to its logits after the output layer: BART's `final_logits_bias`,
    (1, vocabulary)."""
    bias: Tensor | None = getattr(model, "final_logits_bias", None)
    return None if bias is None else bias.flatten()
