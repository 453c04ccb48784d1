"""LoRA against the peft library: the same output and the same gradients to the last bit, with copied weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.modification.attach import attach
from peftbench.modification.edit import Edit
from tests.families import batch, build, dropout, modification

RANK, ALPHA = 4, 12
# (family, our representation): peft's target modules, and how many Linears of the tiny model they are
CASES = {
    ("bart", "query_value"): (r".*\.(q_proj|v_proj)", 2 * (2 + 4)),
    ("bart", "ffn_weights"): (r".*\.(fc1|fc2)", 2 * (2 + 2)),
    ("mbart", "query_value"): (r".*\.(q_proj|v_proj)", 2 * (2 + 4)),
    ("mbart", "ffn_weights"): (r".*\.(fc1|fc2)", 2 * (2 + 2)),
    ("roberta", "query_value"): (r".*\.(query|value)", 2 * 2),
    ("roberta", "ffn_weights"): (r".*\.layer\.\d+\.(intermediate|output)\.dense", 2 * 2),
}
RATES = {family: dropout(family, 0.1, 0.2, 0.1) for family, _ in CASES}
TABLE = [pytest.param(*case, *expected, id="-".join(case)) for case, expected in CASES.items()]


def pair(
    family: str, representation: str, target: str, lora_dropout: float
) -> tuple[PreTrainedModel, PeftModel, list[tuple[Edit, torch.nn.Module]]]:
    """Our model, peft's on the same backbone, and each place's two modules, with peft's weights random and copied."""
    ours, bare = build(family, **RATES[family]), build(family, **RATES[family])
    form = modification(
        "identity",
        representation,
        "parallel",
        "scaled",
        RANK,
        scale=ALPHA / RANK,
        dropout=0.0,
        input_dropout=lora_dropout,
    )
    attach(ours, {"": form})
    theirs = get_peft_model(
        bare, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=lora_dropout, target_modules=target)
    )
    places: list[tuple[Edit, torch.nn.Module]] = []
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            edit = ours.get_submodule(f"{name.removeprefix('base_model.model.')}.modification")
            assert isinstance(edit, Edit) and edit.function.down is not None and edit.function.up is not None
            for mine, linear in ((edit.function.down, module.lora_A), (edit.function.up, module.lora_B)):
                linear["default"].weight.normal_(std=0.5)
                mine.copy_(linear["default"].weight[None])
            places.append((edit, module))
    assert len(places) == sum(isinstance(module, Edit) for module in ours.modules())
    return ours, theirs, places


def outcome(model: torch.nn.Module, family: str, train: bool) -> Tensor:
    """Logits under one seed, behind a backward pass of the loss."""
    model.train(train)
    torch.manual_seed(11)
    out = model(**batch(family))
    out.loss.backward()
    logits: Tensor = out.logits.detach()
    return logits


@pytest.mark.parametrize(("family", "representation", "target", "count"), TABLE)
@pytest.mark.parametrize(
    ("train", "lora_dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)], ids=["eval", "train", "train-lora-dropout"]
)
def test_lora_equals_peft_in_output_and_gradients(
    family: str, representation: str, target: str, count: int, train: bool, lora_dropout: float
) -> None:
    """h + (α/r) B A x at every query and value, or at both FFN Linears: difference 0.0 in fp32."""
    ours, theirs, places = pair(family, representation, target, lora_dropout)
    assert len(places) == count
    bare = outcome(build(family, **RATES[family]), family, train)
    expected = outcome(theirs, family, train)
    assert torch.equal(outcome(ours, family, train), expected)
    assert not torch.allclose(bare, expected, atol=1e-2)
    for edit, module in places:
        for mine, linear in ((edit.function.down, module.lora_A), (edit.function.up, module.lora_B)):
            gradient = linear["default"].weight.grad
            assert gradient.abs().max() > 0
            assert torch.equal(mine.grad[0], gradient)


def test_lora_begins_as_peft_begins() -> None:
    """W_down uniform within ±1/√in (Kaiming, a = √5), W_up zero: the same distribution as peft's."""
    torch.manual_seed(3)
    wide = build("bart", d_model=64)
    attach(wide, {"": modification("identity", "query_value", "parallel", "scaled", 64, dropout=0.0)})
    ours = wide.get_submodule("model.encoder.layers.0.self_attn.q_proj.modification.function")
    theirs = get_peft_model(build("bart", d_model=64), LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj"]))
    layer = theirs.get_submodule("base_model.model.model.encoder.layers.0.self_attn.q_proj")
    down = layer.lora_A["default"].weight
    bound = 1 / 64**0.5
    for weight in (ours.down.detach(), down.detach()):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(float(weight.std()) - bound / 3**0.5) < 0.02 * bound
    assert not ours.up.any() and not layer.lora_B["default"].weight.any()
