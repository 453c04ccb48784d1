"""The fast paths of a training step beside what they replace: the same losses and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

from peftbench.compiled import CompiledLayers
from peftbench.config import LOSS, Compile, Keep
from peftbench.modification.attach import attach
from peftbench.predict import mean_loss
from peftbench.token_loss import IGNORED, cross_entropy, hidden_states, logits_bias, output_layer
from tests.families import CONTINUING, PRESETS, WRITING, batch, build, dropout, long_tail, shake
from tests.fitting import Targets, fitted, one_step


def model_of(family: str, preset: str) -> PreTrainedModel:
    model = build(family, **dropout(family))
    attach(model, PRESETS[preset])
    shake(model)
    model.config.use_cache = False
    return model.train()


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", long_tail([*WRITING, *CONTINUING], "bart", "t5", "gpt2"))
def test_the_loss_is_that_of_label_smoother(family: str, smoothing: float) -> None:
    """Also where the logits have a bias or a scale of the family's own, and where labels are left out."""
    model = model_of(family, "lora_ffn")
    if family in ("bart", "mbart"):
        model.final_logits_bias.normal_()
    inputs = batch(family)
    labels = inputs.pop("labels")
    labels[0, 3:] = IGNORED
    if family in WRITING:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    smoother = LabelSmoother(epsilon=smoothing)
    expected = smoother({"logits": model(**inputs).logits}, labels.clone(), shift_labels=family in CONTINUING)
    layer = output_layer(model)
    assert layer is not None
    with hidden_states(layer) as read:
        assert model(**inputs).logits.numel() == 0
    hidden, right = (read[0][:, :-1], labels[:, 1:]) if family in CONTINUING else (read[0], labels)
    loss = cross_entropy(hidden, layer.weight, logits_bias(model), right, smoothing, chunk=4)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    wanted, found = gradients(model, expected), gradients(model, loss)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_trained_output_layer_is_left_to_the_model() -> None:
    model = build("bart")
    assert output_layer(model) is None  # nothing is frozen yet
    attach(model, PRESETS["lora"])
    assert output_layer(model) is not None
    assert output_layer(build("roberta")) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", ["mam", "lora_ffn", "prefix", "adapter", "ia3", "unipelt", "mh_parallel_adapter_hidden"]
)
@pytest.mark.parametrize("family", ["bart", "roberta", "t5", "gpt2", "llama"])
def test_compiled_layers(family: str, preset: str) -> None:
    """No graph break, no more than two graphs a stack, and the same loss and gradients."""
    torch._dynamo.reset()
    model = model_of(family, preset)
    inputs = batch(family, lengths=(11, 7))
    loss = model(**inputs).loss
    wanted = gradients(model, loss)
    graphs = CompileCounterWithBackend("aot_eager")
    layers = CompiledLayers(model, backend=graphs)
    with layers.active():
        compiled = model(**inputs).loss
    torch.testing.assert_close(compiled, loss)
    for name, gradient in gradients(model, compiled).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not counters["graph_break"]
    before = graphs.frame_count
    assert 0 < sum(1 for graph in graphs.graphs if len(graph.graph.nodes)) <= 4
    model(**inputs)  # outside, the layers are as they were
    assert graphs.frame_count == before


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mam", "lora_ffn"])
def test_an_evaluation_leaves_compiled_layers_as_they_are(preset: str, tmp_path: Path) -> None:
    """Training with evaluations, which fold, merge and widen the model for a while, has the losses of a training
    without, and compiles no more graphs."""
    data, losses, graphs = Targets("bart"), [], []
    for keep in (Keep.last, Keep.best):
        torch._dynamo.reset()
        counters.clear()
        model = model_of("bart", preset)
        seen: list[float] = []
        looks: list[float] = []

        def evaluate(model: PreTrainedModel = model, looks: list[float] = looks) -> dict[str, float]:
            looks.append(mean_loss(model, data.selection, data.collator, batch_size=4))
            return {LOSS: looks[-1]}

        settings = one_step(
            compile=Compile.layers, keep=keep, evaluate_every=2, max_steps=6, learning_rate=1e-2, epsilon=1e-8
        )
        fitted(
            model,
            data,
            settings,
            tmp_path,
            evaluate=evaluate,
            log=lambda values, seen=seen: seen.extend([values["loss"]] if "loss" in values else []),  # type: ignore[misc]  # a default
        )
        assert len(seen) == 6 and len(looks) == (3 if keep is Keep.best else 0)
        losses.append(seen)
        graphs.append(counters["stats"]["unique_graphs"])
    assert losses[1] == losses[0] and losses[0][5] < losses[0][0]
    assert graphs[1] == graphs[0] > 0
