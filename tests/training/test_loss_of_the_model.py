"""Losses of models whose own loss is more than the cross-entropy of W h + b: scaled or capped logits, routers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.config.schema import Trainer
from peftbench.evaluation.predict import compute_mean_loss
from peftbench.modification.attach import attach
from peftbench.tasks.batch import NO_TOKEN
from peftbench.training import token_loss
from peftbench.training.batching import Lengths
from peftbench.training.padding_free import PaddingFree
from peftbench.training.paths import FastPaths
from peftbench.training.token_loss import find_output_layer
from peftbench.utils.errors import UserError
from tests.families import PRESETS, batch, build, shake

CHANGED = {  # their published scale of logits, or a cap so low that a forgotten one shows
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3": {"final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 5.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625},
}
LENGTHS = (9, 6, 7)
PLAIN = Trainer(learning_rate=1.0, padding_free=False, label_smoothing=0.0)


def attached(family: str, **more: Any) -> PreTrainedModel:
    model = build(family, **more)
    attach(model, PRESETS["lora"])
    shake(model)
    return model.eval()


def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}


@torch.no_grad()
def compute_naively(model: PreTrainedModel, given: dict[str, Tensor], smoothing: float) -> float:
    """Example by example, token by token, from the logits that the model returns."""
    total, tokens = 0.0, 0
    for row, length in enumerate(LENGTHS):
        ids = given["input_ids"][row : row + 1, :length]
        nll = -model(input_ids=ids).logits[0].double().log_softmax(-1)
        for at in range(length - 1):
            total += float((1 - smoothing) * nll[at, ids[0, at + 1]] + smoothing * nll[at].mean())
            tokens += 1
    return total / tokens


@pytest.mark.parametrize("family", [*CHANGED, "llama"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [token_loss.CHUNK, 10])  # tokens: the whole batch, or one example at a time
def test_an_evaluations_loss_is_that_of_the_models_logits(
    family: str, smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "CHUNK", chunk)
    model = attached(family, **CHANGED.get(family, {}))
    given = batch(family, LENGTHS)
    assert int((given["labels"] != NO_TOKEN).sum()) == sum(LENGTHS)
    data = Dataset.from_dict({name: tensor.tolist() for name, tensor in given.items()})
    found = compute_mean_loss(model, data, collate, len(LENGTHS), label_smoothing=smoothing)
    assert found == pytest.approx(compute_naively(model, given, smoothing), rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_loss_of_routers_is_left_out_by_no_path(family: str) -> None:
    model = attached(family, output_router_logits=True, router_aux_loss_coef=0.5)
    given, lengths = batch(family), Lengths([9, 6], [], joined=True)
    paths = FastPaths.of(model, replace(PLAIN, fused_loss=True), lengths)
    assert paths.token_loss is None and find_output_layer(model) is None
    with torch.no_grad():
        whole = model(**given).loss
        model.config.output_router_logits = False
        assert whole - model(**given).loss > 0.1
    assert find_output_layer(model) is not None
    model.config.output_router_logits = True
    with pytest.raises(UserError, match=r"routers \(output_router_logits=true\)"):
        PaddingFree(model, 9, 0)
    with pytest.raises(UserError, match=r"trainer\.label_smoothing=0\.1 would leave out the auxiliary loss"):
        FastPaths.of(model, replace(PLAIN, label_smoothing=0.1), lengths)
