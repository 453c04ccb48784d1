r"""Axis 4, the composition function: how Δh joins h.

add: h + Δh.  scaled: h + sΔh.  gated: (1-λ)h + λΔh.  He et al. 2022, table 1 and section 3.3.
gated_add: h + λΔh (UniPELT, Mao et al. 2022, section 3).  multiply: h ∘ (1 + Δh) (IA3, Liu et al. 2022, section 3.3).
Prefix tuning's gate λ is the share of the attention that falls on the prefix (eq. 8); `head_attention` computes that
one exactly by attending to the prefix. For the other forms λ is learned, by `Gated`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Add(nn.Module):
    """h + Δh."""

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """h, Δh: the same shape; x, what f read, is not used."""
        return (h + delta).to(h.dtype)


class Scaled(nn.Module):
    """h + sΔh. `learned`: s is a trained scalar that starts at `scale`."""

    def __init__(self, scale: float, learned: bool = False) -> None:
        super().__init__()
        self.scale: float | nn.Parameter = scale
        if learned:
            self.scale = nn.Parameter(torch.full((), scale))

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """h, Δh: the same shape; x, what f read, is not used."""
        return (h + delta * self.scale).to(h.dtype)

    def extra_repr(self) -> str:
        return f"scale={float(self.scale):g}, learned={isinstance(self.scale, nn.Parameter)}"


class Gated(nn.Module):
    """(1-λ)h + λΔh with λ = σ(w·x + b), one gate for each position (and head), w and b trained.

    `bias`, where b starts, is -4, so that λ = 0.018 and the backbone is nearly itself at the start.
    """

    def __init__(self, width: int, groups: int = 1, bias: float = -4.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(groups, width, 1))
        self.bias = nn.Parameter(torch.full((groups, 1, 1), bias))

    def gate(self, x: Tensor) -> Tensor:
        """λ of x (..., T, in); with several groups (B, G, T, in). Returns (..., T, 1)."""
        weight, bias = (self.weight[0], self.bias[0]) if self.weight.shape[0] == 1 else (self.weight, self.bias)
        return torch.sigmoid(x.to(weight.dtype) @ weight + bias)

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """h, Δh: (..., T, out), x: (..., T, in); with several groups (B, G, T, ·)."""
        gate = self.gate(x)
        return ((1 - gate) * h + gate * delta).to(h.dtype)


class GatedAdd(Gated):
    """h + λΔh with the gate of `Gated`: h stays whole, and a closed gate leaves the modification out.

    b starts at 0, so that λ = 1/2. UniPELT's code takes the mean of λ over all positions of an example, padding too;
    here each position has its own, so that padding changes nothing.
    """

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__(width, groups, bias=0.0)

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """h, Δh: (..., T, out), x: (..., T, in); with several groups (B, G, T, ·)."""
        return (h + self.gate(x) * delta).to(h.dtype)


class Multiply(nn.Module):
    """h ∘ (1 + Δh), element by element: Δh = 0 leaves h as it is."""

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """h, Δh: the same shape; x, what f read, is not used."""
        return (h * (1 + delta)).to(h.dtype)
