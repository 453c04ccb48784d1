"""Where Δh stands among dropout, residual and norm, bit-equal in training mode to whole layers written out by hand.

The order is the paper's code's (jxhe/unify-parameter-efficient-tuning at 3222ce2, modeling_bart.py 369-378 and 460-479,
modeling_mbart.py 375-382 and 456-471, modeling_roberta.py 399-433 and 532-543), and on the families that the paper
does not have the same: behind W_o but before dropout for attention, behind dropout for the FFN. Each layer runs twice
under one seed, as transformers' class with our hooks and as plain functions of its weights, so that every dropout has
to draw the same numbers at the same place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peftbench.backbones.sites import Layer, find_sites
from peftbench.config import schema
from peftbench.modification.attach import attach
from peftbench.modification.functional_form import Bottleneck
from tests.families import batch, build, dropout, modification, shake

HIDDEN, ATTENTION, ACTIVATION = 0.3, 0.2, 0.1  # three dropout rates, so that none can stand for another
RATES = {  # T5 has one rate for all, Llama and its kin drop attention weights only
    **dict.fromkeys(
        ("bart", "mbart", "roberta", "bert", "electra", "distilbert", "gpt2"), (HIDDEN, ATTENTION, ACTIVATION)
    ),
    **dict.fromkeys(("t5", "t5_gated"), (HIDDEN, HIDDEN, HIDDEN)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), (0.0, ATTENTION, 0.0)),
}

METHODS: dict[str, dict[str, schema.Modification]] = {
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
    "ffn_and_its_weights": {
        "": modification("relu", "ffn", "sequential", bias=True),
        "mix.weights.": modification("identity", "ffn_weights", "parallel", dropout=0),
    },
    "layer_and_sublayers": {
        "": modification("relu", "layer", "sequential", bias=True),
        "mix.houlsby.": modification("relu", "attention_ffn", "sequential", bias=True),
        "mix.weights.": modification("identity", "ffn_weights", "parallel", dropout=0),
    },
}

Changes = dict[str, tuple[Bottleneck, float]]


class Naive:
    """The functions of one layer, from its own weights. `changes` are its modifications by place, each with its s."""

    def __init__(self, layer: nn.Module, width: int, rates: tuple[float, float, float], changes: Changes) -> None:
        self.layer, self.width, self.changes = layer, width, changes  # width: of a head
        self.hidden, self.attention, self.activation = rates

    def linear(self, x: Tensor, path: str) -> Tensor:
        """W x + b of the layer's Linear at `path`, with its LoRA if it has one."""
        module = self.layer.get_submodule(path)
        if isinstance(module, Conv1D):
            h = torch.addmm(module.bias, x.flatten(0, 1), module.weight).unflatten(0, x.shape[:2])
        else:
            h = F.linear(x, module.weight, module.bias)
        return self.changed(path, h, x)

    def norm(self, x: Tensor, path: str) -> Tensor:
        module = self.layer.get_submodule(path)
        if not isinstance(module, nn.LayerNorm):  # the root mean square's, without mean and bias
            return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))
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
        in_attention = any(part in place.lower() for part in ("attn", "attention"))
        z = F.dropout(z, 0.0 if isinstance(c.f, nn.Identity) else (self.attention if in_attention else self.hidden))
        return h + F.linear(z, c.up[0], None if c.up_bias is None else c.up_bias[0, 0]) * s

    def attend(
        self, x: Tensor, memory: Tensor, mask: Tensor, name: str, query: str, key: str, value: str, output: str
    ) -> Tensor:
        """One attention up to and with W_o."""
        q, k, v = self.linear(x, query), self.linear(memory, key), self.linear(memory, value)
        return self.combine(x, self.split(q), self.split(k), self.split(v), mask, name, output)

    def split(self, states: Tensor) -> Tensor:
        """(B, T, N_h d_h) -> (B, N_h, T, d_h)."""
        return states.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def combine(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        name: str,
        output: str,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Heads to the output of W_o, as transformers calls SDPA, so that its dropout draws the same numbers.

        `bias` is T5's, of positions; its queries are not scaled.
        """
        if f"{name}.prefix" in self.changes:
            down, up = self.changes[f"{name}.prefix"][0].weights()  # P_k (N_h, l, d_h) and P_v^T (N_h, d_h, l)
            k = torch.cat([down.expand(len(k), -1, -1, -1), k], dim=2)
            v = torch.cat([up.transpose(1, 2).expand(len(v), -1, -1, -1), v], dim=2)
            mask = F.pad(mask, (down.shape[1], 0), value=True)
            bias = None if bias is None else F.pad(bias, (down.shape[1], 0))
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
        scale = q.shape[-1] ** -0.5 if bias is None else 1.0
        seen = mask if bias is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self.attention, scale=scale)
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
        h = self.linear(F.dropout(F.gelu(self.linear(x, "fc1")), self.activation), "fc2")
        return self.ffn_output(F.dropout(h, self.hidden), x)

    def ffn_output(self, h: Tensor, x: Tensor) -> Tensor:
        """h + Δh, of x or of h."""
        return self.changed("ffn.parallel", self.changed("ffn.sequential", h, h), x)

    def add_before_norm(self, x: Tensor, h: Tensor) -> Tensor:
        """The end of a pre-norm layer, x + h; Pfeiffer's f reads that sum (modeling_mbart.py 477-485)."""
        return x + self.changed("layer.sequential", h, x + h)


def bart_encoder(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    h = F.dropout(naive.bart_attention(x, x, mask, "self_attn"), naive.hidden)
    x = naive.norm(x + h, "self_attn_layer_norm")
    out = naive.norm(x + naive.bart_ffn(x), "final_layer_norm")
    return naive.changed("layer.sequential", out, out)


def bart_decoder(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    h = F.dropout(naive.bart_attention(x, x, mask, "self_attn"), naive.hidden)
    x = naive.norm(x + h, "self_attn_layer_norm")
    h = F.dropout(naive.bart_attention(x, memory, memory_mask, "encoder_attn"), naive.hidden)
    x = naive.norm(x + h, "encoder_attn_layer_norm")
    out = naive.norm(x + naive.bart_ffn(x), "final_layer_norm")
    return naive.changed("layer.sequential", out, out)


def mbart_encoder(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    """Norms stand before the sub-layers. x of the parallel FFN adapter is the normed input of fc1, the sub-layer's own;
    the released code reads the residual stream there (modeling_mbart.py 456-462)."""
    normed = naive.norm(x, "self_attn_layer_norm")
    x = x + F.dropout(naive.bart_attention(normed, normed, mask, "self_attn"), naive.hidden)
    return naive.add_before_norm(x, naive.bart_ffn(naive.norm(x, "final_layer_norm")))


def mbart_decoder(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    normed = naive.norm(x, "self_attn_layer_norm")
    x = x + F.dropout(naive.bart_attention(normed, normed, mask, "self_attn"), naive.hidden)
    normed = naive.norm(x, "encoder_attn_layer_norm")
    x = x + F.dropout(naive.bart_attention(normed, memory, memory_mask, "encoder_attn"), naive.hidden)
    return naive.add_before_norm(x, naive.bart_ffn(naive.norm(x, "final_layer_norm")))


def roberta(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    parts = (f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense"))
    h = F.dropout(naive.attend(x, x, mask, "attention.self", *parts), naive.hidden)
    x = naive.norm(h + x, "attention.output.LayerNorm")
    h = naive.linear(F.gelu(naive.linear(x, "intermediate.dense")), "output.dense")
    out = naive.norm(naive.ffn_output(F.dropout(h, naive.hidden), x) + x, "output.LayerNorm")
    return naive.changed("layer.sequential", out, out)


def distilbert(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    """Without a dropout behind W_o."""
    parts = (f"attention.{part}_lin" for part in ("q", "k", "v", "out"))
    x = naive.norm(naive.attend(x, x, mask, "attention", *parts) + x, "sa_layer_norm")
    h = naive.linear(F.gelu(naive.linear(x, "ffn.lin1")), "ffn.lin2")
    out = naive.norm(naive.ffn_output(F.dropout(h, naive.hidden), x) + x, "output_layer_norm")
    return naive.changed("layer.sequential", out, out)


def t5_sublayer(naive: Naive, x: Tensor, memory: Tensor | None, mask: Tensor, name: str) -> Tensor:
    """The residual with a normed attention; positions have a bias in the self-attention of the first layer."""
    normed = naive.norm(x, f"{name.rpartition('.')[0]}.layer_norm")
    q = naive.split(naive.linear(normed, f"{name}.q"))
    k, v = (naive.split(naive.linear(normed if memory is None else memory, f"{name}.{part}")) for part in "kv")
    bias = torch.zeros(1, q.shape[1], q.shape[2], k.shape[2])
    if memory is None:
        bias = naive.layer.get_submodule(name).compute_bias(q.shape[2], k.shape[2])
    return x + F.dropout(naive.combine(normed, q, k, v, mask, name, f"{name}.o", bias), naive.hidden)


def t5(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    x = t5_sublayer(naive, x, None, mask, "layer.0.SelfAttention")
    if len(naive.layer.layer) == 3:
        x = t5_sublayer(naive, x, memory, memory_mask, "layer.1.EncDecAttention")
    last = f"layer.{len(naive.layer.layer) - 1}"
    normed, ffn = naive.norm(x, f"{last}.layer_norm"), f"{last}.DenseReluDense"
    if hasattr(naive.layer.get_submodule(ffn), "wi"):
        z = torch.relu(naive.linear(normed, f"{ffn}.wi"))
    else:
        z = gelu_by_tanh(naive.linear(normed, f"{ffn}.wi_0")) * naive.linear(normed, f"{ffn}.wi_1")
    h = F.dropout(naive.linear(F.dropout(z, naive.activation), f"{ffn}.wo"), naive.hidden)
    return naive.add_before_norm(x, naive.ffn_output(h, normed))


def gelu_by_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation (Hendrycks and Gimpel 2016), in the order of its operations: torch's rounds otherwise."""
    return 0.5 * x * (1.0 + torch.tanh((2.0 / math.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


def gpt2(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    normed = naive.norm(x, "ln_1")
    parts = zip(("query", "key", "value"), naive.linear(normed, "attn.c_attn").chunk(3, dim=-1), strict=True)
    q, k, v = (naive.split(naive.changed(f"attn.c_attn.{name}", part, normed)) for name, part in parts)
    x = x + F.dropout(naive.combine(normed, q, k, v, mask, "attn", "attn.c_proj"), naive.hidden)
    normed = naive.norm(x, "ln_2")
    h = naive.linear(gelu_by_tanh(naive.linear(normed, "mlp.c_fc")), "mlp.c_proj")
    return naive.add_before_norm(x, naive.ffn_output(F.dropout(h, naive.hidden), normed))


def llama(naive: Naive, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
    """Rotary positions turn queries and keys before a prefix joins them; no dropout behind the sub-layers. Qwen3 norms
    queries and keys first."""
    cos, sin = rotary(x.shape[1], naive.width)

    def turned(states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat([-second, first], dim=-1) * sin

    normed = naive.norm(x, "input_layernorm")
    q, k, v = (naive.split(naive.linear(normed, f"self_attn.{part}_proj")) for part in "qkv")
    if hasattr(naive.layer.self_attn, "q_norm"):
        q, k = naive.norm(q, "self_attn.q_norm"), naive.norm(k, "self_attn.k_norm")
    x = x + naive.combine(normed, turned(q), turned(k), v, mask, "self_attn", "self_attn.o_proj")
    normed = naive.norm(x, "post_attention_layernorm")
    z = F.silu(naive.linear(normed, "mlp.gate_proj")) * naive.linear(normed, "mlp.up_proj")
    return naive.add_before_norm(x, naive.ffn_output(naive.linear(z, "mlp.down_proj"), normed))


def rotary(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x 10000^(-2i/d), (T, d), each half of a head alike."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


NaiveLayer = Callable[[Naive, Tensor, Tensor, Tensor, Tensor], Tensor]
LAYERS: dict[str, tuple[str, str, NaiveLayer]] = {  # name: family, stack, the layer written out
    "bart_encoder": ("bart", "encoder", bart_encoder),
    "bart_decoder": ("bart", "decoder", bart_decoder),
    "mbart_encoder": ("mbart", "encoder", mbart_encoder),
    "mbart_decoder": ("mbart", "decoder", mbart_decoder),
    "roberta": ("roberta", "encoder", roberta),
    "bert": ("bert", "encoder", roberta),
    "electra": ("electra", "encoder", roberta),
    "distilbert": ("distilbert", "encoder", distilbert),
    "t5_encoder": ("t5", "encoder", t5),
    "t5_decoder": ("t5", "decoder", t5),
    "t5_gated_decoder": ("t5_gated", "decoder", t5),
    "gpt2": ("gpt2", "decoder", gpt2),
    "llama": ("llama", "decoder", llama),
    "mistral": ("mistral", "decoder", llama),
    "qwen2": ("qwen2", "decoder", llama),
    "qwen3": ("qwen3", "decoder", llama),
}


def changes(layer: Layer, modifications: dict[str, schema.Modification]) -> Changes:
    """The layer's modifications under the names that `Naive` gives their places."""
    names = {module: name for name, module in layer.module.named_modules()}
    behind_ffn = layer.ffn.dropout or getattr(layer.ffn.second, "sublayer_dropout", layer.ffn.second)
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
                for part in ("query", "value"):
                    owner = getattr(attention, part)
                    if part in attention.parts:
                        owner = owner.get_submodule(part)
                    owners[names[owner]] = owner
        if representation in ("ffn", "attention_ffn"):
            owners[f"ffn.{insertion}"] = behind_ffn
        elif representation == "layer":
            owners["layer.sequential"] = layer.norm or behind_ffn
        elif representation == "ffn_weights":
            owners |= {names[linear]: linear for linear in (*layer.ffn.first.values(), layer.ffn.second)}
        for place, owner in owners.items():
            found[place] = (owner.get_submodule(f"{key}.function"), m.composition_function.scale)
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_training_equals_the_papers_order_to_the_bit(name: str, method: str) -> None:
    """One layer with every dropout on, against the same layer written out, under one seed."""
    family, stack, written_out = LAYERS[name]
    model = build(family, **dropout(family, *RATES[family]))
    attach(model, METHODS[method])
    shake(model)
    model.train()
    layer = next(layer for layer in find_sites(model).layers if layer.stack == stack)

    generator = torch.Generator().manual_seed(4)
    x, memory = torch.randn(2, 7, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    memory_mask = torch.ones(2, 1, 7, 5, dtype=torch.bool)
    more: dict[str, object] = {}
    if stack == "decoder":
        mask = mask.tril()
    else:
        mask[1, ..., 4:] = False
    if len(layer.attentions) == 2:
        memory_mask[1, ..., 3:] = False
        more = {"encoder_hidden_states": memory, "encoder_attention_mask": memory_mask}
    width = layer.attentions[0].head_width
    if written_out is llama:
        more = {"position_embeddings": [each[None] for each in rotary(7, width)]}

    torch.manual_seed(5)
    ours = layer.module(x, attention_mask=mask, **more)
    ours = ours[0] if isinstance(ours, tuple) else ours  # T5 hands its position bias on
    torch.manual_seed(5)
    found = changes(layer, METHODS[method])
    naive = Naive(layer.module, width, RATES[family], found)
    assert torch.equal(ours, written_out(naive, x, mask, memory, memory_mask))
    for place in found:  # each modification matters, so that equality means something
        others = Naive(layer.module, width, RATES[family], {p: c for p, c in found.items() if p != place})
        torch.manual_seed(5)
        assert not torch.allclose(ours, written_out(others, x, mask, memory, memory_mask), atol=1e-3)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_owned_dropout_draws_as_the_layers_own(family: str) -> None:
    """Functional dropout turned into modules leaves a whole model bit-equal, in training and in evaluation."""
    rates = dropout(family, *RATES[family])
    bare, model = build(family, **rates), build(family, **rates)
    attach(model, {"": modification("identity", "key", "parallel", dropout=0)})
    assert all(layer.module.dropout == 0.0 for layer in find_sites(model).layers)
    for train in (False, True):
        outputs = []
        for each in (bare, model):
            each.train(train)
            torch.manual_seed(6)
            outputs.append(each(**batch(family)).logits)
        assert torch.equal(*outputs)
