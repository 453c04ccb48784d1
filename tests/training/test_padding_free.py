"""Training without padding gives what training with padding gives: attention, losses and gradients."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from peftbench.modification.attach import attach
from peftbench.modification.head_attention import ATTENTION_NAME
from peftbench.modification.packed_attention import Packing, TokenRow, attend
from peftbench.training.compiled import CompiledLayers
from peftbench.training.padding_free import PaddingFree, add_lengths
from peftbench.utils.errors import UserError
from tests.families import (
    ALIKE,
    CONTINUING,
    DECODERS,
    PRESETS,
    WRITING,
    batch,
    build,
    cases,
    dropout,
    modification,
    shake,
)
from tests.fitting import Targets, fitted, gradients_of, model_of, one_step, trained
from tests.training.test_gradients import relative_error, smooth

PACKED = ("bart", "mbart", "bart_classifier", "roberta", "bert", "electra", "distilbert")
PACKED += DECODERS
LENGTHS = (9, 3, 6)


def row_of(lengths: tuple[int, ...], longest: int, device: str = "cpu") -> TokenRow:
    packing = Packing(longest)
    packing.load(lengths, longest, torch.device(device))
    return packing.row


def one_by_one(query: Tensor, key: Tensor, value: Tensor, counts: list[tuple[int, int]], causal: bool) -> Tensor:
    """Attention written out, an example at a time; the last query sees the last key."""
    heads, q_at, k_at = [], 0, 0
    for q_count, k_count in counts:
        q, k, v = query[q_at : q_at + q_count], key[k_at : k_at + k_count], value[k_at : k_at + k_count]
        scores = torch.einsum("qnd,knd->nqk", q, k) * 0.3
        if causal:
            hidden = torch.ones(q_count, k_count, dtype=torch.bool, device=q.device).triu(k_count - q_count + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        heads.append(torch.einsum("nqk,knd->qnd", scores.softmax(-1), v))
        q_at, k_at = q_at + q_count, k_at + k_count
    return torch.cat(heads)


def attention_case(device: str, dtype: torch.dtype) -> tuple[list[Tensor], TokenRow, TokenRow, list[tuple[int, int]]]:
    """Query, key and value; four keys before those of each example, as many as its queries."""
    generator = torch.Generator().manual_seed(3)
    queries = row_of(LENGTHS, 12, device)
    keys = queries.longer(4)
    counts = [(length, length + 4) for length in LENGTHS]
    q, k, v = (torch.randn(sum(n), 4, 16, generator=generator) for n in [LENGTHS, *2 * [[c[1] for c in counts]]])
    tensors = [t.to(device, dtype).requires_grad_() for t in (q, k, v)]
    return tensors, queries, keys, counts


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    tensors, queries, keys, counts = attention_case("cpu", torch.float32)
    expected = one_by_one(*tensors, counts, causal)
    found = attend(*tensors, queries, keys, causal=causal, dropout=0.0, scaling=0.3)
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(found.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel(causal: bool) -> None:
    """bfloat16 on the GPU against float64: no worse than bfloat16 rounds."""
    tensors, queries, keys, counts = attention_case("cuda", torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = one_by_one(*exact, counts, causal)
    found = attend(*tensors, queries, keys, causal=causal, dropout=0.0, scaling=0.3)
    outcomes = [(found, expected)]
    outcomes += zip(
        torch.autograd.grad(found.double().square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    )
    for value, wanted in outcomes:
        assert (value.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.gpu
def test_the_kernels_dropout() -> None:
    """Leaves the mean as it is, and gives gradients of the same numbers: the loss's slope along them is their norm."""
    tensors, queries, keys, _ = attention_case("cuda", torch.bfloat16)
    whole = attend(*tensors, queries, keys, causal=False, dropout=0.0, scaling=0.3)
    runs = [attend(*tensors, queries, keys, causal=False, dropout=0.2, scaling=0.3).detach() for _ in range(500)]
    assert not torch.equal(runs[0], runs[1])
    error = (torch.stack(runs).double().mean(0) - whole.double()).norm()
    assert error <= 0.1 * whole.double().norm()
    value = tensors[2]
    torch.manual_seed(7)
    out = attend(*tensors, queries, keys, causal=False, dropout=0.2, scaling=0.3)
    (slope,) = torch.autograd.grad(out.double().sum(), value)
    assert abs((slope.double() * value.double()).sum() - out.double().sum()) <= 1e-2 * out.double().abs().sum()


def test_a_row_and_what_stands_before_its_examples() -> None:
    row = row_of((2, 0, 3), 4)
    vectors = torch.arange(5.0)[:, None, None].requires_grad_()
    front = torch.tensor([10.0, 11.0])[:, None, None].requires_grad_()
    joined = row.prepend(front, vectors)
    assert joined.flatten().tolist() == [10, 11, 0, 1, 10, 11, 10, 11, 2, 3, 4]
    assert row.longer(2).offsets.tolist() == [0, 4, 6, 11] and row.longer(2).longest == 6
    weights = torch.arange(11.0)[:, None, None]
    of_front, of_vectors = torch.autograd.grad((joined * weights).sum(), [front, vectors])
    assert of_front.flatten().tolist() == [0 + 4 + 6, 1 + 5 + 7] and of_vectors.flatten().tolist() == [2, 3, 8, 9, 10]


def test_packed_and_padded_again() -> None:
    packing = Packing(4)
    packing.load((2, 0, 3), 4, torch.device("cpu"))
    padded = torch.arange(24.0).view(3, 4, 2)
    packed = packing.pack(padded)
    assert packed[0, :, 0].tolist() == [0, 2, 16, 18, 20]
    keep = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    assert torch.equal(packing.pad(packed), padded * keep[..., None])
    with pytest.raises(ValueError, match="5 tokens"):
        packing.load((5,), 8, torch.device("cpu"))


def uneven(family: str, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """A batch in which targets, too, have different lengths. A decoder's texts begin with tokens without a label."""
    inputs = batch(family, lengths)
    if family in CONTINUING:
        inputs["labels"][:, :2] = -100
        inputs["labels"][0, :5] = -100
    if family in WRITING:
        inputs["labels"][0, 3:] = -100
        shifted = build(family).prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        inputs["decoder_input_ids"] = shifted
    return inputs


def lengthened(inputs: dict[str, Tensor], family: str = "bart") -> dict[str, Any]:
    """The batch as `add_lengths` gives it."""
    collate = add_lengths(lambda examples: inputs, joined=family in CONTINUING)
    return dict(collate([]))


def longest_target(family: str, lengths: tuple[int, ...] = LENGTHS) -> int:
    """Tokens; 0 if the examples have none."""
    return max(lengths) if family in CONTINUING else 5 if family in WRITING else 0


def loss_and_gradients(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(11)  # DistilBERT's task head has a dropout of its own
    loss = model(**inputs).loss
    return loss.detach(), gradients_of(model, loss)


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        pytest.param(family, preset, marks=[] if family not in ALIKE and preset == "mam" else pytest.mark.slow)
        for family, preset in cases(PACKED)
        if preset != "prompt"
    ],
)
def test_the_loss_and_gradients_are_those_with_padding(family: str, preset: str) -> None:
    windowed = family in ("mistral", "qwen2") and preset in ("mam", "unipelt")
    model = model_of(family, preset, **({"sliding_window": max(LENGTHS)} if windowed else {}))
    inputs = uneven(family)
    wanted, expected = loss_and_gradients(model, inputs)
    packed = PaddingFree(model, max(LENGTHS), longest_target(family))
    named = model.config._attn_implementation
    with packed.active():
        loss, gradients = loss_and_gradients(model, packed.load(lengthened(inputs, family)))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert model.config._attn_implementation == named  # and what was changed is as before
    assert torch.equal(loss_and_gradients(model, inputs)[0], wanted)


def test_no_layer_sees_padding() -> None:
    model = model_of("bart", "lora_ffn")
    seen = []
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.fc1.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    packed = PaddingFree(model, max(LENGTHS), 5)
    with packed.active():
        logits = model(**packed.load(lengthened(uneven("bart")))).logits
    assert seen == 2 * [(1, sum(LENGTHS))] + 2 * [(1, 3 + 5 + 5)]
    assert logits.shape[:2] == (3, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "preset"),
    [("bart", "mam"), ("roberta", "mh_parallel_adapter_hidden"), ("llama", "lora_ffn")],
)
def test_compiled(family: str, preset: str) -> None:
    """No graph break, and no more graphs for batches of other lengths."""
    torch._dynamo.reset()
    counters.clear()
    model = model_of(family, preset)
    graphs = CompileCounterWithBackend("aot_eager")
    layers = CompiledLayers(model, backend=graphs)
    packed = PaddingFree(model, 12, longest_target(family, (12,)))
    for lengths in [(9, 3, 6), (5, 8, 12), (7, 7, 2)]:
        inputs = uneven(family, lengths)
        wanted, expected = loss_and_gradients(model, inputs)
        with packed.active(), layers.active():
            loss, gradients = loss_and_gradients(model, packed.load(lengthened(inputs, family)))
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert not counters["graph_break"]
    assert 0 < sum(1 for graph in graphs.graphs if len(graph.graph.nodes)) <= 4


# heads of 8, which the kernel takes
WIDE: dict[str, dict[str, Any]] = {
    "bart": {"d_model": 32},
    "roberta": {"hidden_size": 32},
    "llama": {"hidden_size": 32},
    "gpt2": {"n_embd": 32},
    "mistral": {"hidden_size": 32, "sliding_window": 4},
}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("family", "preset"),
    [(family, preset) for family in WIDE for preset in ("mam", "lora_ffn") if (family, preset) != ("mistral", "mam")],
)
def test_gradients_on_the_gpu(family: str, preset: str, compiled: bool) -> None:
    """Under autocast, against float64 on the CPU with padding; the tolerance is that of `test_gradients`."""
    torch._dynamo.reset()

    def model(dtype: torch.dtype) -> PreTrainedModel:
        built = build(family, **dropout(family), **WIDE[family]).to(torch.bfloat16).float()
        attach(built, smooth(preset))
        shake(built, 0.1)
        return built.to(dtype).train()

    _, exact = loss_and_gradients(model(torch.float64), uneven(family))
    on_gpu = model(torch.float32).to("cuda")
    packed = PaddingFree(on_gpu, max(LENGTHS), longest_target(family))
    layers = CompiledLayers(on_gpu) if compiled else None
    for lengths in (LENGTHS, (2, 8, 9), LENGTHS):  # compiled code meets other lengths in between
        inputs = {name: tensor.cuda() for name, tensor in uneven(family, lengths).items()}
        given = packed.load({**lengthened(uneven(family, lengths), family), **inputs})
        with packed.active(), layers.active() if layers else nullcontext(), torch.autocast("cuda", torch.bfloat16):
            _, gradients = loss_and_gradients(on_gpu, given)
    assert relative_error({name: g.double().cpu() for name, g in gradients.items()}, exact) < 0.15


FIT = {
    "whole": {},
    "fused loss": {"fused_loss": True},
    "in parts": {"micro_batch": "3"},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param(
            family, settings, marks=[] if settings == "fused loss" and family in ("bart", "llama") else pytest.mark.slow
        )
        for family, settings in itertools.product(("bart", "bart_classifier", "roberta", "llama", "gpt2"), FIT)
    ],
)
def test_fit(family: str, settings: str, tmp_path: Path) -> None:
    """Three steps end where they end with padding."""
    ends = []
    for padding_free in (False, True):
        model = model_of(family, "mam")
        given = one_step(max_steps=3, learning_rate=1e-2, padding_free=padding_free, **FIT[settings])
        fitted(model, Targets(family), given, tmp_path)
        ends.append(trained(model))
    before = trained(model_of(family, "mam"))
    for name, end in ends[0].items():
        torch.testing.assert_close(ends[1][name], end, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.equal(ends[0][name], tensor) for name, tensor in before.items())


def test_attention_dropout_is_there_in_training_alone() -> None:
    model = model_of("bart", "lora_ffn", **dropout("bart", attention=0.5))
    packed = PaddingFree(model, max(LENGTHS), 5)
    given = packed.load(lengthened(uneven("bart")))
    with packed.active(), torch.no_grad():
        assert not torch.equal(model(**given).logits, model(**given).logits)
        model.eval()
        assert torch.equal(model(**given).logits, model(**given).logits)


def test_layers_that_count_positions_are_refused() -> None:
    model = build("t5")
    attach(model, PRESETS["lora"])
    with pytest.raises(UserError, match=r"trainer\.padding_free=true .*; use trainer.batching=bucketed"):
        PaddingFree(model, 9, 5)


def test_a_window_hides_no_prefix() -> None:
    """A kernel's window would count the prefix's vectors as tokens; longer windows hide nothing."""
    model = model_of("mistral", "mam", sliding_window=4)
    with pytest.raises(UserError, match="prefixes, of which a sliding window of 4 tokens hides a part"):
        PaddingFree(model, 9, 9)
    assert PaddingFree(model, 4, 4).flattens


def test_a_sliding_window() -> None:
    """A token sees as many tokens before it as with padding, and fewer than without a window."""
    inputs, losses = uneven("mistral"), []
    for window in (4, 100):
        model = model_of("mistral", "lora_ffn", sliding_window=window)
        wanted, expected = loss_and_gradients(model, inputs)
        packed = PaddingFree(model, max(LENGTHS), max(LENGTHS))
        with packed.active():
            loss, gradients = loss_and_gradients(model, packed.load(lengthened(inputs, "mistral")))
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        losses.append(float(loss))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_decoder_sees_one_text_in_which_each_example_begins_at_0() -> None:
    model = model_of("llama", "lora_ffn")
    seen: list[Tensor] = []
    model.model.rotary_emb.register_forward_hook(
        lambda module, args, given, output: seen.append(given["position_ids"]), with_kwargs=True
    )
    packed = PaddingFree(model, max(LENGTHS), max(LENGTHS), (32, 16))
    given = packed.load(lengthened(uneven("llama"), "llama"))
    with packed.active():
        model(**given)
    positions = seen[0][0].tolist()
    assert positions[:18] == [position for length in LENGTHS for position in range(length)]
    assert len(positions) == 32 and max(positions) < max(LENGTHS)  # filled up with further examples
    ahead = given["labels"][:, 1:]
    found = packed.targets(torch.nn.functional.pad(ahead, (0, 1), value=-100))[0]
    labelled = ahead[ahead != -100]
    assert found[: len(labelled)].tolist() == labelled.tolist()
    assert len(found) == 16 and bool((found[len(labelled) :] == -100).all())


def test_under_autocast() -> None:
    """Rotated queries are float32 there, values bfloat16; what is computed is nearer to bfloat16's padded result than
    that is to float32's."""
    model = model_of("llama", "mam")
    inputs = uneven("llama")
    exact, _ = loss_and_gradients(model, inputs)
    packed = PaddingFree(model, max(LENGTHS), max(LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = loss_and_gradients(model, inputs)
        with packed.active():
            loss, _ = loss_and_gradients(model, packed.load(lengthened(inputs, "llama")))
    assert abs(loss - exact) <= 2 * abs(wanted - exact) + 1e-3


def test_two_prefixes_at_one_attention() -> None:
    prefix = modification("softmax", "heads", "parallel", "gated", 3, init="bert")
    model = build("bart", **dropout("bart"))
    attach(model, {"": prefix, "mix.other.": prefix})
    shake(model)
    assert model.train().config._attn_implementation == ATTENTION_NAME
    wanted, _ = loss_and_gradients(model, uneven("bart"))
    packed = PaddingFree(model, max(LENGTHS), 5)
    with packed.active():
        loss, _ = loss_and_gradients(model, packed.load(lengthened(uneven("bart"))))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
