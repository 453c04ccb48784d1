"""Every method on the families beyond the paper's: T5 (gated or not), Llama, DistilBERT, ELECTRA."""

from __future__ import annotations

import pytest
import torch

from peftbench.config import Unfreeze
from peftbench.errors import UserError
from peftbench.modification.attach import attach
from peftbench.modification.counting import count
from peftbench.modification.state import fold
from tests.families import MORE_FAMILIES, PRESETS, WRITING, batch, build, modification, shake

CASES = [(f, p) for f in MORE_FAMILIES for p in PRESETS if (f, p) != ("llama", "prompt")]


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_every_trained_tensor_learns_and_nothing_else_moves(family: str, preset: str) -> None:
    model = build(family)
    attach(model, PRESETS[preset])
    shake(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        model(**batch(family))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch(family)).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_padding_changes_nothing(family: str, preset: str) -> None:
    """A row alone, without padding, and the same row beside a longer one (traps of masks that are dropped)."""
    model = build(family)
    attach(model, PRESETS[preset])
    shake(model)
    model.eval()
    both = batch(family, (9, 6))
    alone = {"input_ids": both["input_ids"][1:, :6], "attention_mask": both["attention_mask"][1:, :6]}
    if family in WRITING:
        alone["labels"] = both["labels"][1:]
    with torch.no_grad():
        padded, single = model(**both).logits[1], model(**alone).logits[0]
    assert torch.isfinite(padded).all()
    assert (padded - single).abs().max() < 1e-4 * max(1.0, float(single.abs().max()))


@pytest.mark.parametrize("preset", ["mam", "prefix_no_gating", "prompt", "heads_gate", "adapter"])
@pytest.mark.parametrize("family", ["t5", "t5_gated"])
@pytest.mark.parametrize("beams", [1, 4])
def test_generation_with_cache_equals_without(family: str, preset: str, beams: int) -> None:
    model = build(family)
    attach(model, PRESETS[preset])
    shake(model)
    fold(model)
    model.eval()
    inputs = {name: tensor for name, tensor in batch(family).items() if name != "labels"}
    options = {"num_beams": beams, "max_length": 12, "min_length": 6, "do_sample": False}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


def test_grouped_query_attention_has_a_prefix_for_each_key_and_value_head() -> None:
    model = build("llama")
    attach(model, {"": modification("softmax", "heads", "parallel", "gated", 5, init="bert")})
    shapes = {tuple(parameter.shape) for name, parameter in model.named_parameters() if "head_modifications" in name}
    assert shapes == {(2, 5, 4), (2, 4, 5)}  # 2 key and value heads of width 4 for 4 query heads


def test_an_attention_that_calls_no_registered_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As T5's in transformers 5.10: a prefix there would train nothing and change nothing."""
    monkeypatch.setattr("inspect.getsource", lambda cls: "class OldAttention: ...")
    with pytest.raises(UserError, match="does not let its LlamaAttention be modified"):
        attach(build("llama"), PRESETS["prefix"])


def test_prompts_are_refused_where_labels_count_the_input() -> None:
    with pytest.raises(UserError, match="prompts are not supported for llama"):
        attach(build("llama"), PRESETS["prompt"])


NORMS = {  # by hand, of width 16: LayerNorms have a weight and a bias, RMSNorms a weight; ELECTRA's first is 8 wide
    "electra": 4 * 32 + 16,
    "distilbert": 5 * 32,
    "t5": (2 * 2 + 1 + 2 * 3 + 1) * 16,
    "t5_gated": (2 * 2 + 1 + 2 * 3 + 1) * 16,
    "t5_classifier": (2 * 2 + 1 + 2 * 3 + 1) * 16,
    "llama": (2 * 2 + 1) * 16,
}


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_trained_alone(family: str) -> None:
    """unfreeze=norm: all norms and the head have a gradient, and nothing else."""
    model = build(family)
    attach(model, {}, Unfreeze.norm)
    assert count(model).trained == count(model).stored == NORMS[family]
    model.train()
    model(**batch(family)).loss.backward()
    head = ("classifier", "classification_head", "score", "pre_classifier")
    for name, parameter in model.named_parameters():
        expected = "norm" in name.lower() or name.startswith(head)
        assert parameter.requires_grad is expected, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) is expected, name
