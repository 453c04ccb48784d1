"""Prompt tuning: l trained vectors before the embedded input (Lester et al. 2021; the paper's appendix A.2).

As in the paper's code (modeling_bart.py at 3222ce2, lines 981-1003) they join the input of the embedding layer's
LayerNorm (in T5, which has none, the output of its token embedding): they take no position embedding, and the tokens
keep theirs. The keys that the layers see grow by l, and
`PromptMask` lets the attention function see them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROMPT = "prompt_mask"  # the attention module's child that widens its mask


class Prompt(nn.Module):
    """The vectors, (l, d), drawn from N(0, 0.02)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.vectors, std=0.02)

    def prepend_to_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Forward pre-hook of the embedding LayerNorm: its input (B, T, d) -> (B, l + T, d)."""
        return (self(args[0]),)

    def prepend_to_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of the token embedding: its output (B, T, d) -> (B, l + T, d)."""
        lengthened: Tensor = self(output)
        return lengthened

    def forward(self, embedded: Tensor) -> Tensor:
        """(B, T, d) -> (B, l + T, d)."""
        vectors = self.vectors.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        return torch.cat([vectors, embedded], dim=1)

    def strip(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of the last layer's LayerNorm: (B, l + T, d) -> (B, T, d), so that a task head which reads the
        first position finds the first token there."""
        return output[:, self.vectors.shape[0] :]

    def extra_repr(self) -> str:
        return f"{tuple(self.vectors.shape)}"


class PromptMask(nn.Module):
    """Widens the mask of an attention whose keys begin with l prompt vectors."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
        """mask: (B, 1, Q', K') made for the tokens alone -> (B, 1, queries, keys) in which every prompt is seen.

        Q' and K' are the tokens' counts, or already count the prompt where transformers padded the mask at its end.
        """
        if mask is None:
            return None
        mask = mask[..., : keys - self.length]
        if mask.shape[-2] not in (1, queries):  # prompts are queries too; in an encoder all queries see the same keys
            mask = torch.cat([mask[..., :1, :].expand(-1, -1, queries - mask.shape[-2], -1), mask], dim=-2)
        return see_also(mask, self.length)


def see_also(mask: Tensor, keys: int) -> Tensor:
    """`mask` (B, 1, Q, K), boolean or additive, for K + `keys` keys of which every query sees the first `keys`."""
    return F.pad(mask, (keys, 0), value=1.0 if mask.dtype == torch.bool else 0.0)
