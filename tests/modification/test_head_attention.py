"""Prefixes and other head modifications against equations 5 and 7 of the paper written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftbench.backbones.sites import Attention, find_sites
from peftbench.modification.attach import attach
from peftbench.modification.head_attention import ATTENTION_NAME, HEADS, Prefix
from tests.families import (
    CONTINUING,
    DECODERS,
    FAMILIES,
    MORE_FAMILIES,
    WRITING,
    batch,
    build,
    inputs,
    modification,
    shake,
)


def attention_calls(model: PreTrainedModel, inputs: dict[str, Tensor], *, bf16: bool = False) -> list[dict[str, Any]]:
    """Every call of the registered attention function in one forward pass, with its inputs and its output."""
    import peftbench.modification.head_attention as module

    calls: list[dict[str, Any]] = []
    original = module.attend_modified

    def spy(
        attention: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        out = original(attention, q, k, v, mask, **kwargs)
        calls.append({"module": attention, "q": q, "k": k, "v": v, "mask": mask, "out": out[0], **kwargs})
        return out

    module.AttentionInterface.register(module.ATTENTION_NAME, spy)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            model(**inputs)
    finally:
        module.AttentionInterface.register(module.ATTENTION_NAME, original)
    return calls


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling + bias + mask) v and the exponentials' sum, (B, N, Q, d) and (B, N, Q, 1), in float64.

    Grouped keys and values serve several heads each.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[-3], dim=-3) for x in (k, v))
    logits = q.double() @ k.double().transpose(-1, -2) * scaling
    if bias is not None:
        logits = logits + bias.double()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    mass = logits.exp().sum(-1, keepdim=True)
    return logits.softmax(-1) @ v.double(), mass


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("lengths", [(9, 6), (7, 7)], ids=["padded", "unpadded"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_concatenated_prefix_is_the_gated_composition(
    device: str, family: str, lengths: tuple[int, ...], bf16: bool
) -> None:
    """Equation 5 (what runs) equals equation 7, (1-λ) Attn(q, K, V) + λ Attn(q, P_k, P_v), in every attention.

    In bf16 from the same rounded inputs. Its 8 bits round the attention weights, which sum to 1, and the output: twice
    2^-8 of the largest value.
    """
    model = build(family).to(device)
    attach(model, {"": modification("softmax", "heads", "parallel", "gated", 4, init="bert")})
    shake(model, 1.0)
    inputs = {name: tensor.to(device) for name, tensor in batch(family, lengths).items()}
    calls = attention_calls(model, inputs, bf16=bf16)
    assert len(calls) == sum(len(layer.attentions) for layer in find_sites(model).layers)
    for call in calls:
        prefix = getattr(call["module"], HEADS)["modification"]
        assert isinstance(prefix, Prefix)
        down, up = (weight.detach().to(call["v"].dtype) for weight in prefix.function.weights())
        scaling = float(call["scaling"])
        context, context_mass = plain_attention(
            call["q"],
            call["k"],
            call["v"],
            call["mask"],
            scaling,
            call.get("position_bias"),
        )
        delta, prefix_mass = plain_attention(call["q"], down, up.transpose(-1, -2), None, scaling)
        gate = prefix_mass / (prefix_mass + context_mass)
        expected = (1 - gate) * context + gate * delta
        difference = (call["out"].transpose(1, 2).double() - expected).abs().max()
        largest = max(float(call["v"].abs().max()), float(up.abs().max()))
        assert difference < (2 * 2**-8 * largest if bf16 else 1e-5)
        assert (call["out"].dtype is torch.bfloat16) is bf16
        assert 0.01 < gate.mean() < 0.99  # both parts matter


@pytest.mark.parametrize("form", ["softmax", "relu", "identity"])
@pytest.mark.parametrize("family", ["bart", "roberta", "distilbert", "t5", "llama", "qwen2", "gpt2"])
def test_added_head_modification(family: str, form: str) -> None:
    """h + f(q W_down) W_up for each head, q scaled: "-gating" of table 4 and the multi-head parallel adapter."""
    model = build(family)
    attach(model, {"": modification(form, "heads", "parallel", "add", 4, init="bert")})
    shake(model, 1.0)
    for call in attention_calls(model, batch(family)):
        function = getattr(call["module"], HEADS)["modification"].function
        scaling = float(call["scaling"])
        bias = call.get("position_bias")
        context, _ = plain_attention(call["q"], call["k"], call["v"], call["mask"], scaling, bias)
        delta = torch.zeros_like(context)
        for head in range(delta.shape[1]):
            z = call["q"][:, head].double() * scaling @ function.down[head].double().T
            z = {"softmax": z.softmax(-1), "relu": z.relu(), "identity": z}[form]
            delta[:, head] = z @ function.up[head].double().T
        difference = (call["out"].transpose(1, 2).double() - context - delta).abs().max()
        assert difference < 1e-5
        assert delta.abs().max() > 0.1


def test_head_modification_of_table_1_reads_the_attention_input() -> None:
    """head_input=hidden: Δh of head i is ReLU(x W_down,i) W_up,i with x the attention's input, (d x r) weights."""
    model = build("roberta")
    attach(model, {"": modification("relu", "heads", "parallel", "add", 4, init="bert", head_input="hidden")})
    shake(model, 1.0)
    seen: list[Tensor] = []
    attention: Attention = find_sites(model).layers[0].attentions[0]
    handle = attention.query.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    call = attention_calls(model, batch("roberta"))[0]
    handle.remove()
    function = getattr(attention.module, HEADS)["modification"].function
    assert function.down.shape == (4, 4, 16) and function.up.shape == (4, 4, 4)
    context, _ = plain_attention(call["q"], call["k"], call["v"], call["mask"], float(call["scaling"]))
    for head in range(4):
        delta = F.relu(seen[0] @ function.down[head].T) @ function.up[head].T
        out = call["out"][:, :, head]
        assert (out - context[:, head] - delta).abs().max() < 1e-5


def test_sequential_head_modification_reads_the_heads() -> None:
    """h + f(h W_down) W_up for each head's output h."""
    model = build("bart")
    attach(model, {"": modification("relu", "heads", "sequential", "add", 4, init="bert")})
    shake(model, 1.0)
    for call in attention_calls(model, batch("bart")):
        function = getattr(call["module"], HEADS)["modification"].function
        h, _ = plain_attention(call["q"], call["k"], call["v"], call["mask"], float(call["scaling"]))
        for head in range(4):
            expected = h[:, head] + F.relu(h[:, head] @ function.down[head].double().T) @ function.up[head].double().T
            assert (call["out"][:, :, head] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_each_attention_module_calls_our_function_once(family: str) -> None:
    """The contract with transformers: a version that stops calling registered functions is caught by its family."""
    model = build(family)
    attach(model, {"": modification("softmax", "heads", "parallel", "gated", init="bert")})
    modules = [call["module"] for call in attention_calls(model, batch(family))]
    expected = [attention.module for layer in find_sites(model).layers for attention in layer.attentions]
    assert len(modules) == len(expected) and set(modules) == set(expected)


CAUSAL = (*WRITING, *DECODERS, "bart_classifier", "t5_classifier")  # with a decoder
WINDOWS = {"mistral": [4, 4], "qwen2": [None, 4]}  # of the tiny models' two layers


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("lengths", [(9, 6), (9, 9)], ids=["padded", "unpadded"])
def test_masks_say_what_each_query_sees(family: str, lengths: tuple[int, int]) -> None:
    """Keys that are no padding; in a decoder those up to the query, within the window. None means all that causality
    lets through, and never stands where a prefix needs it written out."""
    model = build(family)
    attach(model, {"": modification("softmax", "heads", "parallel", "gated", init="bert")})
    given = batch(family, lengths)
    modules = {a.module: (layer, a) for layer in find_sites(model).layers for a in layer.attentions}
    for call in attention_calls(model, given):
        layer, attention = modules[call["module"]]
        queries, keys = call["q"].shape[2], call["k"].shape[2]
        expected = torch.ones(2, 1, queries, keys, dtype=torch.bool)
        if layer.stack == "encoder" or attention.kind == "cross" or family in DECODERS:
            expected &= given["attention_mask"].bool()[:, None, None]
        if layer.stack == "decoder" and attention.kind == "self":
            distance = torch.arange(queries)[:, None] - torch.arange(keys)
            expected &= (distance >= 0) & (distance < (WINDOWS.get(family, [None] * 2)[layer.index] or keys))
            assert call["mask"] is not None
        assert expected.all() if call["mask"] is None else torch.equal(call["mask"].expand_as(expected), expected)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_trap_1_a_name_without_a_mask_function_sees_padding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers passes no mask to an attention whose name has no mask function, and says nothing: were ours not
    registered, padding would be attended to, in a decoder alone that before the text."""
    model = build(family)
    attach(model, {"": modification("relu", "heads", "parallel", "add", init="bert")})
    given = inputs(family) if family in CONTINUING else batch(family)
    padded = attention_calls(model, given)
    assert not all(call["mask"] is None or call["mask"].all() for call in padded)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, ATTENTION_NAME)
    unmasked = attention_calls(model, given)
    assert all(call["mask"] is None for call in unmasked)
    assert (padded[-1]["out"] - unmasked[-1]["out"]).abs().max() > 1e-3


@pytest.mark.parametrize("family", [family for family in (*FAMILIES, *MORE_FAMILIES) if family in CAUSAL])
def test_trap_2_a_causal_mask_left_to_the_kernel_drops_keys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves an unpadded batch's causal mask out, and crops the keys to the queries' number: the last
    tokens would go, as many as the prefix is long. Ours writes the mask out, and the function refuses to go without."""
    model, unpadded = build(family), batch(family, (3, 3))  # shorter than Mistral's window, which needs a mask
    attach(model, {"": modification("softmax", "heads", "parallel", "gated", 4, init="bert")})
    shake(model, 1.0)
    causal = [call for call in attention_calls(model, unpadded) if call["module"].is_causal]
    assert causal and all(call["mask"] is not None for call in causal)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, ATTENTION_NAME, sdpa_mask)
    with pytest.raises(RuntimeError, match="is causal and has a prefix but no mask"):
        model(**unpadded)
    call = causal[-1]
    prefix = getattr(call["module"], HEADS)["modification"]
    key, value, _ = prefix(call["k"], call["v"], None)
    more = {name: call[name] for name in ("scaling", "position_bias") if name in call}
    if "position_bias" in more:
        more["position_bias"] = F.pad(more["position_bias"], (4, 0))
    cropped, _ = sdpa_attention_forward(call["module"], call["q"], key, value, None, **more)
    assert (cropped - call["out"]).abs().max() > 0.1  # what the guard keeps away


def test_other_models_keep_their_attention() -> None:
    """Attaching to one model leaves another of the same class in the same process alone."""
    bare, other = build("bart"), build("bart")
    attach(other, {"": modification("softmax", "heads", "parallel", "gated", init="bert")})
    assert bare.config._attn_implementation == "sdpa"
    with torch.no_grad():
        before = build("bart")(**batch("bart")).logits
        assert torch.equal(bare(**batch("bart")).logits, before)
