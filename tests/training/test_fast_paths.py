"""The fast paths of a training step beside what they replace: the same losses and gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

from peftbench.backbones.sites import find_sites, list_configs
from peftbench.config.schema import LOSS, Compile, Keep
from peftbench.evaluation.kv_cache import name_cache_argument
from peftbench.evaluation.predict import compute_mean_loss
from peftbench.modification.attach import attach
from peftbench.modification.functional_form import Bottleneck
from peftbench.tasks.batch import NO_TOKEN
from peftbench.training import paths
from peftbench.training.compiled import CompiledLayers
from peftbench.training.token_loss import (
    TokenLoss,
    _compute_chunk,
    capture_hidden_states,
    compute_cross_entropy,
    find_logits_bias,
    find_output_layer,
)
from tests.families import CONTINUING, PRESETS, WRITING, batch, build, long_tail, shake
from tests.fitting import Targets, fitted, gradients_of, model_of, one_step

DEEP = {
    "bart": {"encoder_layers": 4, "decoder_layers": 4},
    "t5": {"num_layers": 4},
    "gpt2": {"n_layer": 4},
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", long_tail([*WRITING, *CONTINUING], "bart", "t5", "gpt2"))
def test_the_loss_is_that_of_label_smoother(family: str, smoothing: float) -> None:
    """Also where the logits have a bias or a scale of the family's own, and where labels are left out."""
    model = model_of(family, "lora_ffn")
    if family in ("bart", "mbart"):
        model.final_logits_bias.normal_()
    inputs = batch(family)
    labels = inputs.pop("labels")
    labels[0, 3:] = NO_TOKEN
    if family in WRITING:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    smoother = LabelSmoother(epsilon=smoothing)
    expected = smoother({"logits": model(**inputs).logits}, labels.clone(), shift_labels=family in CONTINUING)
    layer = find_output_layer(model)
    assert layer is not None
    with capture_hidden_states(layer) as read:
        assert model(**inputs).logits.numel() == 0
    hidden, right = (read[0][:, :-1], labels[:, 1:]) if family in CONTINUING else (read[0], labels)
    loss = compute_cross_entropy(hidden, layer.weight, find_logits_bias(model), right, smoothing, chunk=4)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    wanted, found = gradients_of(model, expected), gradients_of(model, loss)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_the_loss_is_computed_in_the_dtype_of_the_pass(family: str) -> None:
    """Under autocast, which ends with the forward pass, and after whose norms the hidden states are float32."""
    model = model_of(family, "lora_ffn")
    inputs = batch(family)
    layer = find_output_layer(model)
    assert layer is not None
    token_loss = TokenLoss(model, layer, 0.1)
    multiplied: list[torch.dtype] = []

    def chunk(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        multiplied.append(logits.dtype)
        return _compute_chunk(logits, *others)

    token_loss.chunk = chunk

    def of_label_smoother() -> Tensor:
        logits = model(**inputs).logits.float()
        loss: Tensor = LabelSmoother(0.1)({"logits": logits}, inputs["labels"], shift_labels=family in CONTINUING)
        return loss

    exact = gradients_of(model, of_label_smoother())
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate does
    found, wanted = token_loss(inputs), of_label_smoother()
    assert multiplied == [torch.bfloat16]
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0)
    ours, theirs = gradients_of(model, found), gradients_of(model, wanted)
    for name, gradient in exact.items():  # how far both are from float32 depends on the kernels of the processor
        assert (ours[name] - gradient).norm() <= 2 * (theirs[name] - gradient).norm(), name


def test_tokens_without_a_label_get_no_logits() -> None:
    model = model_of("llama", "lora_ffn")
    inputs = batch("llama")
    inputs["labels"][:, :4] = NO_TOKEN
    layer = find_output_layer(model)
    assert layer is not None
    token_loss, tokens = TokenLoss(model, layer, 0.0), 0

    def chunk(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        nonlocal tokens
        tokens += len(logits)
        return _compute_chunk(logits, *others)

    token_loss.chunk = chunk
    torch.testing.assert_close(token_loss(inputs), model(**inputs).loss, rtol=1e-5, atol=1e-6)
    assert tokens == int((inputs["labels"] != NO_TOKEN).sum())


@pytest.mark.parametrize("family", ["t5", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_training_fills_no_cache(family: str, tmp_path: Path) -> None:
    """T5's decoder has a config of its own, which says that it wants one."""
    model, asked = model_of(family, "lora"), []
    for config in list_configs(model):
        config.use_cache = True
    attention = find_sites(model).layers[-1].attentions[0].module

    def look(module: torch.nn.Module, args: tuple[object, ...], given: dict[str, object]) -> None:
        asked.append(given[name_cache_argument(model)])

    attention.register_forward_pre_hook(look, with_kwargs=True)
    fitted(model, Targets(family), one_step(), tmp_path)
    assert asked == [None]


def test_a_trained_output_layer_is_left_to_the_model() -> None:
    model = build("bart")
    assert find_output_layer(model) is None  # nothing is frozen yet
    attach(model, PRESETS["lora"])
    assert find_output_layer(model) is not None
    assert find_output_layer(build("roberta")) is None


# What is traced is the family's layer, then the hooks in it, which call one module whatever the layer. So each kind of
# hook is traced once, most of them in RoBERTa's one stack, since BART's two take twice as long; and each family once,
# with what its layers have of their own: a cross-attention, dropout as modules, position biases, a fused projection,
# key and value heads in groups.
COMPILED = {
    "bart": ("mam",),
    "roberta": ("adapter", "lora_ffn", "mh_parallel_adapter_hidden"),
    "t5": ("mam",),
    "gpt2": ("ia3",),
    "llama": ("unipelt",),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "preset"), [(family, preset) for family, presets in COMPILED.items() for preset in presets]
)
def test_compiled_layers(family: str, preset: str) -> None:
    """No graph break, no more than two graphs a stack, and the same loss and gradients."""
    torch._dynamo.reset()
    model = model_of(family, preset, **DEEP.get(family, {"num_hidden_layers": 4}))
    inputs = batch(family, lengths=(11, 7))
    loss = model(**inputs).loss
    wanted = gradients_of(model, loss)
    graphs = CompileCounterWithBackend("aot_eager")
    layers = CompiledLayers(model, backend=graphs)
    with layers.active():
        compiled = model(**inputs).loss
    torch.testing.assert_close(compiled, loss)
    for name, gradient in gradients_of(model, compiled).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not counters["graph_break"]
    before = graphs.frame_count
    assert 0 < sum(1 for graph in graphs.graphs if len(graph.graph.nodes)) <= 4
    model(**inputs)  # outside, the layers are as they were
    assert graphs.frame_count == before


@pytest.mark.slow
def test_the_next_run_of_a_process_is_compiled_already() -> None:
    """Another model of the same kind, with weights of its own."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    losses, counts = [], []
    for seed in (1, 2):
        model = model_of("roberta", "mam")
        shake(model, seed=seed)
        expected = model(**batch("roberta")).loss
        with CompiledLayers(model, backend=graphs).active():
            torch.testing.assert_close(model(**batch("roberta")).loss, expected)
        losses.append(float(expected.detach()))
        counts.append(graphs.frame_count)
    assert counts[1] == counts[0] > 0 and losses[1] != losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "backend"), [("mam", "aot_eager"), ("lora_ffn", None)])
def test_an_evaluation_leaves_compiled_layers_as_they_are(
    preset: str, backend: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training with evaluations, which fold, merge and widen the model for a while, has the losses of a training
    without, and compiles no graph that the latter has not left. Generated code, which takes long, is the same with
    either preset."""
    if backend is not None:
        traced = CompileCounterWithBackend(backend)  # one object for both runs
        monkeypatch.setattr(paths, "CompiledLayers", partial(CompiledLayers, backend=traced))
    data, losses, graphs = Targets("bart"), [], []
    torch._dynamo.reset()
    counters.clear()
    for keep in (Keep.last, Keep.best):
        model = model_of("bart", preset)
        seen: list[float] = []
        looks: list[float] = []

        def evaluate(model: PreTrainedModel = model, looks: list[float] = looks) -> dict[str, float]:
            looks.append(compute_mean_loss(model, data.selection, data.collator, batch_size=4))
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


@pytest.mark.parametrize(("form", "width"), [("relu", 8), ("identity", 8), ("sigmoid", 8), ("softmax", 5)])
def test_compiled_code_fills_a_bottleneck_up(form: str, width: int) -> None:
    """To a multiple of 8, with the same Δh and gradients; not where f looks across the bottleneck."""
    torch._dynamo.reset()
    bottleneck, x = Bottleneck(12, 5, 6, form, bias=True), torch.randn(7, 12)
    shake(bottleneck)
    widths: list[int] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        values = [node.meta["example_value"] for node in graph.graph.nodes if "example_value" in node.meta]
        widths.extend(value.shape[-1] for value in values if value.shape[:1] == (7,))
        return graph

    expected = bottleneck(x)
    found = torch.compile(bottleneck, backend=look)(x)
    torch.testing.assert_close(found, expected)
    assert width in widths
    trained = list(bottleneck.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    for gradient, right in zip(torch.autograd.grad(found.square().sum(), trained), wanted, strict=True):
        torch.testing.assert_close(gradient, right)
