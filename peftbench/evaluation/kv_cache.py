"""The KV cache of a generation, which stores prefixes once and shares a source's keys and values among its beams.

A prefix that is concatenated to the keys at every token takes two more kernels for each attention. In the cache, it is
concatenated once, when the text begins. It counts as no tokens there, so that positions and masks stay those of the
text.

A layer's cache in transformers makes new tensors at every token, and a search that reorders its beams moves all of
them, layer by layer. Here a token is written after the others, and the tokens of all layers are moved at once.

Where a decoder rotates its keys in float32, autocast would round all of them at every token. Here each is rounded once,
so that they take half the memory.

transformers repeats the source for each beam: six beams read six equal copies of a cross-attention's keys and values at
every token, and the search reorders these copies. Here each source has one row, and the attention function takes its
beams as queries of that row (`head_attention.attend_modified`).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from peftbench.backbones.sites import Attention, find_sites, list_configs, set_configs
from peftbench.modification.attach import takes_our_attention
from peftbench.modification.head_attention import ATTENTION_NAME, HEADS, Prefix, choose_product_dtype
from peftbench.modification.prompt import hold_prompts

ROOM = 64  # tokens for which a store has room initially, and by which it grows


class Store:
    """Keys and values of A self-attentions of a decoder, whose prefixes have the same length.

    They are stored in one tensor, (l + room, 2 A, B, N_kv, d_h): first the prefixes', then a row for each token. A
    token is written there without copying the others. One kernel moves a search's beams in all attentions, to a second
    such tensor, and the two are swapped. Both contain the prefixes, because they are the same for all beams. (A new
    tensor for each move would be a little larger than all before it, and could not reuse their memory.)

    Args:
        prefixes: of each attention.
    """

    _all: Tensor
    _spare: Tensor | None = None
    _new: tuple[Tensor, ...]  # slots for the keys and values of the last tokens, each (B, N_kv, tokens, d_h)
    _until_now: tuple[Tensor, ...]  # keys and values of the prefix and all tokens, each (B, N_kv, l + tokens, d_h)

    def __init__(self, prefixes: Sequence[Sequence[Prefix]]) -> None:
        self.prefixes = prefixes
        self.length = _count_keys(prefixes[0])
        self.tokens = 0  # the number that at least one attention has seen

    def write(self, attention: int, before: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append an attention's keys and values of further tokens, (B, N_kv, tokens, d_h), to those of `before` tokens.

        Returns:
            All its keys and all its values, with the prefix.
        """
        if before == self.tokens:  # this attention is the first one to see them
            self._extend(key)
        at = 2 * attention
        self._new[at].copy_(key)
        self._new[at + 1].copy_(value)
        return self._until_now[at], self._until_now[at + 1]

    def reorder(self, beams: Tensor) -> None:
        """Reorder the tokens: row b becomes the old row `beams`[b]."""
        begin, end = self.length, self.length + self.tokens
        count, width = len(beams), self._all[0, 0, 0].numel()
        starts = torch.arange(0, self.tokens * self._all.shape[1] * count, count, device=beams.device)
        if self._spare is None:
            self._spare = torch.empty_like(self._all)
            self._spare[:begin] = self._all[:begin]
        rows, moved = (each[begin:end].view(-1, width) for each in (self._all, self._spare))
        torch.index_select(rows, 0, (starts.unsqueeze(1) + beams).flatten(), out=moved)
        self._all, self._spare = self._spare, self._all

    def _extend(self, key: Tensor) -> None:
        more = key.shape[2]
        start = self.length + self.tokens
        if self.tokens == 0 or start + more > len(self._all):
            self._grow(start + more, key)
        self.tokens += more
        self._new, self._until_now = (
            self._all[begin : start + more].permute(1, 2, 3, 0, 4).unbind() for begin in (start, 0)
        )

    def _grow(self, length: int, key: Tensor) -> None:
        """Make room for `length` vectors and `ROOM` more."""
        batch, heads, _, width = key.shape
        dtype = choose_product_dtype(key)
        larger = key.new_empty(length + ROOM, 2 * len(self.prefixes), batch, heads, width, dtype=dtype)
        if self.tokens:
            larger[: len(self._all)] = self._all
        elif self.length:
            fronts = [vectors for own in self.prefixes for vectors in _join_prefixes(own, dtype)]
            larger[: self.length] = torch.stack(fronts).permute(2, 0, 1, 3).unsqueeze(2)  # (l, 2 A, 1, N_kv, d_h)
        self._all, self._spare = larger, None


class StoredLayer(DynamicLayer):
    """A self-attention's keys and values, in a store that it shares with other attentions."""

    def __init__(self, store: Store, attention: int) -> None:
        super().__init__()
        self.store, self.attention, self.tokens = store, attention, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store those of further tokens; return all, after those of the prefix."""
        found = self.store.write(self.attention, self.tokens, key_states, value_states)
        self.tokens += key_states.shape[2]
        return found

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the beams; the store's first layer does so for all its layers."""
        if self.attention == 0 and self.tokens:
            self.store.reorder(beam_idx)


class RoundedLayer(DynamicLayer):
    """A self-attention's keys and values, in the dtype in which it uses them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store those of further tokens; return all."""
        dtype = choose_product_dtype(key_states)
        kept: tuple[Tensor, Tensor] = super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)
        return kept


class SourceLayer(DynamicLayer):
    """A cross-attention's keys and values, (sources, N_kv, l + K, d_h), the prefixes' first, shared by all beams."""

    def __init__(self, prefixes: Sequence[Prefix], beams: int) -> None:
        super().__init__()
        self.prefixes, self.beams = prefixes, beams
        self.length = _count_keys(prefixes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with the prefixes."""
        super().lazy_initialization(key_states, value_states)
        if self.prefixes:
            fronts = _join_prefixes(self.prefixes, key_states.dtype)
            self.keys, self.values = (vectors.expand(len(key_states), -1, -1, -1) for vectors in fronts)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store those of each source's first beam; return all that are stored."""
        kept: tuple[Tensor, Tensor] = super().update(
            key_states[:: self.beams], value_states[:: self.beams], *args, **kwargs
        )
        return kept

    def get_seq_length(self) -> int:
        """Return the number of the source's tokens."""
        count: int = super().get_seq_length()
        return max(0, count - self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: a beam is never moved to another source."""


NewCache = Callable[[], dict[str, Cache]]


@contextmanager
def make_caches(model: PreTrainedModel, beams: int) -> Iterator[NewCache]:
    """Yield a function that makes the argument of `generate` for a batch: one of our caches, for use inside the block.

    The function returns no argument if an encoder's source is not shared and there is no prefix, or if another
    attention than SDPA or ours was requested.
    """
    sites, both = find_sites(model), model.config.is_encoder_decoder
    attentions = [
        (layer.index, each) for layer in sites.layers if layer.stack == "decoder" for each in layer.attentions
    ]
    prefixes = {each.name: [] if sites.family.counts_keys else _list_prefixes(each) for _, each in attentions}
    ours = model.config._attn_implementation in ("sdpa", ATTENTION_NAME) and takes_our_attention(model)
    if not ours or (both and beams == 1 and not any(prefixes.values())):
        yield dict
        return

    argument = name_cache_argument(model)

    def new_self() -> DynamicCache:
        return DynamicCache(config=model.config.get_text_config(decoder=True))

    stores: dict[int, list[tuple[int, list[Prefix]]]] = defaultdict(
        list
    )  # for each length, the layers and their prefixes
    rounded: list[int] = []  # the layers without a store
    windowed = {index for index, layer in enumerate(new_self().layers) if type(layer) is not DynamicLayer}
    for index, attention in attentions:
        if attention.kind == "self" and index in windowed:  # its window would drop the prefix
            prefixes[attention.name] = []
        elif attention.kind == "self" and (both or prefixes[attention.name]):
            own = prefixes[attention.name]
            stores[_count_keys(own)].append((index, own))
        elif attention.kind == "self":
            rounded.append(index)

    def new() -> dict[str, Cache]:
        cache, sources = new_self(), Cache(layers=[])
        for index in rounded:
            cache.layers[index] = RoundedLayer()
        for members in stores.values():
            store = Store([own for _, own in members])
            for place, (index, _) in enumerate(members):
                cache.layers[index] = StoredLayer(store, place)
        for _, attention in attentions:
            if attention.kind == "cross":
                sources.layers.append(SourceLayer(prefixes[attention.name], beams))
        return {argument: EncoderDecoderCache(cache, sources) if both else cache}

    cached = [prefix for each in prefixes.values() for prefix in each]
    # The prompt first: while it is computed, no prefix is in a cache.
    ours_everywhere = set_configs(list_configs(model), "_attn_implementation", ATTENTION_NAME)
    with hold_prompts(model), set_configs(cached, "in_cache", True), ours_everywhere:
        yield new


def name_cache_argument(model: PreTrainedModel) -> str:
    """Return the name of a model's argument for the cache. Since transformers 5.24 the older name causes a warning."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _list_prefixes(attention: Attention) -> list[Prefix]:
    """Return the prefixes in their order before the keys: each modification puts its own before the earlier ones."""
    modifications = getattr(attention.module, HEADS, {})
    return [each for each in reversed(modifications.values()) if isinstance(each, Prefix)]


def _count_keys(prefixes: Sequence[Prefix]) -> int:
    """Return the number of keys that they put before those of the text."""
    return sum(prefix.function.bottleneck for prefix in prefixes)


def _join_prefixes(prefixes: Sequence[Prefix], dtype: torch.dtype) -> list[Tensor]:
    """Return P_k and P_v of all prefixes, concatenated, each (N_kv, l, d_h)."""
    pairs = [prefix.vectors(dtype) for prefix in prefixes]
    return [torch.cat(vectors, dim=1) for vectors in zip(*pairs, strict=True)]
