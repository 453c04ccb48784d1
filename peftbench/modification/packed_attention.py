"""Attention over a batch without its padding: all examples' tokens in one row; each token sees only its own example.

`padding_free.PaddingFree` substitutes this function for `head_attention.attend_modified` while it packs a batch. The
kernel is FlashAttention-2 with variable lengths, as torch ships it. Everywhere but on a GPU in half precision, the
examples are padded during the attention, which also is the reference (`tests/training/test_padding_free.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from peftbench.modification.head_attention import HEADS, HeadModification, Prefix

PACKED_NAME = "peftbench_packed"  # the value of `config._attn_implementation` while batches are packed
PACKING = "packing"  # the attention module's attribute: the `Packing` of its queries and that of its keys


@dataclass(frozen=True)
class TokenRow:
    """The vectors of all examples in one row, one example after another."""

    example: Tensor  # (T,): the example that each vector belongs to
    offsets: Tensor  # (B + 1,), int32: where each example begins, then T
    longest: int  # upper bound of an example's length

    def prepend(self, front: Tensor, vectors: Tensor) -> Tensor:
        """Insert `front` (l, N, d_h) before each example's part of `vectors` (T, N, d_h); returns (T + B l, N, d_h)."""
        length, count = len(front), len(self.offsets) - 1
        joined = vectors.new_empty(len(vectors) + count * length, *vectors.shape[1:])
        steps = torch.arange(length, device=vectors.device)
        begins = self.longer(length).offsets[:-1, None] + steps  # (B, l)
        places = torch.arange(len(vectors), device=vectors.device) + length * (self.example + 1)
        joined.index_copy_(0, places, vectors)
        return joined.index_copy_(0, begins.flatten(), front.repeat(count, 1, 1))

    def longer(self, length: int) -> TokenRow:
        """Return the row with `length` more vectors before each example's; `example` still is that of the others."""
        more = length * torch.arange(len(self.offsets), device=self.offsets.device, dtype=torch.int32)
        return TokenRow(self.example, self.offsets + more, self.longest + length)


class Packing:
    """The positions in the row of the tokens of one stack's batch, kept from one forward pass to the next.

    A row can be filled up with tokens of further examples, so that only a few row lengths T occur. These fillers are
    never read: no other example sees them, and they have no place in the batch.

    Args:
        longest: maximum length of all examples to come, in tokens; a constant, so that compiled code does not change.
    """

    row: TokenRow
    index: Tensor  # (T,): the position of each token in the flattened batch with its padding
    shape: tuple[int, int]  # (B, S) of the batch with its padding

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def load(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        """Load the next batch: examples of `lengths` tokens, padded on the right to `width`. Does not wait for the
        GPU."""
        self.take(self.tensors(lengths, width, device), (len(lengths), width))

    def tensors(
        self, lengths: Sequence[int], width: int, device: torch.device, fillers: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `Row.example`, `Row.offsets` and `index` of a batch followed by examples of `fillers` tokens."""
        if max(lengths) > min(width, self.longest):
            raise ValueError(f"an example of {max(lengths)} tokens exceeds the width {width} or the maximum")
        every = [*lengths, *fillers]
        counts = torch.tensor([0, *every])
        if device.type == "cuda":
            counts = counts.pin_memory().to(device, non_blocking=True)
        total, offsets = sum(every), counts.cumsum(0)
        example = torch.arange(len(every), device=device).repeat_interleave(counts[1:], output_size=total)
        at = torch.arange(total, device=device)
        index = torch.where(example < len(lengths), at - offsets[example] + example * width, len(lengths) * width)
        return example, offsets.to(torch.int32), index

    def take(self, tensors: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int]) -> None:
        """Make `tensors` the next batch; `shape` is the shape of the examples with their padding."""
        example, offsets, self.index = tensors
        self.row = TokenRow(example, offsets, self.longest)
        self.shape = shape

    def pack(self, padded: Tensor, filler: float = 0.0) -> Tensor:
        """Convert (B, S, ...) to (1, T, ...), with `filler` where the row is filled up."""
        flat = padded.flatten(0, 1)
        return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), filler)])[self.index].unsqueeze(0)

    def pad(self, packed: Tensor) -> Tensor:
        """Convert (1, T, ...) to (B, S, ...), with zeros where there is no token."""
        count, width = self.shape
        rows = packed.new_zeros(count * width + 1, *packed.shape[2:])  # the last row takes the fillers
        return rows.index_copy_(0, self.index, packed[0])[:-1].view(count, width, *packed.shape[2:])


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute `head_attention.attend_modified` for packed tokens, which need no mask.

    query: (1, N_h, T, d_h), key and value: (1, N_h, T', d_h). Returns (1, T, N_h, d_h).
    """
    if kwargs.get("softcap") is not None or kwargs.get("sliding_window") is not None:
        raise RuntimeError(f"{type(module).__name__} caps its scores or has a window, which packed rows do not support")
    queries, keys = getattr(module, PACKING)
    children = module._modules.get(HEADS)
    modifications = [] if children is None else list(children.children())
    row = keys.row
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    causal = queries is keys and bool(getattr(module, "is_causal", False))
    fronts = [each.vectors(k.dtype) for each in modifications if isinstance(each, Prefix)]
    if fronts:
        front_k, front_v = (torch.cat(each, dim=1).transpose(0, 1) for each in zip(*fronts, strict=True))
        k, v, row = row.prepend(front_k, k), row.prepend(front_v, v), row.longer(len(front_k))
    scaling = scaling or query.shape[-1] ** -0.5
    heads = attend(q, k, v, queries.row, row, causal=causal, dropout=dropout, scaling=scaling).unsqueeze(0)
    for modification in modifications:
        if isinstance(modification, HeadModification):
            heads = modification(heads, query * scaling)
    return heads, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: TokenRow,
    keys: TokenRow,
    *,
    causal: bool,
    dropout: float,
    scaling: float,
) -> Tensor:
    """Compute softmax(q K^T · scaling) V within each example.

    Args:
        query: (T, N_h, d_h).
        key, value: (T', N_h, d_h), of the same examples in the same order.
        causal: the last query of an example sees all its keys, the one before it all but the last, and so on.

    Returns (T, N_h, d_h).
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0:
        heads: Tensor = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            queries.offsets,
            keys.offsets,
            queries.longest,
            keys.longest,
            dropout,
            causal,
            False,
            scale=scaling,
        )[0]
        return heads
    return _attend_padded(query, key, value, queries, keys, causal=causal, dropout=dropout, scaling=scaling)


def _attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: TokenRow,
    keys: TokenRow,
    *,
    causal: bool,
    dropout: float,
    scaling: float,
) -> Tensor:
    """Compute `attend` with torch's SDPA on padded examples."""
    here, q = _pad(query, queries)
    k, v = _pad(key, keys)[1], _pad(value, keys)[1]
    counts_q, counts_k = queries.offsets.diff()[:, None, None, None], keys.offsets.diff()[:, None, None, None]
    at_q = torch.arange(q.shape[2], device=q.device)[None, None, :, None]
    at_k = torch.arange(k.shape[2], device=k.device)[None, None, None, :]
    mask = at_k < counts_k
    if causal:
        mask = mask & (at_k - counts_k <= at_q - counts_q)
    heads = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling)
    return heads.transpose(1, 2)[here]


def _pad(vectors: Tensor, row: TokenRow) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the place (example, position) of each vector, and all vectors in (B, N_h, longest, d_h)."""
    at = torch.arange(len(vectors), device=vectors.device)
    example = torch.bucketize(at, row.offsets[1:].long(), right=True)
    place = example, at - row.offsets[example]
    padded = vectors.new_zeros(len(row.offsets) - 1, row.longest, *vectors.shape[1:])
    return place, padded.index_put(place, vectors).transpose(1, 2)


def _make_no_mask(*args: Any, **kwargs: Any) -> None:
    """Return no mask: packed tokens have no padding to hide, and the kernel handles causality."""


AttentionInterface.register(PACKED_NAME, attend_packed)
AttentionMaskInterface.register(PACKED_NAME, _make_no_mask)
