r"""Modifications of the heads: one attention function, registered with transformers, for every family.

Equation 5 puts l trained keys and values before those of the context. It equals equation 7,

    (1-λ) softmax(q K^T) V + λ softmax(q P_k^T) P_v,   λ = prefix mass / (prefix mass + context mass),

which is the gated composition of the bottleneck f(q W_down) W_up with f = softmax, W_down = P_k^T, W_up = P_v.
Concatenation is the faster way to compute it (`tests/modification/test_head_attention.py` has eq. 7 written out). Every
other form or composition is computed in addition to the attention, from the same scaled query.

The function sees keys and values after the KV cache has been updated. Therefore the cache holds only the context,
positions do not shift, and beams need no special case. (`predict` gives `generate` a cache that already has the
prefixes.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftbench.backbones.sites import Part
from peftbench.modification.edit import Modifier
from peftbench.modification.functional_form import Bottleneck, Constant, FunctionalForm
from peftbench.modification.insertion import InsertionForm
from peftbench.modification.memo import Memo
from peftbench.modification.prompt import PROMPT, PromptKeys, extend_mask

ATTENTION_NAME = "peftbench"  # the value of `config._attn_implementation` while heads are modified
HEADS = "head_modifications"  # the attention module's child that holds the modifications, by name


class HeadModification(Modifier):
    """A modification of each head's output before W_o, with weights for each head.

    f reads the head's scaled query q / √d_h, as the paper's code does except on BART; or, in the sequential form, the
    head's output.

    Args:
        reads_hidden: f reads the attention input x instead, as in table 1.
        query_norm: f reads the head's part of LN(x) W_q instead, not scaled, with the backbone's W_q (the paper's code
            on BART, modeling_bart.py at 3222ce2, lines 271-274). This argument is that LN, which is trained.
        query_part: where the query is in the output of a fused projection.
    """

    _x: Tensor | None = None

    def __init__(
        self,
        function: FunctionalForm,
        insertion: InsertionForm,
        composition: nn.Module,
        *,
        reads_hidden: bool = False,
        query_norm: nn.LayerNorm | None = None,
        query_part: Part | None = None,
    ) -> None:
        super().__init__(function, insertion, composition)
        self.reads_input = reads_hidden or query_norm is not None
        self.query_norm = query_norm
        self.query_part = query_part

    def read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep what f reads: x as (B, 1, T, d), or the heads' parts of LN(x) W_q as (B, N_h, T, d_h).

        Forward pre-hook of the query projection, whose input is the attention input (B, T, d).
        """
        x = args[0]
        if self.query_norm is None:
            self._x = x.unsqueeze(1)
        else:
            assert not isinstance(self.function, Constant), "a constant reads nothing"
            normed = self.query_norm(x.to(self.query_norm.weight.dtype)).to(x.dtype)
            query = module.forward(normed)  # runs no hooks: a modified query is not the backbone's W_q
            if self.query_part is not None:
                query = self.query_part.take(query)
            self._x = query.unflatten(-1, (self.function.groups, self.function.in_width)).transpose(1, 2)

    def forward(self, heads: Tensor, query: Tensor) -> Tensor:
        """Return the modified heads.

        Args:
            heads: (B, T, N_h, d_h), as an attention function returns them.
            query: the scaled query, (B, N_h, T, d_h).
        """
        x = query
        if self.reads_input:
            assert self._x is not None, "the query projection must run before the attention"
            x, self._x = self._x, None
        return self.modify(heads.transpose(1, 2), x).transpose(1, 2)


class Prefix(nn.Module):
    """Prefix tuning, eq. 5: keys and values before those of the context. `function.weights` are P_k and P_v^T."""

    in_cache = False  # whether the given keys and values already have the prefix, see evaluation/kv_cache.py
    inert = False  # whether it is left out, while a decoder's prompt computes the keys and values for it

    def __init__(self, function: Bottleneck | PromptKeys) -> None:
        super().__init__()
        self.function = function

    def forward(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return key, value and mask with the prefix in front: K + l in place of K.

        Args:
            key, value: (B, N_kv, K, d_h).
            mask: (B or 1, 1, Q, K), boolean or additive, or None.
        """
        length = self.function.bottleneck
        front_k, front_v = (vectors.expand(len(key), -1, -1, -1) for vectors in self.vectors(key.dtype))
        joined = torch.cat([front_k, key], dim=2), torch.cat([front_v, value], dim=2)
        return *joined, None if mask is None else extend_mask(mask, length)

    def widened(self, mask: Tensor) -> Tensor:
        """Return the mask for keys that already have the prefix. All layers share one, made once for each token."""
        length = self.function.bottleneck
        return _WIDENED.of(mask, length, lambda: extend_mask(mask, length))

    def vectors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return P_k and P_v, each (N_kv, l, d_h)."""
        down, up = self.function.weights()
        return down.to(dtype), up.transpose(-1, -2).to(dtype)


_WIDENED = Memo()


def attend_modified(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' SDPA attention with this module's prompt, prefixes and head modifications.

    query: (B, N_h, Q, d_h), key and value: (B, N_kv, K, d_h), mask: (B, 1, Q, K) or None. Returns (B, Q, N_h, d_h).
    Keys and values that n beams share (`kv_cache.SourceLayer`) have B / n rows.
    """
    children = module._modules  # read directly, for every token: hasattr searches three dicts and raises
    if (prompt := children.get(PROMPT)) is not None:
        attention_mask = prompt(attention_mask, query.shape[2], key.shape[2])
    heads_modifications = children.get(HEADS)
    modifications = () if heads_modifications is None else heads_modifications._modules.values()
    for modification in modifications:
        if isinstance(modification, Prefix):
            if modification.inert:
                continue
            if modification.in_cache:
                if attention_mask is not None:
                    attention_mask = modification.widened(attention_mask)
                continue
            key, value, attention_mask = modification(key, value, attention_mask)
            if kwargs.get("position_bias") is not None:  # T5 has one; a prefix has no position
                kwargs["position_bias"] = F.pad(kwargs["position_bias"], (modification.function.bottleneck, 0))
    if attention_mask is None and getattr(module, "is_causal", False) and 1 < query.shape[2] < key.shape[2]:
        # transformers would crop the keys to the queries' length, and thus drop tokens of the context
        raise RuntimeError(f"{type(module).__name__} is causal and has a prefix but no mask; see `make_modified_mask`")
    heads = _attend(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    for modification in modifications:
        if isinstance(modification, HeadModification):
            heads = modification(heads, query * scaling)
    return heads, None


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Compute SDPA with the n beams of a source as n queries of one row."""
    sources = key.shape[0]
    every, count, queries, width = query.shape
    if mask is not None:
        mask = _widen_mask(mask, sources, query, kwargs.get("position_bias") is not None)
    if every > sources:
        together = query.view(sources, -1, count, queries, width).transpose(1, 2)  # (B / n, N_h, n, Q, d_h)
        query = together.reshape(sources, count, -1, width)
        kwargs["is_causal"] = False  # a single query sees all keys, and so do n single queries
    if kwargs.get("softcap") is None:
        heads: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    else:
        heads = _attend_capped(query, key, value, mask, **kwargs)
    return heads.reshape(every, queries, count, -1)  # (B / n, n Q, N_h, d_h) -> (B, Q, N_h, d_h)


def _attend_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Compute softmax(c tanh(q K^T scaling / c) + mask) V, as Gemma 2 does with c = `softcap`; SDPA cannot.

    query: (B, N_h, Q, d_h), key and value: (B, N_kv, K, d_h). Without a mask a query sees all keys, which is right for
    single queries alone: `make_modified_mask` writes out every other mask. Returns (B, Q, N_h, d_h).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap)
    if mask is not None:
        scores = scores + (make_additive(mask, scores.dtype) if mask.dtype is torch.bool else mask)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2)


def _widen_mask(mask: Tensor, sources: int, query: Tensor, biased: bool) -> Tensor:
    """Return the mask (B or 1, 1, Q, K) for all queries of a source, as (B / n or 1, 1, n Q, K).

    SDPA would convert a boolean mask to the query's dtype in every layer. Here it is converted once for each token, for
    all layers that get the same mask.
    """
    every, _, queries, _ = query.shape

    def joined() -> Tensor:
        if every == sources:
            return mask
        return mask.expand(every, -1, queries, -1).reshape(sources, 1, -1, mask.shape[-1])

    if mask.dtype != torch.bool or biased or torch.is_grad_enabled():
        return joined()
    dtype = choose_product_dtype(query)
    return _ADDITIVE.of(mask, (sources, queries, dtype), lambda: make_additive(joined(), dtype))


def choose_product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which attention uses a tensor: that of autocast, to which it would be rounded at every token.

    Positions that are rotated in float32 make queries and keys of float32 there.
    """
    if x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def make_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask to one that is added to the scores: 0 for keys that are seen, -inf for the others.

    Its rows begin at multiples of 16 bytes; otherwise each attention would first copy them to aligned rows.
    """
    keys = mask.shape[-1]
    wide = mask.new_zeros((*mask.shape[:-1], keys + -keys % 8), dtype=dtype)
    return wide[..., :keys].masked_fill_(~mask, float("-inf"))


_ADDITIVE = Memo()


def make_modified_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return transformers' SDPA mask, with every causal mask of several queries written out.

    With a prefix there are more keys than queries, so that the kernel's own causal flag would align wrongly. A single
    query sees all keys.
    """
    single = kwargs.get("q_length") == 1 and kwargs.get("allow_is_causal_skip", True)
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": single})
    return mask


# Without a mask function of the same name transformers silently passes no mask, and padding would be attended to.
AttentionInterface.register(ATTENTION_NAME, attend_modified)
AttentionMaskInterface.register(ATTENTION_NAME, make_modified_mask)
