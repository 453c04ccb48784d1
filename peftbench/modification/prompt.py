"""Prompt tuning: l trained vectors before the embedded input (Lester et al. 2021; the paper's appendix A.2).

As in the paper's code (modeling_bart.py at 3222ce2, lines 981-1003) the vectors are put before the input of the
embedding layer's LayerNorm (in T5, which has none, before the output of its token embedding). They get no position
embedding, and the tokens keep theirs. The layers see l more keys, and `PromptMask` lets the attention function see
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
