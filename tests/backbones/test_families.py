"""Every method on the families beyond the paper's: T5 (gated or not), decoders alone (Llama, Mistral, Qwen2, GPT-2),
DistilBERT, ELECTRA."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from peftbench.backbones import sites
from peftbench.backbones.sites import find_sites
from peftbench.config import schema
from peftbench.modification import attach as attachment
from peftbench.modification.attach import attach
from peftbench.modification.counting import count
from peftbench.modification.state import fold
from peftbench.utils.errors import UserError
from tests.families import (
    CONTINUING,
    MORE_FAMILIES,
    PRESETS,
    WRITING,
    batch,
    build,
    inputs,
    modification,
    shake,
    table,
)

CASES = table(MORE_FAMILIES)


def attached(family: str, modifications: dict[str, schema.Modification]) -> PreTrainedModel:
    """The family's tiny model, in evaluation mode, with modifications whose weights are random."""
    model = build(family)
    attach(model, modifications)
    shake(model)
    return model


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_every_trained_tensor_learns_and_nothing_else_moves(family: str, preset: str) -> None:
    model = attached(family, PRESETS[preset])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
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
    model = attached(family, PRESETS[preset])
    both = batch(family, (9, 6))
    alone = {"input_ids": both["input_ids"][1:, :6], "attention_mask": both["attention_mask"][1:, :6]}
    if family in WRITING:
        alone["labels"] = both["labels"][1:]
    with torch.no_grad():
        padded, single = model(**both).logits[1], model(**alone).logits[0]
    if family in CONTINUING:
        padded = padded[:6]
    assert torch.isfinite(padded).all()
    assert (padded - single).abs().max() < 1e-4 * max(1.0, float(single.abs().max()))


def generated(model: PreTrainedModel, given: dict[str, Tensor], beams: int, cached: bool = True) -> list[Tensor]:
    """For each row six new tokens, without the text that a decoder alone repeats, and the scores at each step of all
    its beams, (6, beams, vocabulary)."""
    options = GenerationConfig(
        num_beams=beams, min_new_tokens=6, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=1
    )
    options.eos_token_id, options.decoder_start_token_id = 2, 2
    options.return_dict_in_generate = options.output_scores = True
    found = model.generate(**given, generation_config=options)
    scores = torch.stack(found.scores).unflatten(1, (-1, beams))
    return [found.sequences[:, -6:], *scores.unbind(1)]


def same(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(found.float(), expected.float(), rtol=0, atol=1e-4))


WRITERS = ("t5", "t5_gated", *CONTINUING)
METHODS = ("mam", "prefix_no_gating", "prompt", "heads_gate", "adapter", "lora")
GENERATIONS = [case for case in CASES if case.values[0] in WRITERS and case.values[1] in METHODS]


@pytest.mark.parametrize(("family", "preset"), GENERATIONS)
@pytest.mark.parametrize("beams", [1, 4], ids=["greedy", "beams"])
def test_generation_with_cache_equals_without(family: str, preset: str, beams: int) -> None:
    """The rows are padded, for decoders alone on the left."""
    model = attached(family, PRESETS[preset])
    fold(model)
    given = inputs(family)
    tokens, *scores = generated(model, given, beams)
    expected, *recomputed = generated(model, given, beams, cached=False)
    assert torch.equal(tokens, expected)
    assert all(map(same, scores, recomputed))


@pytest.mark.parametrize(("family", "preset"), [*GENERATIONS, ("bart", "mam"), ("mbart", "mam")])
@pytest.mark.parametrize("beams", [1, 4], ids=["greedy", "beams"])
def test_a_row_generates_the_same_alone_and_padded(family: str, preset: str, beams: int) -> None:
    """Unpadded, transformers leaves causality to the kernel wherever it may. Padding would matter without its mask."""
    model = attached(family, PRESETS[preset])
    both = inputs(family, (9, 6))
    tokens, _, scores = generated(model, both, beams)
    pad = slice(3, None) if family in CONTINUING else slice(6)
    row = {name: tensor[1:, pad] for name, tensor in both.items()}
    assert row["attention_mask"].all()
    for alone in (row, {"input_ids": row["input_ids"]}):
        expected, by_itself = generated(model, alone, beams)
        assert torch.equal(tokens[1:], expected)
        assert same(scores, by_itself)
    unmasked = generated(model, {**both, "attention_mask": torch.ones_like(both["attention_mask"])}, beams)[2]
    assert not same(scores[0], unmasked[0])


def test_grouped_query_attention_has_a_prefix_for_each_key_and_value_head() -> None:
    model = build("llama")
    attach(model, {"": modification("softmax", "heads", "parallel", "gated", 5, init="bert")})
    shapes = {tuple(parameter.shape) for name, parameter in model.named_parameters() if "head_modifications" in name}
    assert shapes == {(2, 5, 4), (2, 4, 5)}  # 2 key and value heads of width 4 for 4 query heads


@pytest.mark.parametrize("representation", ["query", "key", "value", "query_value"])
def test_an_edit_of_a_fused_projection_changes_its_slice_only(representation: str) -> None:
    """GPT-2's c_attn computes q | k | v, 16 wide each: the rest of its output stays as it is, to the bit."""
    model = attached("gpt2", {"": modification("relu", representation, "sequential", init="bert", bias=True)})
    projection = find_sites(model).layers[0].attentions[0].query
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        changed = projection(x) != torch.addmm(projection.bias, x.view(-1, 16), projection.weight).view(2, 5, 48)
    for index, name in enumerate(("query", "key", "value")):
        columns = changed[..., 16 * index : 16 * (index + 1)]
        assert columns.all() if name in representation.split("_") else not columns.any()


@pytest.mark.parametrize(
    ("family", "name", "instead"),
    [
        ("llama", "LlamaAttention", r"method=parallel_adapter\.$"),
        ("t5", "T5Attention", r"method=parallel_adapter, or a newer transformers\.$"),
    ],
)
def test_an_attention_that_calls_no_registered_function_is_refused(
    family: str, name: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As T5's in transformers 5.10: a prefix there would train nothing and change nothing."""
    model = build(family)
    monkeypatch.setattr("inspect.getsource", lambda cls: "class OldAttention: ...")
    monkeypatch.setattr(attachment, "_class_takes_ours", attachment._class_takes_ours.__wrapped__)  # read it anew
    with pytest.raises(UserError, match=f"does not let its {name} be modified.*{instead}"):
        attach(model, PRESETS["prefix"])


def test_prompts_are_refused_where_a_family_names_no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in sites.FAMILIES if "llama" in row.model_types)
    monkeypatch.setattr(sites, "FAMILIES", (replace(row, embedding={}),))
    with pytest.raises(UserError, match="prompts are not supported for llama"):
        attach(build("llama"), PRESETS["prompt"])


NORMS = {  # by hand, of width 16: LayerNorms have a weight and a bias, RMSNorms a weight; ELECTRA's first is 8 wide
    "electra": 4 * 32 + 16,
    "distilbert": 5 * 32,
    "t5": (2 * 2 + 1 + 2 * 3 + 1) * 16,
    "t5_gated": (2 * 2 + 1 + 2 * 3 + 1) * 16,
    "t5_classifier": (2 * 2 + 1 + 2 * 3 + 1) * 16,
    **dict.fromkeys(("llama", "mistral", "qwen2"), (2 * 2 + 1) * 16),
    "qwen3": (2 * 2 + 1) * 16 + 2 * 2 * 6,  # also over each head's queries and keys
    "gpt2": (2 * 2 + 1) * 32,
}


@pytest.mark.parametrize("family", ["t5", "t5_classifier", "llama", "llama_classifier"])
def test_a_backbone_without_biases_has_none_to_train(family: str) -> None:
    """T5's relative_attention_bias is a table of positions; a classifier's head is none of the backbone's."""
    with pytest.raises(UserError, match=r"unfreeze=bias: .* has no bias to train; use unfreeze=norm"):
        attach(build(family), {}, schema.Unfreeze.bias)


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_trained_alone(family: str) -> None:
    """unfreeze=norm: all norms and the head have a gradient, and nothing else."""
    model = build(family)
    attach(model, {}, schema.Unfreeze.norm)
    assert count(model).trained == count(model).stored == NORMS[family]
    model.train()
    model(**batch(family)).loss.backward()
    head = ("classifier", "classification_head", "score", "pre_classifier")
    for name, parameter in model.named_parameters():
        expected = "norm" in name.lower() or ".ln_" in name or name.startswith(head)
        assert parameter.requires_grad is expected, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) is expected, name


def test_the_page_lists_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith(("| encoder", "| decoder"))]
    named = {name for line in lines for name in re.findall(r"`([^`]+)`", line)}
    assert named == {name for family in sites.FAMILIES for name in family.model_types}
