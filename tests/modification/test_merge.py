"""Merged weights against the modification beside them: the same logits, and a checkpoint for plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftbench.config import schema
from peftbench.modification.attach import attach
from peftbench.modification.edit import Edit
from peftbench.modification.merge import find_obstacles, merge, merge_temporarily
from peftbench.modification.state import fold, list_trained
from tests.families import FAMILIES, MORE_FAMILIES, PRESETS, batch, build, long_tail, modification, points, shake

MERGEABLE: dict[str, dict[str, schema.Modification]] = {
    "lora": PRESETS["lora"],
    "lora_ffn": PRESETS["lora_ffn"],
    "ia3": PRESETS["ia3"],
    "learned_scale": {"": modification("identity", "output", "parallel", "scaled", learned=True, bias=False)},
    "sequential": {"": modification("identity", "query_value", "sequential", "scaled", 3, scale=2.0)},
    "input": {"": modification("identity", "ffn_intermediate", "sequential", "add", 3)},
    "two": {
        "": modification("identity", "output", "parallel", "scaled", 3, scale=2.0),
        "mix.more.": modification("identity", "output", "sequential", "add", 2),
        "mix.heads.": modification("constant", "heads_joint", "sequential", "multiply"),
    },
}
ALL = long_tail([*FAMILIES, *MORE_FAMILIES], "bart", "roberta", "t5", "gpt2", "qwen3")


def attached(family: str, found: dict[str, schema.Modification], **more: Any) -> PreTrainedModel:
    model = build(family, **more)
    attach(model, found)
    shake(model)
    return model


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch(family)).logits
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("family", ALL)
def test_merged_computes_the_same_and_leaves_no_trace(family: str, name: str) -> None:
    """For a while: the same logits without a hook of the modification; then the very tensors and hooks."""
    model = attached(family, MERGEABLE[name])
    assert find_obstacles(model) == {}
    beside, bare = logits(model, family), logits(build(family), family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with merge_temporarily(model):
        assert close(logits(model, family), beside)
        assert not hooked(model)
    assert (beside - bare).abs().max() > 1e-2
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model, family), beside)


def hooked(model: nn.Module) -> list[Edit]:
    """The edits that any hook calls."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [h.__self__ for h in hooks if isinstance(getattr(h, "__self__", None), Edit)]


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_lora_is_w_plus_s_b_a(family: str) -> None:
    """W' = W + s W_up W_down, by the formula; and b is as it was."""
    model, bare = attached(family, MERGEABLE["lora_ffn"]), build(family)
    edits = {name: module for name, module in model.named_modules() if isinstance(module, Edit)}
    assert edits
    merge(model)
    for name, edit in edits.items():
        down, up = edit.function.weights()  # type: ignore[union-attr]  # a Bottleneck
        change = 4.0 * up[0] @ down[0]
        place = name.rpartition(".")[0]
        weight, old = model.get_submodule(place).weight, bare.get_submodule(place).weight
        assert isinstance(weight, Tensor) and isinstance(old, Tensor)
        assert (weight - old - (change.T if family == "gpt2" else change)).abs().max() < 1e-6
        assert torch.allclose(model.get_submodule(place).bias, bare.get_submodule(place).bias, atol=1e-7)


@pytest.mark.parametrize("name", ["lora", "lora_ffn", "ia3"])
@pytest.mark.parametrize("family", long_tail([*FAMILIES, *MORE_FAMILIES], "mbart", "t5_gated", "qwen2"))
def test_plain_transformers_loads_what_was_merged(family: str, name: str, tmp_path: Path) -> None:
    model = attached(family, MERGEABLE[name])
    expected = logits(model, family)
    merge(model)
    plain = list(build(family).state_dict())
    tensors = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={key: tensors[key] for key in plain})
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(loaded, family), expected)
    assert not [key for key, _ in loaded.named_modules() if "modification" in key]


def test_what_cannot_be_merged_stays_beside_what_can() -> None:
    """Prefix and LoRA: the one is merged, the other goes on by its hooks; a training step finds all of them."""
    found = {**MERGEABLE["lora_ffn"], "mix.attention.": PRESETS["prefix"][""]}
    model = attached("bart", found)
    fold(model)
    assert set(find_obstacles(model)) == {"attention"}
    beside, trained = logits(model, "bart"), list_trained(model)
    with merge_temporarily(model):
        assert close(logits(model, "bart"), beside)
    assert trained.keys() == list_trained(model).keys()
    model(**batch("bart")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_every_point_merges_or_says_why() -> None:
    """Over all combinations: whatever `find_obstacles` lets through computes the same; the rest is never merged."""
    merges = 0
    for name, m in points("identity", "relu", "constant"):
        model = attached("bart", {"": m})
        expected = logits(model, "bart")
        why = find_obstacles(model)
        with merge_temporarily(model):
            assert close(logits(model, "bart"), expected), name
            assert bool(hooked(model)) == any(isinstance(module, Edit) for module in model.modules() if why), name
        merges += not why
    assert merges > 20


def test_bfloat16_weights_are_rounded_once() -> None:
    """W' of bfloat16 weights is the rounded W + s W_up W_down, is as far from float32 as the modification beside the
    weights, and goes without a trace. `merge` says what the rounding took."""
    model, exact = attached("bart", MERGEABLE["lora_ffn"]), attached("bart", MERGEABLE["lora_ffn"])
    for (name, parameter), reference in zip(model.named_parameters(), exact.parameters(), strict=True):
        if "modification" not in name:
            parameter.data = parameter.data.bfloat16()
            reference.data = parameter.data.float()
    expected, beside = logits(exact, "bart"), logits(model, "bart").float()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    edits = {name.rpartition(".")[0]: m for name, m in model.named_modules() if isinstance(m, Edit)}
    with merge_temporarily(model):
        assert not hooked(model)
        inside = logits(model, "bart").float()
        for place, edit in edits.items():
            down, up = edit.function.weights()  # type: ignore[union-attr]  # a Bottleneck
            whole = before[f"{place}.weight"][1].double() + 4.0 * up[0].double() @ down[0].double()
            assert torch.equal(model.get_submodule(place).get_parameter("weight"), whole.bfloat16())
    distance = (beside - expected).square().mean().sqrt()
    assert (inside - expected).square().mean().sqrt() < 1.5 * distance < 0.1 * expected.square().mean().sqrt()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1]), name
    assert merge(exact) < 1e-5
    share = merge(model)
    assert 1e-4 < share < 0.1
    assert not hooked(model)


@pytest.mark.parametrize("preset", ["biased_lora", "ia3"])
@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_the_bias_takes_its_part_of_the_change(family: str, preset: str) -> None:
    """b' = b + Δ's own bias, or b ∘ (1 + l): the tiny models' biases are zero at first, which would hide it."""
    biased = {"": modification("identity", "query_value", "parallel", "scaled", scale=2.0, bias=True, dropout=0.0)}
    model = attached(family, biased if preset == "biased_lora" else PRESETS[preset])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter)
    expected = logits(model, family)
    merge(model)
    assert not hooked(model)
    assert close(logits(model, family), expected)
