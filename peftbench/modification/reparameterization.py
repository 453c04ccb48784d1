r"""The prefix's MLP: during training a small network produces the prefix vectors; afterwards they are plain vectors.

P_k, P_v of layer i = W_i tanh(W E + b) + b_i, where E (l, d) is a trained embedding. E, W and b are shared by all
layers of one kind of attention (encoder self, decoder self, cross: three sets), W_i and b_i belong to the layer.
Source: Li and Liang (2021). The width 800, the three sets and torch's default initialisation are those of the paper's
code (petl_factory.py `Prefix`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrefixTrunk(nn.Module):
    """Compute tanh(W E + b): (l, mid), shared by the layers of one kind of attention."""

    def __init__(self, length: int, width: int, mid: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.embedding)
        self.linear = nn.Linear(width, mid)

    def forward(self) -> Tensor:
        """Return tanh(W E + b), (l, mid)."""
        return torch.tanh(self.linear(self.embedding))


class PrefixMLP(nn.Module):
    """The keys and values of one attention, as `Bottleneck.weights` expects them.

    They are computed at each call: nothing is kept between a training step and an evaluation. Wrap evaluations in
    `state.fold_tensors` if that costs too much.
    """

    def __init__(self, trunk: PrefixTrunk, heads: int, head_width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads
        self.linear = nn.Linear(trunk.linear.out_features, 2 * heads * head_width)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return P_k as `down` (N_h, l, d_h) and P_v as `up` (N_h, d_h, l)."""
        keys, values = self.linear(self.trunk()).chunk(2, dim=-1)  # each (l, N_h * d_h)
        keys = keys.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (l, N_h, d_h) -> (N_h, l, d_h)
        values = values.unflatten(-1, (self.heads, -1)).permute(1, 2, 0)  # (l, N_h, d_h) -> (N_h, d_h, l)
        return keys, values
