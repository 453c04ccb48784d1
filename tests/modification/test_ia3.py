"""IA3 against the peft library: the same output and the same gradients to the last bit, with copied vectors."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.modification.attach import attach
from peftbench.modification.edit import Edit
from peftbench.modification.functional_form import Constant
from tests.families import FAMILIES, PRESETS, batch, build, dropout, outcome

# family: peft's target modules, those among them whose input is scaled, and the numbers that this trains
# (d = 16, d_ffn = 32; T5's keys are 4 heads of 6, Llama's 2 of 4)
CASES = {
    "bart": (r".*\.(k_proj|v_proj|fc2)", r".*\.fc2", 6 * 2 * 16 + 4 * 32),
    "mbart": (r".*\.(k_proj|v_proj|fc2)", r".*\.fc2", 6 * 2 * 16 + 4 * 32),
    "roberta": (
        r".*\.layer\.\d+\.(attention\.self\.(key|value)|output\.dense)",
        r".*\.layer\.\d+\.output\.dense",
        2 * 2 * 16 + 2 * 32,
    ),
    "t5": (r".*\.(k|v|wo)", r".*\.wo", 6 * 2 * 24 + 4 * 32),
    "t5_gated": (r".*\.(k|v|wo)", r".*\.wo", 6 * 2 * 24 + 4 * 32),
    "llama": (r".*\.(k_proj|v_proj|down_proj)", r".*\.down_proj", 2 * 2 * 8 + 2 * 32),
}


def pair(family: str) -> tuple[PreTrainedModel, PeftModel, list[tuple[Tensor, Tensor]]]:
    """Our model, peft's on the same backbone, and each place's two vectors, random: ours is peft's less 1."""
    rates = dropout(family, 0.1, 0.2, 0.1) if family in FAMILIES else {}
    ours, bare = build(family, **rates), build(family, **rates)
    attach(ours, PRESETS["ia3"])
    targets, feedforward, numbers = CASES[family]
    theirs = get_peft_model(bare, IA3Config(target_modules=targets, feedforward_modules=feedforward))
    vectors: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if not hasattr(module, "ia3_l"):
                continue
            place = ours.get_submodule(name.removeprefix("base_model.model."))
            (edit,) = (child for child in place.children() if isinstance(child, Edit))
            assert isinstance(edit.function, Constant)
            scale = module.ia3_l["default"].uniform_(0.5, 2)  # in this range 1 + (scale - 1) is exact
            edit.function.vector.copy_((scale - 1).reshape(1, 1, -1))
            vectors.append((edit.function.vector, scale))
    assert len(vectors) == sum(isinstance(module, Edit) for module in ours.modules())
    assert sum(mine.numel() for mine, _ in vectors) == sum(scale.numel() for _, scale in vectors) == numbers
    return ours, theirs, vectors


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", CASES)
def test_ia3_equals_peft_in_output_and_gradients(family: str, train: bool) -> None:
    """Keys, values and the input of W_2, each times a vector: difference 0.0 in fp32."""
    ours, theirs, vectors = pair(family)
    expected = outcome(theirs, family, train)
    assert torch.equal(outcome(ours, family, train), expected)
    with torch.no_grad():
        assert not torch.allclose(build(family)(**batch(family)).logits, expected, atol=1e-2)
    for mine, scale in vectors:
        assert mine.grad is not None and scale.grad is not None
        assert scale.grad.abs().max() > 0
        assert torch.equal(mine.grad.flatten(), scale.grad.flatten())


@pytest.mark.parametrize("family", CASES)
def test_ia3_begins_as_peft_begins(family: str) -> None:
    """As a no-op: our vectors at 0, peft's at 1."""
    ours = build(family)
    attach(ours, PRESETS["ia3"])
    assert all(not module.vector.any() for module in ours.modules() if isinstance(module, Constant))
    targets, feedforward, _ = CASES[family]
    theirs = get_peft_model(build(family), IA3Config(target_modules=targets, feedforward_modules=feedforward))
    with torch.no_grad():
        expected = build(family)(**batch(family)).logits
        assert torch.equal(ours(**batch(family)).logits, expected)
        assert torch.equal(theirs.eval()(**batch(family)).logits, expected)
