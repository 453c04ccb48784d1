"""A model that `prepared` makes quick, and `predict`, against the model as it was trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from peftbench.modification.attach import attach
from peftbench.modification.inference import prepared
from peftbench.modification.state import fold
from peftbench.predict import predict
from tests.families import CONTINUING, FAMILIES, MORE_FAMILIES, PRESETS, batch, build, inputs, shake

CASES = [
    (family, preset)
    for family in [*FAMILIES, *MORE_FAMILIES]
    for preset in PRESETS
    if preset != "prompt" or family in ("bart", "roberta", "t5")
]
QUICK = {("bart", preset) for preset in PRESETS} | {(family, "mam") for family in ("mbart", "bert", "t5", "gpt2")}
TABLE = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in CASES]


def attached(family: str, preset: str) -> PreTrainedModel:
    model = build(family)
    attach(model, PRESETS[preset])
    shake(model)
    return model


def logits(model: nn.Module, family: str, bf16: bool = False) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found: Tensor = model(**batch(family)).logits
    return found.float()


def traces(model: nn.Module) -> dict[str, Any]:
    """All that a preparation might leave behind."""
    hooks = {
        name: [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for name, module in model.named_modules()
    }
    tensors = {name: (id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    return {"hooks": hooks, "ids": {name: found[:2] for name, found in tensors.items()}}


@pytest.mark.parametrize(("family", "preset"), TABLE)
def test_prepared_computes_the_same_and_leaves_no_trace(family: str, preset: str) -> None:
    model = attached(family, preset)
    expected, before = logits(model, family), traces(model)
    for bf16 in (False, True):
        with prepared(model, bf16):
            if not bf16:
                assert (logits(model, family) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
            else:
                assert logits(model, family, bf16).isfinite().all()
        assert traces(model) == before
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("family", ["bart", "bert", "t5", "llama", "gpt2"])
def test_bfloat16_weights_are_those_that_autocast_makes(family: str) -> None:
    """The bare backbone, whose weights are all that is prepared: equal to the last bit."""
    model = build(family)
    attach(model, {})
    expected = logits(model, family, bf16=True)
    with prepared(model, bf16=True):
        assert torch.equal(logits(model, family, bf16=True), expected)


@pytest.mark.parametrize("preset", ["mam", "adapter", "unipelt", "lora_ffn", "ia3"])
def test_bfloat16_differs_by_its_rounding(preset: str) -> None:
    """Prepared and not, both in bf16, are equally far from float32."""
    model = attached("bart", preset)
    exact, plain = logits(model, "bart"), logits(model, "bart", bf16=True)
    with prepared(model, bf16=True):
        quick = logits(model, "bart", bf16=True)
    distance = (plain - exact).square().mean().sqrt()
    assert (quick - exact).square().mean().sqrt() < 1.5 * distance
    assert distance < 0.1 * exact.square().mean().sqrt()


GENERATIONS = [
    (family, preset)
    for family in ("bart", "mbart", "t5", "t5_gated", *CONTINUING)
    for preset in ("mam", "prefix_no_gating", "prompt", "heads_gate", "unipelt", "lora", "adapter")
    if preset != "prompt" or family not in CONTINUING
]


@pytest.mark.parametrize("beams", [1, 4], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    ("family", "preset"),
    [
        pytest.param(*case, marks=[] if case[1] == "mam" else pytest.mark.slow, id="-".join(case))
        for case in GENERATIONS
    ],
)
def test_predict_generates_what_the_model_generates(family: str, preset: str, beams: int) -> None:
    """The naive path: transformers' `generate` on the model as it is hooked, in one padded batch."""
    model = attached(family, preset)
    fold(model)
    given = inputs(family, (9, 7, 6))
    lengths = {"min_new_tokens": 6, "max_new_tokens": 6}
    options = GenerationConfig(num_beams=beams, do_sample=False, pad_token_id=1, **lengths)
    options.eos_token_id, options.decoder_start_token_id = 2, 2
    if family not in CONTINUING:  # so that a text depends on the order of many logits
        options.no_repeat_ngram_size = 1
    with torch.no_grad():
        expected = model.generate(**given, generation_config=options)
    rows = {name: tensor.tolist() for name, tensor in given.items()}

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([example[name] for example in examples]) for name in rows}

    found = predict(model, Dataset.from_dict(rows), collate, batch_size=2, generation=options)
    new = expected[:, 9:] if family in CONTINUING else expected
    assert torch.equal(torch.from_numpy(found), new)
