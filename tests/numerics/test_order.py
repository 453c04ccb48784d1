"""Where Δh stands among dropout, residual and norm, bit-equal in training mode to whole layers written out by hand.

The order is the paper's code's (jxhe/unify-parameter-efficient-tuning at 3222ce2, modeling_bart.py 369-378 and 460-479,
modeling_mbart.py 375-382 and 456-471, modeling_roberta.py 399-433 and 532-543). Each layer runs twice under one seed,
as transformers' class with our hooks and as plain functions of its weights, so that every dropout has to draw the same
numbers at the same place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftbench import config
from peftbench.modification.attach import attach
from peftbench.modification.functional_form import Bottleneck
from peftbench.sites import Layer, find_sites
from tests.families import batch, build, dropout, modification, shake

HIDDEN, ATTENTION, ACTIVATION = 0.3, 0.2, 0.1  # three dropout rates, so that none can stand for another
RATES = {family: dropout(family, HIDDEN, ATTENTION, ACTIVATION) for family in ("bart", "mbart", "roberta")}

METHODS: dict[str, dict[str, config.Modification]] = {
    "nothing": {},
    "ffn_parallel": {"": modification("relu", "ffn", "parallel", "scaled", scale=4.0, bias=True)},
    "ffn_sequential": {"": modification("relu", "ffn", "sequential", bias=True)},
    "attention_sequential": {"": modification("relu", "attention", "sequential", bias=True, layer_norm="input")},
    "attention_parallel": {"": modification("relu", "heads_joint", "parallel", bias=True, layer_norm="input")},
    "attention_of_table_1": {"": modification("relu", "attention", "parallel", bias=True)},
    "houlsby": {"": modification("relu", "attention_ffn", "sequential", bias=True)},
    "pfeiffer": {"": modification("relu", "layer", "sequential", bias=True)},
    "lora": {
        "": modification("identity", "query_value", "parallel", "scaled", scale=2.0, input_dropout=0.4, dropout=0)
    },
    "lora_ffn": {
        "": modification("identity", "ffn_weights", "parallel", "scaled", scale=4.0, input_dropout=0.4, dropout=0)
    },
    "mam": {
        "": modification("relu", "ffn", "parallel", "scaled", scale=4.0, bias=True),
        "mix.attention.": modification("softmax", "heads", "parallel", "gated", 2, prefix_mlp=8),
    },
    "attention_and_ffn": {
        "": modification("relu", "ffn", "parallel", bias=True),
        "mix.attention.": modification("relu", "attention", "sequential", bias=True),
    },
    "output_and_attention": {
        "": modification("relu", "attention", "sequential", bias=True),
        "mix.output.": modification("identity", "output", "parallel", dropout=0),
    },
}

Changes = dict[str, tuple[Bottleneck, float]]


class Naive:
    """The functions of one layer, from its own weights. `changes` are its modifications by place, each with its s."""

    def __init__(self, layer: nn.Module, heads: int, changes: Changes) -> None:
        self.layer, self.heads, self.changes = layer, heads, changes

    def linear(self, x: Tensor, path: str) -> Tensor:
        """W x + b of the layer's Linear at `path`, with its LoRA if it has one."""
        module = self.layer.get_submodule(path)
        return self.changed(path, F.linear(x, module.weight, module.bias), x)

    def norm(self, x: Tensor, path: str) -> Tensor:
        module = self.layer.get_submodule(path)
        return F.layer_norm(x, (x.shape[-1],), module.weight, module.bias, module.eps)

    def changed(self, place: str, h: Tensor, x: Tensor) -> Tensor:
        """h + s up(dropout(f(down(LN?(x))))) where `place` is modified, else h."""
        if place not in self.changes:
            return h
        c, s = self.changes[place]
        if isinstance(c.norm_in, nn.LayerNorm):
            x = F.layer_norm(x, (x.shape[-1],), c.norm_in.weight, c.norm_in.bias, c.norm_in.eps)
        x = F.dropout(x, c.input_dropout.p)
        z = F.linear(x, c.down[0], None if c.down_bias is None else c.down_bias[0, 0])
        z = z if isinstance(c.f, nn.Identity) else torch.relu(z)
        in_attention = any(part in place for part in ("attn", "attention"))
        z = F.dropout(z, 0.0 if isinstance(c.f, nn.Identity) else (ATTENTION if in_attention else HIDDEN))
        return h + F.linear(z, c.up[0], None if c.up_bias is None else c.up_bias[0, 0]) * s

    def attend(
        self, x: Tensor, memory: Tensor, mask: Tensor, name: str, query: str, key: str, value: str, output: str
    ) -> Tensor:
        """One attention up to and with W_o, as transformers calls SDPA, so that its dropout draws the same numbers."""

        def split(states: Tensor) -> Tensor:
            return states.view(*states.shape[:-1], self.heads, -1).transpose(1, 2)

        q, k, v = (
            split(self.linear(x, query)),
            split(self.linear(memory, key)),
            split(self.linear(memory, value)),
        )
        if f"{name}.prefix" in self.changes:
            down, up = self.changes[f"{name}.prefix"][0].weights()  # P_k (N_h, l, d_h) and P_v^T (N_h, d_h, l)
            k = torch.cat([down.expand(len(k), -1, -1, -1), k], dim=2)
            v = torch.cat([up.transpose(1, 2).expand(len(v), -1, -1, -1), v], dim=2)
            mask = F.pad(mask, (down.shape[1], 0), value=True)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=ATTENTION, scale=q.shape[-1] ** -0.5)
        joint = heads.transpose(1, 2).flatten(2)
        joint = self.changed(f"{name}.joint.parallel", joint, x)
        h = self.linear(joint, output)
        h = self.changed(f"{name}.sequential", h, h)
        return self.changed(f"{name}.parallel", h, x)

    def bart_attention(self, x: Tensor, memory: Tensor, mask: Tensor, name: str) -> Tensor:
        parts = (f"{name}.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj"))
        return self.attend(x, memory, mask, name, *parts)

    def bart_ffn(self, x: Tensor) -> Tensor:
        """dropout(fc2(dropout(gelu(fc1(x))))), then Δh, of x or of h."""
        h = self.linear(F.dropout(F.gelu(self.linear(x, "fc1")), ACTIVATION), "fc2")
        h = F.dropout(h, HIDDEN)
        return self.changed("ffn.parallel", self.changed("ffn.sequential", h, h), x)


def bart_encoder(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    h = F.dropout(naive.bart_attention(x, x, mask, "self_attn"), HIDDEN)
    x = naive.norm(x + h, "self_attn_layer_norm")
    out = naive.norm(x + naive.bart_ffn(x), "final_layer_norm")
    return naive.changed("layer.sequential", out, out)


def bart_decoder(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    h = F.dropout(naive.bart_attention(x, x, mask, "self_attn"), HIDDEN)
    x = naive.norm(x + h, "self_attn_layer_norm")
    h = F.dropout(naive.bart_attention(x, memory, memory_mask, "encoder_attn"), HIDDEN)
    x = naive.norm(x + h, "encoder_attn_layer_norm")
    out = naive.norm(x + naive.bart_ffn(x), "final_layer_norm")
    return naive.changed("layer.sequential", out, out)


def mbart_encoder(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    """Norms stand before the sub-layers. x of the parallel FFN adapter is the normed input of fc1, the sub-layer's own;
    the released code reads the residual stream there (modeling_mbart.py 456-462)."""
    normed = naive.norm(x, "self_attn_layer_norm")
    x = x + F.dropout(naive.bart_attention(normed, normed, mask, "self_attn"), HIDDEN)
    h = naive.bart_ffn(naive.norm(x, "final_layer_norm"))
    return x + naive.changed("layer.sequential", h, x + h)  # Pfeiffer: f reads x + h (modeling_mbart.py 477-485)


def roberta(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    parts = (f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense"))
    h = F.dropout(naive.attend(x, x, mask, "attention.self", *parts), HIDDEN)
    x = naive.norm(h + x, "attention.output.LayerNorm")
    h = F.dropout(naive.linear(F.gelu(naive.linear(x, "intermediate.dense")), "output.dense"), HIDDEN)
    h = naive.changed("ffn.parallel", naive.changed("ffn.sequential", h, h), x)
    out = naive.norm(h + x, "output.LayerNorm")
    return naive.changed("layer.sequential", out, out)


NaiveLayer = Callable[[Naive, Tensor, Tensor, Tensor, Tensor], Tensor]
LAYERS: dict[str, tuple[str, str, NaiveLayer]] = {  # name: family, stack, the layer written out
    "bart_encoder": ("bart", "encoder", bart_encoder),
    "bart_decoder": ("bart", "decoder", bart_decoder),
    "mbart_encoder": ("mbart", "encoder", mbart_encoder),
    "roberta": ("roberta", "encoder", roberta),
}


def changes(layer: Layer, modifications: dict[str, config.Modification]) -> Changes:
    """The layer's modifications under the names that `Naive` gives their places."""
    names = {module: name for name, module in layer.module.named_modules()}
    behind_ffn = layer.ffn.dropout or getattr(layer.ffn.second, "sublayer_dropout", None)
    found: Changes = {}
    for prefix, m in modifications.items():
        key = prefix.split(".")[1] if prefix else "modification"
        representation, insertion = m.modified_representation.name.name, m.insertion_form.name.name
        owners: dict[str, nn.Module] = {}
        for attention in layer.attentions:
            name = names[attention.module]
            if representation == "heads":
                owners[f"{name}.prefix"] = attention.module.get_submodule("head_modifications")
            elif representation == "heads_joint":
                owners[f"{name}.joint.{insertion}"] = attention.output
            elif representation in ("attention", "attention_ffn"):
                owners[f"{name}.{insertion}"] = attention.output
            elif representation == "output":
                owners[names[attention.output]] = attention.output
            elif representation == "query_value":
                owners |= {names[attention.query]: attention.query, names[attention.value]: attention.value}
        if representation in ("ffn", "attention_ffn"):
            owners[f"ffn.{insertion}"] = behind_ffn
        elif representation == "layer":
            owners["layer.sequential"] = layer.norm or behind_ffn
        elif representation == "ffn_weights":
            owners |= {names[linear]: linear for linear in (layer.ffn.source, layer.ffn.second)}
        for place, owner in owners.items():
            found[place] = (owner.get_submodule(f"{key}.function"), m.composition_function.scale)
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_training_equals_the_papers_order_to_the_bit(name: str, method: str) -> None:
    """One layer with every dropout on, against the same layer written out, under one seed."""
    family, stack, written_out = LAYERS[name]
    model = build(family, **RATES[family])
    attach(model, METHODS[method])
    shake(model)
    model.train()
    layer = next(layer for layer in find_sites(model).layers if layer.stack == stack)

    generator = torch.Generator().manual_seed(4)
    x, memory = torch.randn(2, 7, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    memory_mask = torch.ones(2, 1, 7, 5, dtype=torch.bool)
    if stack == "decoder":
        mask = mask.tril()
        memory_mask[1, ..., 3:] = False
        more = {"encoder_hidden_states": memory, "encoder_attention_mask": memory_mask}
    else:
        mask[1, ..., 4:] = False
        more = {}

    torch.manual_seed(5)
    ours = layer.module(x, attention_mask=mask, **more)
    torch.manual_seed(5)
    found = changes(layer, METHODS[method])
    naive = Naive(layer.module, layer.attentions[0].heads, found)
    assert torch.equal(ours, written_out(naive, x, mask, memory, memory_mask))
    for place in found:  # each modification matters, so that equality means something
        others = Naive(layer.module, naive.heads, {p: c for p, c in found.items() if p != place})
        torch.manual_seed(5)
        assert not torch.allclose(ours, written_out(others, x, mask, memory, memory_mask), atol=1e-3)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_owned_dropout_draws_as_the_layers_own(family: str) -> None:
    """Functional dropout turned into modules leaves a whole model bit-equal, in training and in evaluation."""
    bare, model = build(family, **RATES[family]), build(family, **RATES[family])
    attach(model, {"": modification("identity", "key", "parallel", dropout=0)})
    assert all(layer.module.dropout == 0.0 for layer in find_sites(model).layers)
    for train in (False, True):
        outputs = []
        for each in (bare, model):
            each.train(train)
            torch.manual_seed(6)
            outputs.append(each(**batch(family)).logits)
        assert torch.equal(*outputs)
