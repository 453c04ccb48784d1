r"""Axis 4, the composition function: how h and Δh are combined.

add: h + Δh.  scaled: h + sΔh.  gated: (1-λ)h + λΔh.  He et al. 2022, table 1 and section 3.3.
gated_add: h + λΔh (UniPELT, Mao et al. 2022, section 3).  multiply: h ∘ (1 + Δh) (IA3, Liu et al. 2022, section 3.3).
The gate λ of prefix tuning is the share of the attention weights that the prefix gets (eq. 8). `head_attention`
computes it exactly, by attending to the prefix. For the other forms `Gated` learns λ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Add(nn.Module):
    """Compute h + Δh."""

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """Return h + Δh. h and Δh have the same shape; x, the input of f, is not used."""
        return (h + delta).to(h.dtype)


class Scaled(nn.Module):
    """Compute h + sΔh. With `learned`, s is a trained scalar that starts at `scale`."""

    def __init__(self, scale: float, learned: bool = False) -> None:
        super().__init__()
        self.scale: float | nn.Parameter = scale
        if learned:
            self.scale = nn.Parameter(torch.full((), scale))

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """Return h + sΔh. h and Δh have the same shape; x, the input of f, is not used."""
        return (h + delta * self.scale).to(h.dtype)

    def extra_repr(self) -> str:
        return f"scale={float(self.scale):g}, learned={isinstance(self.scale, nn.Parameter)}"


class Gated(nn.Module):
    """Compute (1-λ)h + λΔh with λ = σ(w·x + b): one gate for each position (and head); w and b are trained.

    `bias` is the initial value of b. At -4, λ = 0.018, so that the model starts close to the backbone.
    """

    def __init__(self, width: int, groups: int = 1, bias: float = -4.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(groups, width, 1))
        self.bias = nn.Parameter(torch.full((groups, 1, 1), bias))

    def gate(self, x: Tensor) -> Tensor:
        """Return λ of x (..., T, in), or with several groups (B, G, T, in). λ has shape (..., T, 1)."""
        weight, bias = (self.weight[0], self.bias[0]) if self.weight.shape[0] == 1 else (self.weight, self.bias)
        return torch.sigmoid(x.to(weight.dtype) @ weight + bias)

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """Return (1-λ)h + λΔh. h, Δh: (..., T, out), x: (..., T, in); with several groups (B, G, T, ·)."""
        gate = self.gate(x)
        return ((1 - gate) * h + gate * delta).to(h.dtype)


class GatedAdd(Gated):
    """Compute h + λΔh with the gate of `Gated`: h is never scaled down, and a closed gate disables the modification.

    b starts at 0, so that λ = 1/2. UniPELT's code averages λ over all positions of an example, including padding. Here
    each position has its own λ, so that padding changes nothing.
    """

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__(width, groups, bias=0.0)

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """Return h + λΔh. h, Δh: (..., T, out), x: (..., T, in); with several groups (B, G, T, ·)."""
        return (h + self.gate(x) * delta).to(h.dtype)


class Multiply(nn.Module):
    """Compute h ∘ (1 + Δh), element by element: Δh = 0 leaves h unchanged."""

    def forward(self, h: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """Return h ∘ (1 + Δh). h and Δh have the same shape; x, the input of f, is not used."""
        return (h * (1 + delta)).to(h.dtype)
