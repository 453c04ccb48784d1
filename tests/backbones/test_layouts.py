"""Families whose layers are laid out in another way than a row of modules: fused gate and up, queries, keys and values
interleaved by head, capped scores, parallel residuals, attentions without an interface, experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from transformers import AttentionInterface, GenerationConfig, M2M100Tokenizer, NllbTokenizer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftbench.backbones.precision import choose_autocast_dtype
from peftbench.backbones.sites import find_sites
from peftbench.config.schema import DType, Model, Precision, Trainer, Unfreeze
from peftbench.counts.run_counts import count_run
from peftbench.evaluation.inference import prepare_inference
from peftbench.evaluation.kv_cache import make_caches
from peftbench.modification.attach import attach, takes_our_attention
from peftbench.modification.counting import count
from peftbench.modification.edit import Edit
from peftbench.modification.head_attention import attend_modified
from peftbench.modification.merge import find_obstacles, merge
from peftbench.modification.state import fold, load, save
from peftbench.tasks.batch import make_decoder_inputs
from peftbench.tasks.languages import begin_in_language, get_written_language, set_languages
from peftbench.training.arithmetic import count_operations
from peftbench.training.batching import Lengths
from peftbench.training.compiled import CompiledLayers
from peftbench.training.padding_free import PaddingFree, add_lengths, find_refusal
from peftbench.training.token_loss import TokenLoss, find_output_layer
from peftbench.utils.errors import UserError
from tests.families import (
    LAID_OUT_CONTINUING,
    LAID_OUT_WRITING,
    LAYOUTS,
    PRESETS,
    batch,
    build,
    inputs,
    modification,
    run_on,
    shake,
)

AT_HEADS = {"prefix", "prefix_no_gating", "mam", "unipelt", "heads_gate"}
AT_HEADS |= {"mh_parallel_adapter", "mh_parallel_adapter_hidden", "mh_parallel_adapter_normed_query"}
AT_FFNS = {"adapter", "pfeiffer", "lora_ffn", "parallel_adapter", "scaled_parallel_adapter", "mam", "ia3", "unipelt"}
AT_FFNS |= {"learned_scale"}
REFUSED: dict[tuple[str, str], str] = {(family, "prompt"): "modified_representation=embedding" for family in LAYOUTS}
REFUSED |= {(family, "pfeiffer"): "one residual at once" for family in ("gpt_neox", "falcon")}
for _family in ("bloom", "falcon", "mpnet", "deberta", "deberta_v2"):
    REFUSED |= {(_family, preset): "calls no registered attention function" for preset in sorted(AT_HEADS)}
for _family in ("mixtral", "qwen3_moe"):
    REFUSED |= {(_family, preset): "mixtures of experts" for preset in sorted(AT_FFNS)}
REFUSED |= {("deberta", preset): "adds the bias of the" for preset in ("ia3",)}
QUICK = {"lora", "lora_ffn", "mam"}  # one preset for each of query and value, the FFN's matrices, heads


def mark(family: str, preset: str) -> Any:
    """A case; those with other presets are slow."""
    return pytest.param(family, preset, id=f"{family}-{preset}", marks=[] if preset in QUICK else [pytest.mark.slow])


CASES = [mark(family, preset) for family in LAYOUTS for preset in PRESETS if (family, preset) not in REFUSED]
every_case = pytest.mark.parametrize(("family", "preset"), CASES)


def attached(family: str, preset: str, **more: Any) -> PreTrainedModel:
    """The family's tiny model, in evaluation mode, with modifications whose weights are random."""
    model = build(family, **more)
    attach(model, PRESETS[preset])
    shake(model)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    found: Tensor = model(**batch(family)).logits
    return found


@pytest.mark.parametrize(("family", "preset"), REFUSED)
def test_what_a_layout_cannot_do_is_refused_in_a_sentence(family: str, preset: str) -> None:
    with pytest.raises(UserError, match=REFUSED[family, preset]) as caught:
        attach(build(family), PRESETS[preset])
    assert "\n" not in str(caught.value)


@every_case
def test_two_steps_train_every_tensor_and_nothing_else(family: str, preset: str) -> None:
    model = attached(family, preset)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch(family)).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


@every_case
def test_saved_and_loaded_and_in_inference_it_predicts_the_same(family: str, preset: str, tmp_path: Path) -> None:
    model = attached(family, preset)
    expected = logits(model, family)
    assert not torch.allclose(expected, logits(build(family), family), atol=1e-5)
    fold(model)
    save(model, tmp_path)
    again = build(family)
    attach(again, PRESETS[preset])
    fold(again)
    load(again, tmp_path)
    assert torch.allclose(logits(again, family), expected, atol=1e-5)
    with prepare_inference(again):
        assert torch.allclose(logits(again, family), expected, atol=1e-4)


@every_case
def test_padding_changes_nothing(family: str, preset: str) -> None:
    model = attached(family, preset)
    both = batch(family, (9, 6))
    alone = {name: both[name][1:, :6] for name in ("input_ids", "attention_mask")}
    if family in LAID_OUT_WRITING:
        alone["labels"] = both["labels"][1:]
    with torch.no_grad():
        padded, single = model(**both).logits[1], model(**alone).logits[0]
    if family in LAID_OUT_CONTINUING:
        padded = padded[:6]
    assert torch.allclose(padded, single, atol=1e-4 * max(1.0, float(single.abs().max())))


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("preset", ["lora", "lora_ffn"])
def test_merged_predicts_as_unmerged(family: str, preset: str) -> None:
    if (family, preset) in REFUSED:
        pytest.skip("refused")
    model = attached(family, preset)
    expected = logits(model, family)
    assert not find_obstacles(model)
    merge(model)
    assert not any(isinstance(hook, Edit) for m in model.modules() for hook in m._forward_hooks.values())
    assert torch.allclose(logits(model, family), expected, atol=1e-4)


GENERATIONS = [
    case
    for case in CASES
    if case.values[0] in (*LAID_OUT_CONTINUING, *LAID_OUT_WRITING) and case.values[1] in ("mam", "lora", "heads_gate")
]


@pytest.mark.parametrize(("family", "preset"), [*GENERATIONS, ("mixtral", "prefix_no_gating")])
@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_generation_with_cache_equals_without(family: str, preset: str, beams: int) -> None:
    model = attached(family, preset)
    fold(model)
    options = GenerationConfig(num_beams=beams, min_new_tokens=6, max_new_tokens=6, do_sample=False, pad_token_id=1)
    options.eos_token_id, options.decoder_start_token_id = 2, 2
    given = inputs(family)
    options.use_cache = False
    expected = model.generate(**given, generation_config=options)
    options.use_cache = True
    assert torch.equal(model.generate(**given, generation_config=options), expected)
    with prepare_inference(model), make_caches(model, beams) as new:
        assert torch.equal(model.generate(**given, **new(), generation_config=options), expected)


def split(model: PreTrainedModel, family: str) -> list[Tensor]:
    """Queries, keys and values of the first layer, (B, N, T, d_h), as the family's own class takes them apart."""
    attention = find_sites(model).layers[0].attentions[0].module
    seen: list[list[Tensor]] = []

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        seen.append([query, key, value])
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    own = {"bloom": "_reshape", "falcon": "_split_heads"}.get(family)
    if family == "deberta":
        divide: Callable[[Tensor], Tensor] = attention.transpose_for_scores

        def keep_fused(x: Tensor) -> Tensor:
            if x.shape[-1] == attention.in_proj.out_features:
                seen.append(list(divide(x).chunk(3, dim=-1)))  # as its forward does next
            return divide(x)

        attention.transpose_for_scores = keep_fused
        logits(model, family)
        return seen[0]
    if own is None:
        AttentionInterface.register("layouts_test", keep)
        model.set_attn_implementation("layouts_test")
    else:
        method: Callable[[Tensor], Any] = getattr(attention, own)
        setattr(attention, own, lambda fused: seen.append(list(method(fused))) or method(fused))
    logits(model, family)
    return [each.transpose(1, 2) if family == "falcon" else each for each in seen[0]]


FUSED = {
    "phi3": ("phi3", {}),
    "modernbert": ("modernbert", {}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {}),
    "deberta": ("deberta", {}),
    "falcon_40b": ("falcon", {}),
    "falcon_7b": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon_rw": ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
}


@pytest.mark.parametrize("layout", FUSED)
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_an_edit_reaches_the_heads_that_the_class_computes_with(layout: str, part: str) -> None:
    """Δ of one projection is added to its own heads, each to its own, and to no other. At the first position, where a
    rotation does nothing, it is exactly Δ."""
    family, more = FUSED[layout]
    before = split(build(family, **more), family)
    model = build(family, **more)
    attach(model, {"": modification("relu", part, "parallel", "add", bias=True, init="bert")})
    shake(model)
    (edit,) = [m for n, m in find_sites(model).layers[0].attentions[0].query.named_modules() if isinstance(m, Edit)]
    deltas: list[Tensor] = []
    edit.function.register_forward_hook(lambda module, args, out: deltas.append(out))
    after = split(model, family)
    for name, old, new in zip(("query", "key", "value"), before, after, strict=True):
        if name != part:
            assert torch.equal(old, new)
            continue
        heads = deltas[0][:, 0].unflatten(-1, (-1, old.shape[-1]))  # (B, heads, d_h)
        heads = heads.repeat_interleave(old.shape[1] // heads.shape[1], dim=1)  # Falcon repeats keys and values
        assert torch.allclose(new[:, :, 0] - old[:, :, 0], heads, atol=1e-5)
        assert heads.abs().min(-1).values.max() > 0


@pytest.mark.parametrize(("family", "names"), [("phi3", ["gate_proj", "up_proj"]), ("modernbert", ["input", "gate"])])
def test_fused_gate_and_up_are_two_matrices(family: str, names: list[str]) -> None:
    """LoRA at the FFN's weights has a Δ for each of W_gate, W_up and W_down: r (d + d_ff) each, in both layers."""
    model = attached(family, "lora_ffn")
    r, d, d_ff = 8, 16, 32
    assert count(model).paper == count(model).trained == 2 * 3 * r * (d + d_ff)
    ffn = find_sites(model).layers[0].ffn
    assert [*ffn.first] == names
    x = torch.randn(2, d)
    with torch.no_grad():
        changed = ffn.source(x) - x @ ffn.source.weight.T
        for index, name in enumerate(names):
            (edit,) = ffn.source.get_submodule(name).children()
            assert torch.allclose(changed[:, d_ff * index :][:, :d_ff], 4.0 * edit.function(x), atol=1e-5)


def test_counts_of_interleaved_projections_are_those_of_single_ones() -> None:
    """r (d + d_out) for the query and the value; Falcon-40B's values have 2 heads of width 4."""
    assert count(attached("gpt_neox", "lora")).paper == 2 * 2 * 8 * (16 + 16)
    assert count(attached("falcon", "lora")).paper == 2 * 8 * (16 + 16 + 16 + 8)
    assert count(attached("bloom", "ia3")).paper == 2 * (16 + 16 + 64)


@pytest.mark.parametrize("family", ["gemma2", "modernbert", "phi3", "gpt_neox", "m2m_100", "mixtral"])
def test_our_attention_function_computes_the_familys_own(family: str) -> None:
    """Heads with a Δ of zero: caps, windows and scales are those of the class's own attention."""
    model, plain = build(family), build(family)
    attach(model, {"": modification("relu", "heads", "parallel", "add", init="lora")})
    plain.set_attn_implementation("eager")
    expected = logits(plain, family)
    assert torch.allclose(logits(model, family), expected, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_a_cap_counts_where_it_is() -> None:
    """The tiny model's caps are low enough that the test above would see a forgotten one."""
    one, other = build("gemma2"), build("gemma2", attn_logit_softcapping=1e4)
    assert not torch.allclose(logits(one, "gemma2"), logits(other, "gemma2"), atol=1e-3)


def test_a_prefix_before_capped_scores() -> None:
    """Eq. 5 written out: c tanh(q K^T scaling / c) over the prefix's keys and those of the text."""
    model = attached("gemma2", "prefix", sliding_window=64)
    fold(model)
    attention = find_sites(model).layers[0].attentions[0]
    (prefix,) = attention.module.head_modifications.values()
    p_k, p_v = prefix.vectors(torch.float32)
    q, k, v = (torch.randn(1, heads, 5, 6) for heads in (4, 2, 2))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    found, _ = attend_modified(attention.module, q, k, v, causal, scaling=0.4, softcap=0.5)
    for head in range(4):
        keys, values = torch.cat([p_k[head // 2], k[0, head // 2]]), torch.cat([p_v[head // 2], v[0, head // 2]])
        scores = 0.5 * torch.tanh(q[0, head] @ keys.T * 0.4 / 0.5)
        scores[:, len(p_k[0]) :][~causal[0, 0]] = -torch.inf
        assert torch.allclose(found[0, :, head], scores.softmax(-1) @ values, atol=1e-5)


@pytest.mark.parametrize("family", [*LAID_OUT_CONTINUING, *LAID_OUT_WRITING])
def test_the_fused_loss_is_the_models_own_or_is_not_taken(family: str) -> None:
    """Gemma 2 caps its logits after the output layer. M2M100 makes its decoder's input from the labels."""
    model = attached(family, "lora")
    layer = find_output_layer(model)
    if layer is not None:
        given = batch(family)
        with torch.no_grad():
            assert torch.allclose(TokenLoss(model, layer, 0.0)(given), model(**given).loss, atol=1e-5)


def test_labels_become_decoder_inputs_as_in_m2m100s_forward_pass() -> None:
    model, labels = build("m2m_100"), torch.tensor([[7, 8, 2], [9, 2, -100]])
    assert make_decoder_inputs(model, labels).tolist() == [[2, 7, 8], [2, 9, 2]]
    given = {name: tensor for name, tensor in batch("m2m_100").items() if name != "labels"}
    with torch.no_grad():
        expected = model(**given, labels=labels).logits
        assert torch.equal(model(**given, decoder_input_ids=make_decoder_inputs(model, labels)).logits, expected)


@pytest.mark.parametrize("family", LAYOUTS)
def test_without_padding_the_loss_is_the_same_or_it_is_refused(family: str) -> None:
    """Decoders are told their positions. Others count the batch with its padding."""
    model = attached(family, "lora")
    if find_refusal(model, 9) is not None:
        with pytest.raises(UserError, match=r"trainer\.padding_free=true is not supported for"):
            PaddingFree(model, 9, 5)
        return
    both = batch(family)
    expected = logits(model, family)
    free = PaddingFree(model, 9, 0)
    with torch.no_grad(), free.active():
        found = model(**free.load(add_lengths(lambda _: both, joined=True)([]))).logits
    seen = both["attention_mask"].bool()
    assert torch.allclose(found[seen], expected[seen], atol=1e-4 * max(1.0, float(expected.abs().max())))


def test_the_places_of_deberta_read_the_tokens_not_the_relative_positions() -> None:
    """v3's query and key projections also run on the relative embeddings, after they ran on the tokens."""
    model = build("deberta_v2")
    attach(model, PRESETS["parallel_adapter_attention"])
    attention = find_sites(model).layers[0].attentions[0]
    (edit,) = [each for each in attention.output.modules() if isinstance(each, Edit)]
    seen: list[tuple[int, ...]] = []
    edit.function.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    logits(model, "deberta_v2")
    assert seen == [(2, 9, 16)]
    assert not takes_our_attention(model)


NEED_ALL_OF_H = [
    ("sequential", "add", "relu", "insertion_form=sequential reads h, with its bias; use insertion_form=parallel"),
    ("sequential", "gated_add", "constant", "insertion_form=sequential reads h, with its bias"),  # for its gate
    ("parallel", "gated", "relu", "composition_function=gated changes all of h, with its bias; use composition_funct"),
    ("parallel", "multiply", "constant", "composition_function=multiply changes all of h, with its bias"),
]


@pytest.mark.parametrize(("insertion", "composition", "form", "sentence"), NEED_ALL_OF_H)
def test_what_needs_a_bias_that_deberta_adds_later_is_refused(
    insertion: str, composition: str, form: str, sentence: str
) -> None:
    """Its key has no bias, and v2's projections have their own."""
    size = {} if form == "constant" else {"bottleneck": 4}

    def point(representation: str) -> dict[str, Any]:
        return {"": modification(form, representation, insertion, composition, **size)}

    for part in ("query", "value"):
        with pytest.raises(UserError, match=rf"adds the bias of the {part} after its projection, and {sentence}"):
            attach(build("deberta"), point(part))
    attach(build("deberta"), point("key"))
    attach(build("deberta"), point("attention"))
    attach(build("deberta_v2"), point("value"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_class_that_fails_under_autocast_is_refused_there(dtype: torch.dtype) -> None:
    """As long as transformers' own DeBERTa does fail."""
    trainer, model = Trainer(learning_rate=1e-3, precision=Precision.bf16), Model(name="deberta")
    with pytest.raises(UserError, match=r"trainer\.precision=bf16: transformers' deberta cannot compute in 16 bits"):
        choose_autocast_dtype(trainer, model, build("deberta"))
    assert choose_autocast_dtype(trainer, replace(model, dtype=DType.bfloat16), build("deberta")) is None
    assert choose_autocast_dtype(trainer, model, build("deberta_v2")) is torch.bfloat16
    with torch.autocast("cpu", dtype), pytest.raises(RuntimeError, match="without overflow"):
        logits(build("deberta"), "deberta")


def test_bitfit_trains_the_biases_that_deberta_adds_itself() -> None:
    model = build("deberta")
    attach(model, {}, Unfreeze.bias)
    trained = {name for name, p in model.deberta.named_parameters() if p.requires_grad}
    every = {name for name, p in model.deberta.named_parameters() if "bias" in name}
    assert trained == every and sum(name.endswith(("q_bias", "v_bias")) for name in trained) == 4


def test_operations_count_the_experts_that_a_token_passes() -> None:
    """2 of 4 experts: 4 operations for each of half their weights, forward and backward through frozen matrices."""
    d, d_ff, experts = 16, 32, 4
    every = count_operations(
        build("mixtral", num_experts_per_tok=4).requires_grad_(False), Lengths([6], [], joined=True)
    )
    half = count_operations(build("mixtral").requires_grad_(False), Lengths([6], [], joined=True))
    assert every - half == 2 * 6 * 4 * (experts / 2) * 3 * d * d_ff


def test_blooms_dropout_is_drawn_once_and_before_the_modified_output() -> None:
    """Its sub-layers call F.dropout themselves: wrapped, the same seed gives the same training loss."""
    plain, model = build("bloom", hidden_dropout=0.3), build("bloom", hidden_dropout=0.3)
    attach(model, {"": modification("relu", "ffn", "parallel", "add", init="lora", dropout=0.0)})
    losses = []
    for each in (plain, model):
        torch.manual_seed(5)
        losses.append(each.train()(**batch("bloom")).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] != pytest.approx(plain.eval()(**batch("bloom")).loss.item(), abs=1e-4)


def nllb(**more: Any) -> NllbTokenizer:
    """A tokenizer of a few letters and two languages."""
    words = {word: index for index, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", *"\u2581abcdef"))}
    codes = ["eng_Latn", "ron_Latn"]
    return NllbTokenizer(vocab=words, merges=[], extra_special_tokens=codes, src_lang="eng_Latn", **more)


def test_nllb_is_forced_to_write_the_language_first() -> None:
    tokenizer, model = nllb(), build("m2m_100")
    set_languages(tokenizer, "eng_Latn", "ron_Latn")
    begin_in_language(model, tokenizer)
    english, romanian = tokenizer.convert_tokens_to_ids(["eng_Latn", "ron_Latn"])
    assert tokenizer("ab")["input_ids"][0] == english
    labels = torch.tensor([tokenizer(text_target="ab")["input_ids"]])
    assert labels[0, 0] == romanian == get_written_language(tokenizer)
    assert make_decoder_inputs(model, labels)[0, :2].tolist() == [2, romanian]
    options = model.generation_config
    assert options is not None and options.forced_bos_token_id == romanian
    options.max_new_tokens = 3
    assert model.generate(torch.tensor([[5, 6, 2]]))[0, :2].tolist() == [2, romanian]


def test_a_code_after_a_text_is_refused_where_it_is_not_read() -> None:
    tokenizer = nllb(legacy_behaviour=True)
    set_languages(tokenizer, "eng_Latn", "ron_Latn")
    with pytest.raises(UserError, match="set legacy_behaviour to false"):
        begin_in_language(build("m2m_100"), tokenizer)


def test_m2m100_names_its_languages_without_underscores(tmp_path: Path) -> None:
    """Its token of ro is __ro__."""
    pieces = pytest.importorskip("sentencepiece")
    text, words = tmp_path / "text", {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    text.write_text("the cat sat on the mat\no pisica sta\n" * 20)
    spm = {"model_prefix": str(tmp_path / "spm"), "vocab_size": 20, "hard_vocab_limit": False}  # at most 20
    pieces.SentencePieceTrainer.train(input=str(text), **spm)
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    tokenizer, model = M2M100Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "spm.model")), build("m2m_100")
    set_languages(tokenizer, "en", "ro")
    begin_in_language(model, tokenizer)
    assert tokenizer("cat")["input_ids"][0] == tokenizer.get_lang_id("en")
    assert get_written_language(tokenizer) == tokenizer.get_lang_id("ro")
    assert model.generation_config is not None
    assert model.generation_config.forced_bos_token_id == tokenizer.get_lang_id("ro")
    with pytest.raises(UserError, match=r"task\.target_language=ron_Latn is unknown"):
        set_languages(tokenizer, None, "ron_Latn")


@every_case
def test_groups_of_a_run_sum_to_the_counts_of_the_model(family: str, preset: str, tmp_path: Path) -> None:
    """Counted without weights, group by group, as `params` prints them."""
    found = count_run(run_on(family, tmp_path, PRESETS[preset]))
    expected = count(attached(family, preset))
    for name in ("trained", "stored", "paper"):
        assert sum(getattr(group, name) for group in found.groups) == getattr(found.totals, name)
        assert getattr(found.totals, name) == getattr(expected, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("phi3", "mam"),
        ("modernbert", "mam"),
        ("gemma2", "mam"),
        ("gpt_neox", "lora"),
        ("bloom", "ia3"),
        ("falcon", "lora"),
    ],
)
def test_compiled_layers_compute_the_same(family: str, preset: str) -> None:
    graphs = 0

    def backend(graph: Any, example: Any, **options: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, example)

    model = attached(family, preset)
    outcomes: list[list[Tensor]] = []
    layers = CompiledLayers(model, backend=backend)
    for compiled in (False, True):
        model.zero_grad()
        with layers.active() if compiled else nullcontext():
            out = model(**batch(family))
            out.loss.backward()
        outcomes.append([out.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert bool(graphs) is compiled
    assert len(outcomes[0]) > 1
    for plain, other in zip(*outcomes, strict=True):
        assert torch.allclose(plain, other, atol=1e-4 * max(1.0, float(plain.detach().abs().max())))


def test_layers_that_bypass_their_modules_are_refused() -> None:
    model = build("bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(UserError, match="slow_but_exact=true"):
        attach(model, PRESETS["lora"])
