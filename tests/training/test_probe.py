"""The gradient probe: it names the tensors that autograd does not reach, and leaves everything as it was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from peftbench.config import schema
from peftbench.modification.attach import attach
from peftbench.modification.edit import Edit
from peftbench.training.probe import find_unreached, make_no_gradient_error
from peftbench.utils.errors import UserError
from tests.families import FAMILIES, MORE_FAMILIES, PRESETS, batch, build, modification, table
from tests.fitting import Rows, fitted, trained


def with_idle_cross_attention() -> PreTrainedModel:
    """A BERT decoder as a classifier: nothing encodes for its cross-attentions, so they never run."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return BertForSequenceClassification(
        BertConfig(vocab_size=99, num_labels=3, is_decoder=True, add_cross_attention=True, **sizes)
    )


@pytest.mark.parametrize(("family", "preset"), table((*FAMILIES, *MORE_FAMILIES), "bart", "roberta", "t5", "gpt2"))
def test_every_method_is_reached_from_its_own_initialisation(family: str, preset: str) -> None:
    """Exactly zero gradients, as that of LoRA's W_down, are no fault."""
    model = build(family)
    attach(model, PRESETS[preset])
    assert find_unreached(model, batch(family)) == []


WITHOUT_BIASES = ("t5", "t5_gated", "t5_classifier", "llama", "llama_classifier", "mistral", "qwen3")


@pytest.mark.parametrize(
    ("family", "unfreeze"),
    [
        (family, unfreeze)
        for family in (*FAMILIES, *MORE_FAMILIES)
        for unfreeze in (schema.Unfreeze.bias, schema.Unfreeze.norm, schema.Unfreeze.all)
        if family not in WITHOUT_BIASES or unfreeze is not schema.Unfreeze.bias
    ],
)
def test_the_backbones_own_parameters_are_reached(family: str, unfreeze: schema.Unfreeze) -> None:
    model = build(family)
    attach(model, {}, unfreeze)
    assert find_unreached(model, batch(family)) == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_attention_that_never_runs_is_named(dtype: torch.dtype | None) -> None:
    model = with_idle_cross_attention()
    attach(model, {"": modification("identity", "query_value", "parallel", "add")})
    expected = [
        f"bert.encoder.layer.{layer}.crossattention.self.{part}.modification.function.{tensor}"
        for layer in (0, 1)
        for part in ("query", "value")
        for tensor in ("down", "up")
    ]
    assert find_unreached(model, batch("bert"), dtype) == expected
    message = str(make_no_gradient_error(expected))
    assert all(name in message for name in expected[:6]) and "and 2 more" in message and "allow_unused=true" in message

    without = with_idle_cross_attention()
    attach(without, {"": modification("identity", "query_value", "parallel", "add", attentions=("self",))})
    assert find_unreached(without, batch("bert"), dtype) == []


def test_a_parameter_beside_the_model_is_named() -> None:
    model = build("roberta")
    attach(model, PRESETS["lora"])
    model.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    assert find_unreached(model, batch("roberta")) == ["extra"]


def test_all_are_named_where_the_loss_depends_on_none() -> None:
    model = build("bart")
    attach(model, {})
    model.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    assert find_unreached(model, batch("bart")) == ["extra"]


def test_layers_that_training_drops_are_no_fault() -> None:
    """LayerDrop of 1: in training mode no layer would run at all."""
    model = build("bart", encoder_layerdrop=1.0, decoder_layerdrop=1.0)
    attach(model, PRESETS["mam"])
    assert find_unreached(model.train(), batch("bart")) == []


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


@pytest.mark.parametrize("family", ["bart", "roberta", "t5"])
def test_nothing_is_left_behind(family: str) -> None:
    """Random states, training flags of each module, gradients, values, and what the modifications keep of a forward."""
    model = build(family)
    attach(model, PRESETS["mam"])
    model.train()
    next(iter(model.children())).eval()  # a mixture of flags
    kept = next(p for p in model.parameters() if p.requires_grad)
    kept.grad = torch.ones_like(kept)  # a gradient that was there before
    before = [parameter.clone() for parameter in model.parameters()]
    flags, states = [module.training for module in model.modules()], random_states()
    attributes = {id(module): set(vars(module)) for module in model.modules()}

    class Drawing(nn.Module):
        """Draws random numbers in evaluation mode too."""

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * torch.rand_like(x)

    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: Drawing()(output))
    assert find_unreached(model, batch(family)) == []
    handle.remove()

    assert [module.training for module in model.modules()] == flags and len(set(flags)) == 2
    assert random_states() == states
    assert [p for p in model.parameters() if p.grad is not None and p is not kept] == []
    assert kept.grad is not None and torch.equal(kept.grad, torch.ones_like(kept))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(module._x is None for module in model.modules() if isinstance(module, Edit))
    assert all(set(vars(module)) - attributes[id(module)] <= {"_x"} for module in model.modules())


def test_flags_are_put_back_after_an_error() -> None:
    model = build("roberta").train()
    attach(model, PRESETS["lora"])
    with pytest.raises(IndexError):
        find_unreached(model, {"input_ids": torch.tensor([[1000]]), "labels": torch.tensor([0])})
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_to_the_bit_with_and_without_the_probe(checkpointing: bool, tmp_path: Path) -> None:
    """With dropout everywhere, so that one random number more would show."""
    data = Rows(batch("roberta", (9,) * 12), (9,) * 12)
    settings = schema.Trainer(learning_rate=1e-2, batch_size=4, max_steps=5, evaluate_every=5)
    settings.device, settings.gradient_checkpointing = schema.Device.cpu, checkpointing
    results = []
    for probed in (False, True):
        model = build("roberta", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
        attach(model, PRESETS["mam"])
        torch.manual_seed(3)
        if probed:
            assert find_unreached(model, data.collator([data.train[0]])) == []
        state = torch.get_rng_state()
        fitted(model, data, settings, tmp_path)
        results.append((state, trained(model)))
    (plain_state, plain), (probed_state, probed_weights) = results
    assert torch.equal(plain_state, probed_state)
    assert all(torch.equal(plain[name], probed_weights[name]) for name in plain)
    fresh = build("roberta")
    attach(fresh, PRESETS["mam"])
    assert any(not torch.equal(tensor, dict(fresh.named_parameters())[name]) for name, tensor in plain.items())


def test_the_error_is_one_a_user_can_mend() -> None:
    error = make_no_gradient_error(["a.b"])
    assert isinstance(error, UserError)
    assert "1 of the tensors that are to be trained: a.b. Leave" in str(error)


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_left_behind_either() -> None:
    """Its random state, and its memory once the libraries have their workspaces."""
    model = build("roberta").cuda().train()
    attach(model, PRESETS["mam"])
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output + 0 * torch.rand_like(output)
    )
    find_unreached(model, batch("roberta"), torch.bfloat16)
    state, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    assert find_unreached(model, batch("roberta"), torch.bfloat16) == []
    handle.remove()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.cuda.memory_allocated() == allocated
