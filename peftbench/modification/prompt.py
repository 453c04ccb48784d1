"""Prompt tuning: l trained vectors before the embedded input (Lester et al. 2021; the paper's appendix A.2).

As in the paper's code (modeling_bart.py at 3222ce2, lines 981-1003) the vectors are put before the input of the
embedding layer's LayerNorm (in T5, which has none, before the output of its token embedding). They get no position
embedding, and the tokens keep theirs. The layers see l more keys, and `PromptMask` lets the attention function see
them.

In a decoder alone no vector of the prompt attends to a token, so that its keys and values are the same for every
example. `DecoderPrompt` runs the prompt through the layers by itself, once for each forward pass, and every
self-attention puts the keys and values that it has computed before its own, as a prefix. The tokens' hidden states keep
their length: labels, padding, the KV cache and task heads need no special case.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from peftbench.backbones.sites import set_configs

PROMPT = "prompt_mask"  # the attention module's child that widens the mask


class Prompt(nn.Module):
    """The prompt vectors, (l, d), drawn from N(0, 0.02)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.vectors, std=0.02)

    def prepend_to_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Lengthen the input (B, T, d) of the embedding LayerNorm to (B, l + T, d) (forward pre-hook)."""
        return (self(args[0]),)

    def prepend_to_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Lengthen the output (B, T, d) of the token embedding to (B, l + T, d) (forward hook)."""
        lengthened: Tensor = self(output)
        return lengthened

    def forward(self, embedded: Tensor) -> Tensor:
        """Put the vectors before each example: (B, T, d) -> (B, l + T, d)."""
        vectors = self.vectors.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        return torch.cat([vectors, embedded], dim=1)

    def strip(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Remove the prompt from the output of the last layer's LayerNorm (forward hook): (B, l + T, d) -> (B, T, d).

        A task head that reads the first position then finds the first token there.
        """
        return output[:, self.vectors.shape[0] :]

    def extra_repr(self) -> str:
        return f"{tuple(self.vectors.shape)}"


class PromptKeys(nn.Module):
    """One attention's keys and values of a decoder's prompt, where a prefix has its functional form."""

    generator = None  # there is nothing to fold
    _computed: tuple[Tensor, Tensor] | None = None

    def __init__(self, length: int) -> None:
        super().__init__()
        self.bottleneck = length

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values, each (1, N_kv, l, d_h)."""
        self._computed = keys[0], values[0].transpose(-1, -2)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the keys, (N_kv, l, d_h), and the values, (N_kv, d_h, l)."""
        assert self._computed is not None, "the prompt is computed before the model's layers run"
        return self._computed

    def formula(self) -> int:
        """Return 0: the prompt's vectors are counted where they are."""
        return 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one forward pass: tensors with a graph cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_computed"}


class DecoderPrompt(Prompt):
    """A prompt before the tokens of a decoder alone; see this module's docstring.

    With rotary positions the prompt takes the positions -l to -1 and the tokens keep theirs. Scores depend on
    differences of positions only, so that this equals peft's positions, from 0 for the prompt and from l for the
    tokens; and the prompt is next to the first token even if padding comes between. With learned positions, and with
    GPT-J's table of rotations, there are none below 0: the prompt takes 0 to l-1, as in peft, and the tokens keep
    theirs, as in the paper's code, so that no position is lost to the prompt.

    Args:
        fronts: for each layer, its `Prefix`, whose function is a `PromptKeys`.
    """

    def __init__(self, length: int, width: int, fronts: Iterable[nn.Module]) -> None:
        super().__init__(length, width)
        self.fronts = tuple(fronts)  # a tuple: they are modules of the attentions, not of this module
        self._held = False

    @property
    def is_running(self) -> bool:
        """Return whether the prompt is in the layers now, or has been computed for all forward passes."""
        return self._held

    def run_before(self, base: PreTrainedModel, *_: object) -> None:
        """Compute the prompt's keys and values (forward pre-hook of the model without its task head)."""
        if not self._held:
            self.compute_keys(base)

    def compute_keys(self, base: PreTrainedModel) -> None:
        """Run the prompt through the layers, and give every attention its keys and values."""
        embedded = self.vectors.to(base.get_input_embeddings().weight.dtype).unsqueeze(0)
        self._held = True
        try:
            with set_configs(self.fronts, "inert", True):
                found = compute_front(base, embedded)
        finally:
            self._held = False
        for front, (keys, values) in zip(self.fronts, found, strict=True):
            function = front.function
            assert isinstance(function, PromptKeys)
            function.take(keys, values)


def compute_front(base: PreTrainedModel, embedded: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's keys and values of vectors (1, l, d) before a decoder's tokens, each (1, N_kv, l, d_h).

    Their positions are those that `DecoderPrompt` describes.
    """
    length = embedded.shape[1]
    positions = torch.arange(length, device=embedded.device) - (length if has_positions_below_zero(base) else 0)
    argument = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    cache = DynamicCache()  # without the config, which would drop the keys that leave a sliding window
    given = {argument: cache, "position_ids": positions.unsqueeze(0), "use_cache": True}
    # Layers that are computed again in the backward pass fill no cache.
    recomputed = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
    with set_configs(recomputed, "gradient_checkpointing", False):
        base(inputs_embeds=embedded, **given)
    return [(layer.keys, layer.values) for layer in cache.layers]


def has_positions_below_zero(base: nn.Module) -> bool:
    """Return whether a decoder's rotations are computed for any position. GPT-J's are rows of a table, from 0."""
    rotations = [module for module in base.modules() if "RotaryEmbedding" in type(module).__name__]
    return bool(rotations) and not any(hasattr(module, "embed_positions") for module in rotations)


@contextmanager
def hold_prompts(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, a decoder's prompts are computed once, for all forward passes. The weights must not change."""
    prompts = [module for module in model.modules() if isinstance(module, DecoderPrompt)]
    for prompt in prompts:
        prompt.compute_keys(model.base_model)
        prompt._held = True
    try:
        yield
    finally:
        for prompt in prompts:
            prompt._held = False


class PromptMask(nn.Module):
    """Widens the mask of an attention whose keys begin with l prompt vectors."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
        """Widen a mask (B, 1, Q', K') made for the tokens alone to (B, 1, queries, keys), where every prompt is seen.

        Q' and K' are the numbers of tokens, or already include the prompt if transformers padded the mask at its end.
        """
        if mask is None:
            return None
        mask = mask[..., : keys - self.length]
        if mask.shape[-2] not in (1, queries):  # prompts are queries too; in an encoder all queries see the same keys
            mask = torch.cat([mask[..., :1, :].expand(-1, -1, queries - mask.shape[-2], -1), mask], dim=-2)
        return extend_mask(mask, self.length)


def extend_mask(mask: Tensor, keys: int) -> Tensor:
    """Extend `mask` (B, 1, Q, K), boolean or additive, to K + `keys` keys; every query sees the first `keys`."""
    return F.pad(mask, (keys, 0), value=1.0 if mask.dtype == torch.bool else 0.0)
