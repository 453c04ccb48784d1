"""A model that `prepare_inference` makes quick, and `predict`, against the model as it was trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from peftbench.backbones.sites import find_sites
from peftbench.evaluation import inference, kv_cache
from peftbench.evaluation.inference import prepare_inference
from peftbench.evaluation.predict import predict
from peftbench.modification import head_attention
from peftbench.modification.attach import attach
from peftbench.modification.edit import Edit
from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.state import fold
from tests.families import (
    CONTINUING,
    FAMILIES,
    MORE_FAMILIES,
    PRESETS,
    batch,
    build,
    cases,
    inputs,
    modification,
    shake,
)

CASES = [
    (family, preset)
    for family, preset in cases([*FAMILIES, *MORE_FAMILIES])
    if preset != "prompt" or family in ("bart", "roberta", "t5")
]
QUICK = {("bart", preset) for preset in PRESETS} | {(family, "mam") for family in ("mbart", "bert", "t5", "gpt2")}
TABLE = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in CASES]


def attached(family: str, preset: str) -> PreTrainedModel:
    model = build(family)
    attach(model, {} if preset == "bare" else PRESETS[preset])
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
    tensors = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)}
    own = {name: "forward" in vars(module) for name, module in model.named_modules()}
    return {"hooks": hooks, "ids": tensors, "own": own}


@pytest.mark.parametrize(("family", "preset"), TABLE)
def test_prepared_computes_the_same_and_leaves_no_trace(family: str, preset: str) -> None:
    model = attached(family, preset)
    expected, before = logits(model, family), traces(model)
    for bf16 in (False, True):
        with prepare_inference(model, torch.bfloat16 if bf16 else None):
            if not bf16:
                assert (logits(model, family) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
            else:
                assert logits(model, family, bf16).isfinite().all()
        assert traces(model) == before
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize(("owner", "name"), [(Bottleneck, "fold"), (inference, "widen_ffn")])
def test_memory_that_runs_out_on_the_way_leaves_no_trace(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the error that is raised, and what was prepared until then is taken back: a prefix has its MLP again."""
    model = attached("bart", "mam")
    expected, before = logits(model, "bart"), traces(model)
    prepare, calls = getattr(owner, name), list[Any]()

    def running_out(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return prepare(*args)

    monkeypatch.setattr(owner, name, running_out)
    with pytest.raises(torch.OutOfMemoryError), prepare_inference(model):
        pass
    assert traces(model) == before
    assert torch.equal(logits(model, "bart"), expected)


@pytest.mark.parametrize("family", ["bart", "bert", "t5", "llama", "gpt2"])
def test_bfloat16_weights_are_those_that_autocast_makes(family: str) -> None:
    """The bare backbone, whose weights are all that is prepared: equal to the last bit."""
    model = build(family)
    attach(model, {})
    expected = logits(model, family, bf16=True)
    with prepare_inference(model, torch.bfloat16):
        assert torch.equal(logits(model, family, bf16=True), expected)


@pytest.mark.parametrize("preset", ["mam", "adapter", "unipelt", "lora_ffn", "ia3"])
def test_bfloat16_differs_by_its_rounding(preset: str) -> None:
    """Prepared and not, both in bf16, are equally far from float32."""
    model = attached("bart", preset)
    exact, plain = logits(model, "bart"), logits(model, "bart", bf16=True)
    with prepare_inference(model, torch.bfloat16):
        quick = logits(model, "bart", bf16=True)
    distance = (plain - exact).square().mean().sqrt()
    assert (quick - exact).square().mean().sqrt() < 1.5 * distance
    assert distance < 0.1 * exact.square().mean().sqrt()


def tokens(count: int, **options: Any) -> GenerationConfig:
    """Generate just so many."""
    special = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return GenerationConfig(min_new_tokens=count, max_new_tokens=count, do_sample=False, **special, **options)


def predicted(model: PreTrainedModel, given: dict[str, Tensor], generation: GenerationConfig) -> np.ndarray:
    """`predict` on rows that are padded already, two at a time."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([example[name] for example in examples]) for name in given}

    rows = Dataset.from_dict({name: tensor.tolist() for name, tensor in given.items()})
    return predict(model, rows, collate, batch_size=2, generation=generation)


SOON = (("bart", "bare"), ("bart", "mam"), ("mbart", "mam"), ("t5", "mam"), ("qwen2", "mam"))
GENERATIONS = [
    (family, preset)
    for family in ("bart", "mbart", "t5", "t5_gated", *CONTINUING)
    for preset in ("bare", "mam", "prefix_no_gating", "prompt", "heads_gate", "unipelt", "lora", "adapter")
    if preset != "prompt" or family not in CONTINUING
]


@pytest.mark.parametrize("beams", [1, 4], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    ("family", "preset"),
    [pytest.param(*case, marks=[] if case in SOON else pytest.mark.slow, id="-".join(case)) for case in GENERATIONS],
)
def test_predict_generates_what_the_model_generates(
    family: str, preset: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The naive path: transformers' `generate` on the model as it is hooked, in one padded batch. The cache of ours has
    to grow on the way."""
    monkeypatch.setattr(kv_cache, "ROOM", 2)
    model = attached(family, preset)
    fold(model)
    given = inputs(family, (9, 7, 6))
    options = tokens(6, num_beams=beams)
    if family not in CONTINUING:  # so that a text depends on the order of many logits
        options.no_repeat_ngram_size = 1
    with torch.no_grad():
        expected = model.generate(**given, generation_config=options)
    found = predicted(model, given, options)
    new = expected[:, 9:] if family in CONTINUING else expected
    assert torch.equal(torch.from_numpy(found), new)


@pytest.mark.parametrize(
    ("preset", "options"),
    [("mam", {"use_cache": False}), ("mam", {"use_cache": False, "num_beams": 3}), ("lora", {"num_beams": None})],
)
def test_without_a_cache_there_is_none_of_ours(preset: str, options: dict[str, Any]) -> None:
    """And without a number of beams there is one, as for `generate`."""
    model = attached("bart", preset)
    fold(model)
    given, generation = inputs("bart", (9, 7, 6)), tokens(4, **options)
    generation.no_repeat_ngram_size = 1
    with torch.no_grad():
        expected = model.generate(**given, generation_config=generation)
    assert torch.equal(torch.from_numpy(predicted(model, given, generation)), expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("preset", ["bare", "mam", "lora"])
def test_keys_that_are_rotated_in_float32_are_rounded_once(
    preset: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast, where each attention would round all keys and the mask at every token. The texts are the same."""
    model = attached("llama", preset)
    fold(model)
    given, options = inputs("llama", (9, 7, 6)), tokens(6, num_beams=beams)
    with torch.no_grad(), prepare_inference(model, torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(**given, generation_config=options)

    dtypes: set[torch.dtype] = set()
    original = head_attention.sdpa_attention_forward

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        dtypes.update(each.dtype for each in (key, value, mask))
        return original(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(head_attention, "sdpa_attention_forward", spy)
    with (
        torch.no_grad(),
        prepare_inference(model, torch.bfloat16),
        torch.autocast("cpu", torch.bfloat16),
        kv_cache.make_caches(model, beams) as new,
    ):
        assert torch.equal(model.generate(**given, **new(), generation_config=options), expected)
    assert dtypes == {torch.bfloat16}


def test_a_token_is_moved_in_two_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for a further token in either, a search would leave behind a tensor of each length."""
    model = attached("bart", "mam")
    fold(model)
    homes: set[int] = set()
    reorder = kv_cache.Store.reorder

    def spy(store: kv_cache.Store, beams: Tensor) -> None:
        reorder(store, beams)
        homes.add(store._all.untyped_storage().data_ptr())

    monkeypatch.setattr(kv_cache.Store, "reorder", spy)
    predicted(model, inputs("bart", (9, 6)), tokens(9, num_beams=4))
    assert len(homes) == 2


@pytest.mark.parametrize("preset", ["bare", "mam", "lora"])
def test_beams_share_their_source(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a text is generated, a cross-attention sees one row for each source, and its keys are joined to a prefix
    once; afterwards the model calls the attention that it called before."""
    model = attached("bart", preset)
    fold(model)
    attention = model.config._attn_implementation
    calls: list[tuple[int, int, int]] = []
    original = head_attention.sdpa_attention_forward

    def spy(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not module.is_causal and module.is_decoder:
            calls.append((key.data_ptr(), query.shape[2], key.shape[0]))
        return original(module, query, key, *args, **kwargs)

    monkeypatch.setattr(head_attention, "sdpa_attention_forward", spy)
    given = inputs("bart", (9, 6))
    options = tokens(5, num_beams=4)
    predicted(model, given, options)
    assert len(calls) == 2 * 5  # layers x tokens
    assert {call[1:] for call in calls} == {(4, 2)}
    assert len({pointer for pointer, _, _ in calls}) == 2  # one tensor for each layer
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("preset", ["bare", "mam"])
def test_a_source_mask_is_made_once_for_a_token(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layers of the decoder are given the same one; no mask is remembered when all is generated."""
    model = attached("bart", preset)
    fold(model)
    made: list[tuple[int, ...]] = []
    additive = head_attention.make_additive

    def spy(mask: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(tuple(mask.shape))
        return additive(mask, dtype)

    monkeypatch.setattr(head_attention, "make_additive", spy)
    predicted(model, inputs("bart", (9, 6)), tokens(5, num_beams=4))
    prefixes = [each for each in model.modules() if isinstance(each, head_attention.Prefix)]
    length = 9 + (prefixes[0].function.bottleneck if prefixes else 0)
    assert [shape for shape in made if shape[2] == 4] == 5 * [(2, 1, 4, length)]
    assert not head_attention._ADDITIVE._found and not head_attention._WIDENED._found


def test_rows_of_an_additive_mask_are_aligned() -> None:
    mask = torch.tensor([[True, False, True, True, True]]).expand(3, -1)
    found = head_attention.make_additive(mask, torch.bfloat16)
    assert found.stride() == (8, 1)
    assert found.tolist() == 3 * [[0.0, float("-inf"), 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("family", "joins"), [("bart", 2 + 2 + 2), ("llama", 2), ("t5", 2 + (2 + 2) * 5)])
def test_a_prefix_is_joined_once_for_a_text(family: str, joins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer of the encoder, in the cache of each attention of the decoder; T5's, whose keys' places count, at
    every token. When all is generated the prefix is joined as ever."""
    model = attached(family, "mam")
    fold(model)
    calls: list[int] = []
    vectors = head_attention.Prefix.vectors

    def counting(prefix: head_attention.Prefix, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return vectors(prefix, dtype)

    given = inputs(family, (9, 9))
    options = tokens(5, num_beams=3)
    expected = logits(model, family)
    monkeypatch.setattr(head_attention.Prefix, "vectors", counting)
    predicted(model, given, options)
    assert len(calls) == joins
    assert torch.equal(logits(model, family), expected)


class Launches(TorchDispatchMode):
    """Counts the operations that torch is asked for, each of which is a kernel or more on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def count_for_a_token(family: str, preset: str) -> int:
    """Return the operations of one more generated token."""
    model, given = attached(family, preset), inputs(family, (9, 9))
    fold(model)
    counted = []
    for number in (5, 6):
        with Launches() as launches:
            predicted(model, given, tokens(number))
        counted.append(launches.number)
    return counted[1] - counted[0]


@pytest.mark.parametrize(("family", "most"), [("bart", 16), ("t5", 46), ("gpt2", 28), ("llama", 14)])
def test_what_is_merged_costs_nothing_for_a_token(family: str, most: int) -> None:
    """LoRA and IA3 ask for what the bare backbone asks for; MAM, in two layers of the decoder, for a little more."""
    bare = count_for_a_token(family, "bare")
    found = {preset: count_for_a_token(family, preset) - bare for preset in ("lora", "lora_ffn", "ia3", "mam")}
    assert bare > 100 and found["lora"] == found["lora_ffn"] == found["ia3"] == 0
    assert 0 < found["mam"] <= most


def test_a_parallel_adapter_is_a_wider_ffn() -> None:
    """While the model is prepared every FFN takes two matrix products, and no hook of the edit is called."""
    model = attached("bart", "scaled_parallel_adapter")
    with prepare_inference(model):
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        assert not any(isinstance(getattr(hook, "__self__", None), Edit) for hook in hooks)
        with torch.profiler.profile() as profile:
            logits(model, "bart")
    called = {event.key: event.count for event in profile.key_averages()}
    attentions = 2 * 4 + 2 * 8  # projections, in the layers of the encoder and of the decoder
    assert (called["aten::linear"], called.get("aten::addmm_", 0)) == (attentions + 2 * 4 + 1, 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_so_it_is_where_the_activation_is_a_product(family: str, bias: bool) -> None:
    """Three matrix products for each FFN, with as many columns in each factor, and the same logits."""
    model = build(family)
    attach(model, {"": modification("relu", "ffn", "parallel", "scaled", 5, scale=4.0, bias=bias)})
    shake(model)
    expected = logits(model, family)
    with prepare_inference(model):
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        assert not any(isinstance(getattr(hook, "__self__", None), Edit) for hook in hooks)
        with torch.profiler.profile() as profile:
            found = logits(model, family)
    called = {event.key: event.count for event in profile.key_averages()}
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert called["aten::linear"] == len(matrices)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, family), expected)


def of_odd_width(where: str, device: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A parallel adapter whose bottleneck is no multiple of 8, and what to give the model."""
    model = build("bart").to(device)
    attach(model, {"": modification("relu", where, "parallel", "add", 5, bias=True)})
    shake(model)
    return model, {name: tensor.to(device) for name, tensor in batch("bart").items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_a_wider_ffn_are_aligned(device: str) -> None:
    """They begin at multiples of 16 bytes, as a GPU's matrix products want them."""
    model, given = of_odd_width("ffn", device)
    second = find_sites(model).layers[0].ffn.second
    widths: list[int] = []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        expected = model(**given).logits
        with (
            prepare_inference(model, torch.bfloat16),
            second.register_forward_pre_hook(lambda *call: widths.append(call[1][0].shape[-1])),
        ):
            found = model(**given).logits
    assert widths == [second.in_features + 8]
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_queries_beside_a_bottleneck_are_aligned(device: str) -> None:
    """On a GPU attention refuses rows that do not begin at 16 bytes."""
    model, given = of_odd_width("attention", device)
    query = model.get_submodule("model.encoder.layers.0.self_attn.q_proj")
    strides: list[tuple[int, ...]] = []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        expected = model(**given).logits
        with (
            prepare_inference(model, torch.bfloat16),
            query.register_forward_hook(lambda *call: strides.append(call[2].stride())),
        ):
            found = model(**given).logits
    assert len(strides) == 1 and strides[0][-2] % 8 == 0
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("form", ["softmax", "identity"])
def test_what_fills_a_bottleneck_up_is_not_seen(form: str) -> None:
    """A softmax goes across the bottleneck: over r = 5 columns, not over the 8 that are computed."""
    model = build("bart")
    attach(model, {"": modification(form, "ffn", "parallel", "add", 5, bias=True)})
    shake(model, 1.0)
    expected = logits(model, "bart")
    with prepare_inference(model):
        torch.testing.assert_close(logits(model, "bart"), expected, rtol=1e-4, atol=1e-4)


class InFloat32(nn.Softmax):
    """Softmax as CUDA's autocast has it; that of the CPU stays in bfloat16."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.float()).float()


@pytest.mark.parametrize("place", ["ffn", "attention"])
def test_a_form_that_autocast_computes_in_float32(place: str) -> None:
    model = build("bart")
    attach(model, {"": modification("softmax", place, "parallel", "add", 5, bias=True)})
    shake(model)
    for function in (module for module in model.modules() if isinstance(module, Bottleneck)):
        function.f = InFloat32(dim=-1)
    expected = logits(model, "bart", bf16=True)
    with prepare_inference(model, torch.bfloat16):
        assert (logits(model, "bart", bf16=True) - expected).norm() < 0.05 * expected.norm()


def test_a_bfloat16_backbone_is_quick_without_autocast() -> None:
    """Its modifications are computed as it is itself; what is trained stays float32 and what it was."""
    model = build("bart").bfloat16()
    attach(model, PRESETS["mam"])
    shake(model)
    fold(model)
    expected, before = logits(model, "bart"), traces(model)
    with prepare_inference(model):
        assert "forward" in vars(find_sites(model).layers[0].ffn.source)
        difference = logits(model, "bart") - expected
    assert difference.square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()
    assert traces(model) == before
