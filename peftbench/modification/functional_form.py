r"""Axis 1, the functional form: every form but one is a grouped bottleneck, Δh = f(x W_down) W_up.

f is the identity (LoRA), an activation (adapters) or softmax (prefix tuning): He et al. 2022, equations 4, 7 and 8 and
table 1. A hidden state is one group; heads are N_h groups, each with its own weights. Prefix tuning uses the same
module: for each head W_down = W_q P_k^T (the projected query is multiplied with the l prefix keys) and W_up = P_v, so
that the number l of prefix vectors plays the role of the bottleneck r. The exceptions are `Constant`, Δh = l (IA3), and
`OwnForm`, which is whatever a module of the user's computes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from peftbench.modification.reparameterization import PrefixMLP
from peftbench.utils.errors import UserError


def build_activation(name: str) -> nn.Module:
    """Return f by name: `identity`, `softmax` (over the bottleneck), or an entry of transformers' ACT2FN."""
    if name == "identity":
        return nn.Identity()
    if name == "softmax":
        return nn.Softmax(dim=-1)
    module: nn.Module = ACT2FN[name]
    return module


class Bottleneck(nn.Module):
    r"""Compute Δh = f(x W_down + b_down) W_up + b_up, for G groups in parallel.

    Weights are laid out as in `torch.nn.Linear`: `down` (G, r, in), `up` (G, out, r), biases (G, 1, r) and (G, 1, out).

    Args:
        in_width: width of the input of f.
        bottleneck: r, or the number l of prefix vectors.
        out_width: width of h.
        form: name of f; see `build_activation`.
        groups: G; 1 for hidden states, the number of heads for heads.
        bias: whether W_down and W_up have biases.
        dropout: rate after f (paper's code, petl_factory.py `Adapter_Layer`).
        input_dropout: rate on x (where LoRA has its dropout).
        layer_norm: `none`, `input` (LayerNorm before W_down) or `output` (LayerNorm on Δh).
        init: `lora`: W_down Kaiming-uniform with a = √5, W_up zero, biases zero, so that Δh is 0 at the start;
            `bert`: both N(0, 0.02), biases zero (paper, appendix A; petl_factory.py `init_lora_weights`,
            `init_bert_weights`).
        generator: computes (`down`, `up`) during training, instead of own weights, until `fold` replaces it.
    """

    def __init__(
        self,
        in_width: int,
        bottleneck: int,
        out_width: int,
        form: str,
        *,
        groups: int = 1,
        bias: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        layer_norm: str = "none",
        init: str = "lora",
        generator: PrefixMLP | None = None,
    ) -> None:
        super().__init__()
        self.in_width, self.bottleneck, self.out_width, self.groups = in_width, bottleneck, out_width, groups
        self.f = build_activation(form)
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(input_dropout)
        self.norm_in = nn.LayerNorm(in_width) if layer_norm == "input" else nn.Identity()
        self.norm_out = nn.LayerNorm(out_width) if layer_norm == "output" else nn.Identity()
        self.generator = generator
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        if generator is None:
            self.down = nn.Parameter(torch.empty(groups, bottleneck, in_width))
            self.up = nn.Parameter(torch.empty(groups, out_width, bottleneck))
            self._initialise(init)
        self.down_bias = nn.Parameter(torch.zeros(groups, 1, bottleneck)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(groups, 1, out_width)) if bias else None

    def _initialise(self, init: str) -> None:
        assert self.down is not None and self.up is not None
        if self.down.is_meta:  # it is counted, and has no values
            return
        if init == "bert":
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)
        else:
            # Kaiming-uniform with a = √5 is U(-1/√in, 1/√in). torch's function would take another axis for fan-in.
            bound = 1 / math.sqrt(self.in_width)
            nn.init.uniform_(self.down, -bound, bound)
            nn.init.zeros_(self.up)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return (`down`, `up`), of shapes (G, r, in) and (G, out, r), computed by the generator if there is one."""
        if self.generator is not None:
            made: tuple[Tensor, Tensor] = self.generator()
            return made
        assert self.down is not None and self.up is not None
        return self.down, self.up

    def forward(self, x: Tensor) -> Tensor:
        """Return Δh, whose last axis is `out`, in the dtype of x unless autocast says otherwise.

        Args:
            x: (..., in) for one group; (..., G or 1, T, in) for several.
        """
        down, up = self.weights()
        # The backbone may be bfloat16 and the trained weights float32: multiply in the backbone's dtype.
        down, up = down.to(x.dtype), up.to(x.dtype)
        down_bias: Tensor | None = self.down_bias
        if torch.compiler.is_compiling() and not isinstance(self.f, nn.Softmax):
            down, up, down_bias = _align(down, up, down_bias)
        x = self.input_dropout(_apply_norm(self.norm_in, x))
        z = self.dropout(self.f(_apply_grouped_linear(x, down, down_bias)))
        return _apply_norm(self.norm_out, _apply_grouped_linear(z, up, self.up_bias))

    def formula(self) -> int:
        """Return r (in + out) for each group: W_down and W_up, without biases (He et al. 2022, appendix B)."""
        return self.bottleneck * self.groups * (self.in_width + self.out_width)

    @torch.no_grad()
    def fold(self) -> None:
        """Replace the generator by the weights that it computes. Δh does not change; the generator is discarded."""
        if self.generator is None:
            return
        down, up = self.weights()
        self.generator = None
        self.down = nn.Parameter(down.detach().clone())
        self.up = nn.Parameter(up.detach().clone())

    def extra_repr(self) -> str:
        return f"{self.in_width} -> {self.bottleneck} -> {self.out_width}, groups={self.groups}"


class Constant(nn.Module):
    """Return Δh = l, a trained vector for each of G groups that does not depend on x.

    With h ∘ (1 + Δh) it is IA3's rescaling (Liu et al. 2022), with h + Δh a bias.

    Args:
        width: width of h.
        groups: G; 1 for hidden states, the number of heads for heads.
        init: `lora`: zero; `bert`: N(0, 0.02).
    """

    generator = None  # there is nothing to fold

    def __init__(self, width: int, *, groups: int = 1, init: str = "lora") -> None:
        super().__init__()
        self.in_width = self.out_width = width
        self.vector = nn.Parameter(torch.zeros(groups, 1, width))
        if init == "bert":
            nn.init.normal_(self.vector, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return Δh as (width,), or (G, 1, width), the same for every position. x: (..., width), is not read."""
        return self.vector[0, 0] if self.vector.shape[0] == 1 else self.vector

    def formula(self) -> int:
        """Return one for each element of h."""
        return self.vector.numel()

    def extra_repr(self) -> str:
        return f"{self.out_width}, groups={self.vector.shape[0]}"


class OwnForm(nn.Module):
    """Compute Δh by a module of the user's own, or by one for each of G groups.

    Args:
        form: maps (..., in) to (..., out), each position by itself; with several groups (..., G or 1, T, in) to
            (..., G, T, out), or it is a ModuleList with a module for each group.
        in_width, out_width: widths of the input of f, and of h.
        groups: G; 1 for hidden states, the number of heads for heads.
        input_dropout, layer_norm: as for `Bottleneck`.
    """

    generator = None  # there is nothing to fold

    def __init__(
        self,
        form: nn.Module,
        in_width: int,
        out_width: int,
        *,
        groups: int = 1,
        input_dropout: float = 0.0,
        layer_norm: str = "none",
    ) -> None:
        super().__init__()
        self.form, self.in_width, self.out_width, self.groups = form, in_width, out_width, groups
        self.input_dropout = nn.Dropout(input_dropout)
        self.norm_in = nn.LayerNorm(in_width) if layer_norm == "input" else nn.Identity()
        self.norm_out = nn.LayerNorm(out_width) if layer_norm == "output" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return Δh, in the dtype of x. x: as for `Bottleneck.forward`.

        Raises:
            UserError: the form returns no tensor, or another width than that of h.
        """
        seen = self.input_dropout(_apply_norm(self.norm_in, x))
        dtype = next((tensor.dtype for tensor in self.form.parameters()), x.dtype)
        seen = seen.to(dtype)  # a bfloat16 backbone, and weights of the user's own in float32
        if isinstance(self.form, nn.ModuleList):
            seen = seen.expand(*seen.shape[:-3], self.groups, *seen.shape[-2:])
            parts = [one(part) for one, part in zip(self.form, seen.unbind(-3), strict=True)]
            delta = torch.stack(parts, dim=-3)
        else:
            delta = self.form(seen)
        if not isinstance(delta, Tensor) or delta.shape[-1] != self.out_width:
            returned = f"vectors of {delta.shape[-1]} elements" if isinstance(delta, Tensor) else type(delta).__name__
            raise UserError(f"{self._name} returns {returned}; it must return Δh, whose vectors have {self.out_width}.")
        return _apply_norm(self.norm_out, delta.to(x.dtype))

    @property
    def _name(self) -> str:
        return type(self.form[0] if isinstance(self.form, nn.ModuleList) else self.form).__name__

    def formula(self) -> int:
        """Return the number of trained parameters: the paper has no formula for such a form."""
        return sum(parameter.numel() for parameter in self.form.parameters() if parameter.requires_grad)

    def extra_repr(self) -> str:
        return f"{self.in_width} -> {self.out_width}, groups={self.groups}"


FunctionalForm = Bottleneck | Constant | OwnForm


def _align(down: Tensor, up: Tensor, down_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad the weights along r with zeros to a multiple of 8, for compiled code.

    Δh stays the same unless f mixes the elements of the bottleneck. A GPU multiplies bfloat16 rows of 204 bytes (r =
    102) in slow kernels, because the rows do not begin at multiples of 16. Only in compiled code does the padding need
    no kernels of its own.
    """
    more = -down.shape[1] % 8
    if more == 0:
        return down, up, down_bias
    bias = None if down_bias is None else F.pad(down_bias, (0, more))
    return F.pad(down, (0, 0, 0, more)), F.pad(up, (0, more)), bias


def _apply_grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., G, T, in) · weight (G, out, in)^T + bias (G, 1, out) -> (..., G, T, out); one group: (..., in)."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if weight.shape[0] == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0, 0])
    y = x @ weight.transpose(-1, -2)
    return y if bias is None else y + bias


def _apply_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply `norm` to x (..., d). A LayerNorm computes in the dtype of its weights; the result has the dtype of x."""
    if not isinstance(norm, nn.LayerNorm):
        return x
    normed: Tensor = norm(x.to(norm.weight.dtype)).to(x.dtype)
    return normed
