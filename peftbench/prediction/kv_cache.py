"""The KV cache of a generation, in which prefixes stand once and the beams of a source share its keys and values.

A prefix that is joined to the keys at every token is two kernels more for each attention: in the cache it is joined
when the text begins. It counts as no tokens there, so that positions and masks stay those of the text. And transformers
repeats the source for each beam: six beams read six equal copies of a cross-attention's keys and values at every token,
and the search moves them among each other. Here each source has one row, and the attention function takes its beams as
queries of that row (`head_attention.modified_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from peftbench.modification.attach import takes_our_attention
from peftbench.modification.head_attention import ATTENTION_NAME, HEADS, Prefix
from peftbench.sites import Attention, configs_of, configured, find_sites


class PrefixedLayer(DynamicLayer):
    """An attention's keys and values, (B, N_kv, l + K, d_h), of which the first l are its prefixes'."""

    def __init__(self, prefixes: list[Prefix]) -> None:
        super().__init__()
        self.prefixes = prefixes
        self.length = sum(prefix.function.bottleneck for prefix in prefixes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with the prefixes, for as many rows as the first token has."""
        super().lazy_initialization(key_states, value_states)
        if self.prefixes:
            pairs = [prefix.vectors(key_states.dtype) for prefix in self.prefixes]
            self.keys, self.values = (
                torch.cat(vectors, dim=1).expand(len(key_states), -1, -1, -1) for vectors in zip(*pairs, strict=True)
            )

    def get_seq_length(self) -> int:
        """The number of tokens."""
        count: int = super().get_seq_length()
        return max(0, count - self.length)


class SourceLayer(PrefixedLayer):
    """A cross-attention's keys and values, (sources, N_kv, l + K, d_h), given as those of all beams."""

    def __init__(self, prefixes: list[Prefix], beams: int) -> None:
        super().__init__(prefixes)
        self.beams = beams

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep every first beam's, and return what is kept."""
        kept: tuple[Tensor, Tensor] = super().update(
            key_states[:: self.beams], value_states[:: self.beams], *args, **kwargs
        )
        return kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to do: a beam is never moved to another source."""


NewCache = Callable[[], dict[str, Cache]]


@contextmanager
def generation_caches(model: PreTrainedModel, beams: int) -> Iterator[NewCache]:
    """Inside, the function that is given makes what `generate` takes for a batch: a cache of ours.

    Nothing where there is neither a prefix nor a source to share, or where another attention than SDPA or ours was
    asked for.
    """
    sites, both = find_sites(model), model.config.is_encoder_decoder
    attentions = [
        (layer.index, each) for layer in sites.layers if layer.stack == "decoder" for each in layer.attentions
    ]
    prefixes = {each.name: [] if sites.family.counts_keys else _prefixes(each) for _, each in attentions}
    ours = model.config._attn_implementation in ("sdpa", ATTENTION_NAME) and takes_our_attention(model)
    if not ours or not (any(prefixes.values()) or (both and beams > 1)):
        yield dict
        return

    def new_self() -> DynamicCache:
        return DynamicCache(config=model.config.get_text_config(decoder=True))

    for index, layer in enumerate(new_self().layers):
        if type(layer) is not DynamicLayer:  # one with a window would push its prefix out
            prefixes.update({each.name: [] for at, each in attentions if at == index and each.kind == "self"})

    def new() -> dict[str, Cache]:
        own, sources = new_self(), Cache(layers=[])
        for index, attention in attentions:
            if attention.kind == "cross":
                sources.layers.append(SourceLayer(prefixes[attention.name], beams))
            elif prefixes[attention.name]:
                own.layers[index] = PrefixedLayer(prefixes[attention.name])
        return {"past_key_values": EncoderDecoderCache(own, sources) if both else own}

    cached = [prefix for each in prefixes.values() for prefix in each]
    for prefix in cached:
        prefix.in_cache = True
    try:
        with configured(configs_of(model), "_attn_implementation", ATTENTION_NAME):
            yield new
    finally:
        for prefix in cached:
            prefix.in_cache = False


def _prefixes(attention: Attention) -> list[Prefix]:
    """In the order in which they stand before the keys: each joins in front of those before it."""
    modifications = getattr(attention.module, HEADS, {})
    return [each for each in reversed(modifications.values()) if isinstance(each, Prefix)]
