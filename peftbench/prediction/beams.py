"""Beam search of an encoder-decoder whose beams share the keys and values of their source.

transformers repeats the source for each beam: six beams read six equal copies of a cross-attention's keys and values at
every token, and the search moves them among each other. `shared_sources` makes a cache that keeps one for each source;
the attention function takes a source's beams as queries of one batch row (`head_attention.modified_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from peftbench.modification.attach import call_our_attention, takes_our_attention
from peftbench.modification.head_attention import ATTENTION_NAME


class SourceLayer(DynamicLayer):
    """A cross-attention's keys and values, (sources, N_kv, K, d_h), given as those of all beams, source by source."""

    def __init__(self, beams: int) -> None:
        super().__init__()
        self.beams = beams

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep every first beam's, and return what is kept."""
        kept: tuple[Tensor, Tensor] = super().update(
            key_states[:: self.beams], value_states[:: self.beams], *args, **kwargs
        )
        return kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to do: a beam is never moved to another source."""


@contextmanager
def shared_sources(model: PreTrainedModel, beams: int) -> Iterator[dict[str, Cache]]:
    """What to give `generate` so that beams share their sources; nothing where there are no beams or no sources, or
    where another attention than SDPA or ours was asked for."""
    used = model.config._attn_implementation
    shares = beams > 1 and model.config.is_encoder_decoder and used in ("sdpa", ATTENTION_NAME)
    if not shares or not takes_our_attention(model):
        yield {}
        return
    call_our_attention(model)
    try:
        own = DynamicCache(config=model.config.get_text_config(decoder=True))
        sources = Cache(layer_class_to_replicate=partial(SourceLayer, beams))
        yield {"past_key_values": EncoderDecoderCache(own, sources)}
    finally:
        call_our_attention(model, used)
