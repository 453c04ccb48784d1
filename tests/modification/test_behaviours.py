"""What every method has to do on every family: one table of presets and families, one test for each behaviour.

Training, evaluation, generation, saving, folding, padding, copying, checkpointing and reduced precision; then the
options of a modification, and the presets in conf/. The points of the axes are in test_points.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peftbench.backbones.sites import find_sites
from peftbench.config import schema
from peftbench.config.compose import compose_run
from peftbench.modification import state
from peftbench.modification.attach import attach
from peftbench.modification.edit import Edit
from peftbench.modification.head_attention import HeadModification
from peftbench.modification.prompt import Prompt
from peftbench.training.fit import checkpoint_gradients
from peftbench.utils.errors import UserError
from tests.families import (
    ALIKE,
    FAMILIES,
    GENERATING,
    NEAR,
    PLACES,
    PRESETS,
    batch,
    build,
    cases,
    dropout,
    list_methods,
    long_tail,
    modification,
    points,
    shake,
    table,
)

Modifications = dict[str, schema.Modification]
TABLE = table(FAMILIES)
# Where the family matters little: each preset on BART, each kind of place on RoBERTa too, which computes there what
# BART does. The pairs that are left out differ from these in neither.
ON_BART = [case for case in TABLE if case.values[0] == "bart"]
PLACES_ON_BART, PLACES_ON_ROBERTA = (
    [case for case in TABLE if case.values[0] == family and case.values[1] in PLACES] for family in ("bart", "roberta")
)
TWO_FAMILIES = [*ON_BART, *PLACES_ON_ROBERTA]
OTHERS = [case for case in TABLE if case.values[0] not in ("bart", "roberta")]
MORE = [  # one fused and sliced projection, grouped and rotary heads, position biases
    pytest.param(family, preset, id=f"{family}-{preset}")
    for family, presets in {
        "gpt2": ("lora", "lora_ffn", "mam", "adapter"),
        "llama": ("lora", "mam"),
        "t5": ("mam",),
    }.items()
    for preset in presets
]
every_method_on_every_family = pytest.mark.parametrize(("family", "preset"), TABLE)


def attached(
    family: str, modifications: Modifications, *, shaken: bool = True, dropouts: bool = False, **more: int
) -> PreTrainedModel:
    """The family's tiny model, always with the same backbone, with modifications whose weights are random."""
    model = build(family, **({} if dropouts else dropout(family)), **more)
    attach(model, modifications)
    if shaken:
        shake(model)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    out: Tensor = model.eval()(**batch(family)).logits
    return out


def gradients(model: PreTrainedModel, family: str, seed: int = 7) -> dict[str, Tensor | None]:
    """Of the loss in training mode, under one seed, for each trained tensor."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    model(**batch(family)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def tensors(model: PreTrainedModel, *, trained: bool) -> dict[str, Tensor]:
    """Copies of the parameters that are trained, or of all that must stay as it is."""
    found = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad is trained}
    return found if trained else found | {name: tensor.clone() for name, tensor in model.named_buffers()}


def take_steps(model: PreTrainedModel, family: str, steps: int = 2) -> list[float]:
    """Train a little; the loss at each step."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(**batch(family)).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def without_gradient(found: dict[str, Tensor | None]) -> list[str]:
    return [name for name, gradient in found.items() if gradient is None or not gradient.any()]


# ---- training ----


@every_method_on_every_family
def test_training_changes_what_is_trained_and_nothing_else(family: str, preset: str) -> None:
    """From the method's own initialisation: the loss falls, every trained tensor moves, the backbone does not."""
    model = attached(family, PRESETS[preset], shaken=False)
    frozen, trained = tensors(model, trained=False), tensors(model, trained=True)
    losses = take_steps(model, family, steps=3)
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    assert [name for name, tensor in trained.items() if torch.equal(tensor, now[name])] == []
    assert [name for name, tensor in frozen.items() if not torch.equal(tensor, now[name])] == []
    assert frozen and trained


@every_method_on_every_family
def test_every_trained_tensor_gets_a_gradient_also_after_an_evaluation(family: str, preset: str) -> None:
    """Nothing is kept from an evaluation: the gradients behind one are the same to the bit."""
    model = attached(family, PRESETS[preset], dropouts=True)
    before = gradients(model, family)
    assert without_gradient(before) == []
    logits(model, family)
    with state.fold_tensors(model):
        logits(model, family)
    after = gradients(model, family)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("unfreeze", [schema.Unfreeze.bias, schema.Unfreeze.norm, schema.Unfreeze.all])
@pytest.mark.parametrize("family", FAMILIES)
def test_bitfit_and_full_train_the_backbones_own_parameters(family: str, unfreeze: schema.Unfreeze) -> None:
    """Exactly the named ones move; a key projection's bias has no gradient but rounding, since softmax ignores it."""
    model = build(family, **dropout(family))
    attach(model, {}, unfreeze)
    frozen, trained = tensors(model, trained=False), tensors(model, trained=True)
    heads = ("classifier", "classification_head")
    named = {name for name, _ in model.named_parameters()}
    expected = {
        schema.Unfreeze.bias: {name for name in named if name.endswith(".bias") or name.startswith(heads)},
        schema.Unfreeze.norm: {name for name in named if "norm" in name.lower() or name.startswith(heads)},
        schema.Unfreeze.all: named,
    }
    assert set(trained) == expected[unfreeze]
    assert [name for name, gradient in gradients(model, family).items() if gradient is None] == []
    take_steps(model, family)
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    unmoved = [name for name, tensor in trained.items() if torch.equal(tensor, now[name])]
    assert [name for name in unmoved if not name.endswith(("k_proj.bias", "key.bias"))] == []
    assert [name for name, tensor in frozen.items() if not torch.equal(tensor, now[name])] == []


@pytest.mark.parametrize(
    ("family", "preset", "reentrant"),
    [
        *[pytest.param(*case.values, False, id=f"{case.id}-not_reentrant") for case in (*TWO_FAMILIES, *MORE)],
        *[pytest.param(*case.values, False, id=f"{case.id}-not_reentrant", marks=pytest.mark.slow) for case in OTHERS],
        *[pytest.param(*case.values, True, id=f"{case.id}-reentrant") for case in (*PLACES_ON_ROBERTA, *MORE)],
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, preset: str, reentrant: bool) -> None:
    """Layers that run twice in a step compute what they compute once, and keep no x behind."""
    model = attached(family, PRESETS[preset])
    plain = gradients(model, family)
    if reentrant:
        model.enable_input_require_grads()
    checkpoint_gradients(model, reentrant)
    runs: list[int] = []
    find_sites(model).layers[0].ffn.source.register_forward_hook(lambda *args: runs.append(1))
    checkpointed = gradients(model, family)
    assert len(runs) == 2
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (checkpointed[name] - gradient).abs().max() <= 1e-6 * max(1.0, float(gradient.abs().max())), name
    assert [m for m in model.modules() if isinstance(m, (Edit, HeadModification)) and m._x is not None] == []


# ---- evaluation and generation ----


@every_method_on_every_family
def test_padding_changes_nothing(family: str, preset: str) -> None:
    """A row alone, with no mask at all, and the same row padded in a batch beside a longer one.

    Decoders get padded inputs too. Without a mask transformers would leave causality to the kernel.
    """
    model = attached(family, PRESETS[preset])
    padded = batch(family, (9, 6))
    alone = {"input_ids": padded["input_ids"][1:, :6]}
    width = slice(None)
    if family in GENERATING:
        decoder = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(decoder)
        decoder[1, 4:], mask[1, 4:] = 1, 0
        padded |= {"decoder_input_ids": decoder, "decoder_attention_mask": mask}
        alone["decoder_input_ids"] = decoder[1:, :4]
        width = slice(4)
    padded.pop("labels")
    with torch.no_grad():
        together, by_itself = model(**padded).logits[1:], model(**alone).logits
        unmasked = model(**{**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}).logits[1:]
    if family in GENERATING:
        together, unmasked = together[:, width], unmasked[:, width]
    assert (together - by_itself).abs().max() < 1e-4
    assert (together - unmasked).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_stands_before_the_tokens_and_is_seen_by_all(family: str) -> None:
    """Against the bare model run by hand on LN([P; E(x)]): prompts take no position, padding stays unseen, decoders see
    the prompts too, and a head that reads the first token of an encoder still finds it."""
    model = attached(family, PRESETS["prompt"])
    (vectors,) = (module.vectors for module in model.modules() if isinstance(module, Prompt))
    inputs, length = batch(family), vectors.shape[0]
    bare = attached(family, {})
    bare.load_state_dict(model.state_dict(), strict=False)
    sites = find_sites(bare)
    norm = sites.embedding["encoder"]
    embedded: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    logits(bare, family)
    handle.remove()

    mask = torch.cat([torch.ones(2, length, dtype=torch.long), inputs["attention_mask"]], dim=1)
    with torch.no_grad():
        h = norm(torch.cat([vectors.expand(2, -1, -1), embedded[0]], dim=1))
        for layer in sites.layers:
            if layer.stack == "encoder":
                h = layer.module(h, attention_mask=mask[:, None, None].bool().expand(-1, -1, mask.shape[1], -1))
        if family == "mbart":
            h = bare.model.encoder.layer_norm(h)
        if family == "roberta":
            expected = bare.classifier(h[:, length:])
        elif family == "bert":
            expected = bare.classifier(bare.bert.pooler(h[:, length:]))
        else:
            expected = bare(**{**inputs, "attention_mask": mask}, encoder_outputs=BaseModelOutput(h)).logits
    assert (logits(model, family) - expected).abs().max() < 1e-5
    assert (logits(bare, family) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bart", "roberta", "t5"])
def test_two_prompts_are_one_longer_prompt(family: str) -> None:
    """The second one stands before the first; the batch is padded."""
    found = {length: modification("softmax", "embedding", "parallel", "gated", length) for length in (2, 3, 5)}
    two, one = attached(family, {"": found[2], "mix.second.": found[3]}), attached(family, {"": found[5]})
    first, second = (module.vectors for module in two.modules() if isinstance(module, Prompt))
    (both,) = (module.vectors for module in one.modules() if isinstance(module, Prompt))
    both.data = torch.cat([second.data, first.data])
    for name, parameter in one.named_parameters():  # the task head
        if parameter is not both:
            parameter.data = two.get_parameter(name).data
    assert torch.allclose(logits(two, family), logits(one, family), atol=1e-5)


@pytest.mark.parametrize(("family", "preset"), cases(GENERATING))
def test_generation_with_the_cache_equals_generation_without(family: str, preset: str) -> None:
    """The same tokens and, at each step, the same scores; the inputs of the encoder are padded. Beams are reordered in
    the cache; one alone is compared with a forward pass below."""
    model = attached(family, PRESETS[preset])
    inputs = {name: tensor for name, tensor in batch(family).items() if name != "labels"}
    found = [
        model.generate(
            **inputs,
            num_beams=4,
            use_cache=cached,
            min_new_tokens=5,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for cached in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert found[0].sequences.shape == (2, 6)
    for cached, recomputed in zip(found[0].scores, found[1].scores, strict=True):
        finite = recomputed.isfinite()
        assert torch.equal(cached.isfinite(), finite)
        assert (cached[finite] - recomputed[finite]).abs().max() < 1e-4
    assert found[0].past_key_values is not None and found[1].past_key_values is None


@pytest.mark.parametrize(("family", "preset"), cases(GENERATING))
def test_generation_scores_as_a_forward_pass_does(family: str, preset: str) -> None:
    """Token by token with the cache gives the logits of the whole sequence at once."""
    model = attached(family, PRESETS[preset])
    inputs = {name: tensor for name, tensor in batch(family).items() if name != "labels"}
    found = model.generate(
        **inputs, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=found.sequences[:, :-1]).logits
    assert (torch.stack(found.logits, dim=1) - whole).abs().max() < 1e-4


# ---- folding, saving, copying ----


@pytest.mark.parametrize(("family", "preset"), [*TABLE, *MORE])
def test_saved_and_loaded_into_a_fresh_model(family: str, preset: str, tmp_path: Path) -> None:
    """The file is all that a run needs beside the backbone; folding the prefix's MLP away changes nothing."""
    model = attached(family, PRESETS[preset])
    trained = logits(model, family)
    state.fold(model)
    assert not any("generator" in name for name, _ in model.named_parameters())
    stored = logits(model, family)
    assert (trained - stored).abs().max() < 1e-6 * max(1.0, float(trained.abs().max()))
    state.save(model, tmp_path)

    fresh = build(family)
    torch.manual_seed(99)
    attach(fresh, PRESETS[preset])
    assert not torch.allclose(logits(fresh, family), stored, atol=1e-3)
    state.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, family), stored)


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    """As any file that one writes: a colleague on the same cluster evaluates it."""
    (tmp_path / "any").touch()
    state.save(attached("bart", PRESETS["lora"]), tmp_path)
    assert (tmp_path / state.FILE_NAME).stat().st_mode == (tmp_path / "any").stat().st_mode


def test_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    """One sentence for a missing file, for other tensors, for other shapes; the model is left as it was."""
    model = attached("bart", PRESETS["lora"])
    with pytest.raises(UserError, match="is missing"):
        state.load(model, tmp_path)
    state.save(model, tmp_path)
    with pytest.raises(UserError, match="was trained with other settings: 8 tensors"):
        state.load(attached("bart", PRESETS["lora"] | {"mix.more.": modification("relu", "ffn")}), tmp_path)
    other = attached("bart", {"": modification("identity", "query_value", "parallel", "scaled", 7)})
    before = tensors(other, trained=True)
    with pytest.raises(UserError, match=r"has shape \(1, 8, 16\), but the model needs \(1, 7, 16\)"):
        state.load(other, tmp_path)
    assert all(torch.equal(tensor, dict(other.named_parameters())[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    "preset", [preset for preset, made in PRESETS.items() if any(m.prefix_mlp for m in made.values())]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_for_a_while_puts_the_mlp_back(family: str, preset: str) -> None:
    """Inside the block the prefixes are plain tensors; afterwards, also after an error, the very same MLP is there."""
    model = attached(family, PRESETS[preset])
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    expected, made = logits(model, family), state.list_bottlenecks(model)
    with pytest.raises(KeyError), state.fold_tensors(model):
        assert all(bottleneck.generator is None for bottleneck in made)
        assert (logits(model, family) - expected).abs().max() < 1e-6 * max(1.0, float(expected.abs().max()))
        raise KeyError
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(id(after[name]) == identity for name, (identity, _) in before.items())
    assert all(torch.equal(after[name], tensor) for name, (_, tensor) in before.items())
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize(
    ("family", "preset", "copied"),
    [
        *[pytest.param(*case.values, copy.deepcopy, id=f"{case.id}-deepcopy") for case in (*TWO_FAMILIES, *MORE)],
        *[pytest.param("roberta", preset, pickled, id=f"roberta-{preset}-pickle") for preset in PLACES],
    ],
)
def test_a_copy_is_a_model_of_its_own(
    family: str, preset: str, copied: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    """It computes the same, and training it leaves the original untouched."""
    model = attached(family, PRESETS[preset])
    expected = logits(model, family)
    gradients(model, family)
    model.zero_grad()
    twin = copied(model)
    assert torch.equal(logits(twin, family), expected)
    take_steps(twin, family)
    assert not torch.equal(logits(twin, family), expected)
    assert torch.equal(logits(model, family), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- precision ----


@pytest.mark.parametrize(
    ("family", "preset", "backbone"),
    [
        *[pytest.param(*case.values, torch.float32, id=f"{case.id}-autocast") for case in (*TWO_FAMILIES, *MORE)],
        *[
            pytest.param(*case.values, torch.float32, id=f"{case.id}-autocast", marks=pytest.mark.slow)
            for case in OTHERS
        ],
        *[
            pytest.param(*case.values, torch.bfloat16, id=f"{case.id}-bf16_backbone")
            for case in (*PLACES_ON_BART, *PLACES_ON_ROBERTA, *MORE)
        ],
    ],
)
def test_bf16_agrees_with_fp32(family: str, preset: str, backbone: torch.dtype) -> None:
    """Under autocast, with the frozen weights in either precision; what is trained stays float32.

    A classifier on a bf16 backbone needs autocast, since its head is trained and so float32. A generator does not.
    """
    exact = attached(family, PRESETS[preset], shaken=False)
    shake(exact, 0.1)
    expected = logits(exact, family)
    model = build(family, **dropout(family)).to(backbone)
    attach(model, PRESETS[preset])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {backbone}
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if name in trained:
                trained[name].copy_(parameter)

    plain = family in GENERATING and backbone is torch.bfloat16
    for autocast in (True, False) if plain else (True,):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**batch(family))
        out.loss.backward()
        assert (out.logits.float() - expected).norm() < 0.05 * max(1.0, float(expected.norm()))
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trained.values())
        assert without_gradient({name: parameter.grad for name, parameter in trained.items()}) == []


# ---- options of a modification ----


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"bias": True, "layer_norm": "output"}, id="bias_and_norm", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", long_tail(FAMILIES, "roberta"))
def test_zero_initialised_modifications_leave_the_backbone_as_it_is(family: str, options: dict[str, object]) -> None:
    """Init lora with all but gated: Δh = 0, to the bit, wherever it joins h. A family that is laid out as another one
    takes every place once: it decides on nothing else."""
    expected = logits(build(family), family)
    forms = ("relu",) if options else ("relu", "constant")
    at_rest = {name: m for name, m in points(*forms, init="lora", **options) if not name.endswith("-gated")}
    assert len(at_rest) == 15 * 2 * 4 - 4 - 1 + (0 if options else 15 * 4 - 1 - 3 * 2)
    if family in ALIKE | NEAR:
        of_place: dict[tuple[str, ...], list[str]] = {}
        for name in at_rest:
            of_place.setdefault(tuple(name.split("-")[1:3]), []).append(name)
        chosen = (names[turn % len(names)] for turn, names in enumerate(of_place.values()))  # compositions in turn
        at_rest = {name: at_rest[name] for name in chosen}
        assert len(at_rest) == 15 * 2 - 1  # the layer has no parallel
    for name, m in at_rest.items():
        model = attached(family, {"": m}, shaken=False)
        assert torch.equal(logits(model, family), expected), name
        shake(model)
        assert not torch.allclose(logits(model, family), expected, atol=1e-3), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["lora", "lora_ffn", "scaled_parallel_adapter", "ia3"])
def test_zero_initialised_presets_leave_the_backbone_as_it_is(family: str, preset: str) -> None:
    """Those of the paper that begin as a no-op."""
    model = attached(family, PRESETS[preset], shaken=False)
    assert torch.equal(logits(model, family), logits(build(family), family))


OPTIONS: dict[str, Modifications] = {
    "layer_norm_input": {"": modification("relu", "ffn", layer_norm="input", init="bert")},
    "layer_norm_output": {"": modification("relu", "attention", "sequential", layer_norm="output")},
    "layer_norm_of_heads": {"": modification("relu", "heads", layer_norm="input", bias=True)},
    "bias_of_heads": {"": modification("relu", "heads", "sequential", bias=True)},
    "bias_of_prefix": {"": modification("softmax", "heads", composition="add", bias=True, prefix_mlp=8)},
    "scaled_prefix": {"": modification("softmax", "heads", composition="scaled", learned=True, prefix_mlp=8)},
    "prefix_without_mlp": {"": modification("softmax", "heads", composition="gated", init="bert")},
    "learned_scale_of_lora": {"": modification("identity", "query_value", composition="scaled", learned=True)},
    "bias_at_the_layer": {"": modification("constant", "layer", "sequential", "add")},
    "scale_of_heads": {"": modification("constant", "heads", "sequential", "multiply")},
    "gate_on_a_constant": {"": modification("constant", "attention", "sequential", "gated_add", init="bert")},
    "gate_on_heads": {"": modification("relu", "heads", composition="gated_add", init="bert", head_input="hidden")},
    "multiplied_by_an_adapter": {"": modification("relu", "ffn_intermediate", composition="multiply", init="bert")},
    "gate_of_ffn_weights": {"": modification("gelu", "ffn_weights", composition="gated", bias=True)},
    "two_at_one_place": {
        "": modification("relu", "attention", "sequential"),
        "mix.second.": modification("identity", "attention", "parallel", "scaled", learned=True),
    },
    "two_at_the_heads": {
        "": modification("softmax", "heads", composition="gated", init="bert"),
        "mix.second.": modification("relu", "heads", composition="add", head_input="hidden"),
    },
    "prompt_and_prefix": {
        "": modification("softmax", "embedding", composition="gated"),
        "mix.second.": modification("softmax", "heads", composition="gated", prefix_mlp=8),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ALIKE])
def test_options_train(family: str, options: str) -> None:
    """Two steps from the initialisation move every tensor; shaken, each has a gradient, and cached decoding agrees."""
    model = attached(family, OPTIONS[options], shaken=False)
    before = tensors(model, trained=True)
    take_steps(model, family, steps=2)
    now = dict(model.named_parameters())
    assert [name for name, tensor in before.items() if torch.equal(tensor, now[name])] == []
    shake(model)
    assert without_gradient(gradients(model, family)) == []
    if family in GENERATING:
        inputs = {name: tensor for name, tensor in batch(family).items() if name != "labels"}
        model.eval()
        cached, recomputed = (
            model.generate(**inputs, do_sample=False, max_new_tokens=4, use_cache=cached) for cached in (True, False)
        )
        assert torch.equal(cached, recomputed)


def places(model: PreTrainedModel) -> set[str]:
    """The modules that carry a modification, relative to the base model."""
    ends = (".modification", ".head_modifications")
    names = {n for n, _ in model.named_parameters() if any(f"{end}." in n for end in ends)}
    cut = {min((n.partition(f"{end}.")[0] for end in ends), key=len) for n in names}
    return {name.split(".", 1)[1] for name in cut}


SUBSETS = {
    ("bart", "attention", "stacks=encoder"): {f"encoder.layers.{i}.self_attn.out_proj" for i in (0, 1)},
    ("bart", "attention", "stacks=decoder"): {
        f"decoder.layers.{i}.{kind}.out_proj" for i in (0, 1) for kind in ("self_attn", "encoder_attn")
    },
    ("bart", "attention", "attentions=cross"): {f"decoder.layers.{i}.encoder_attn.out_proj" for i in (0, 1)},
    ("bart", "attention", "attentions=self"): {
        f"{stack}.layers.{i}.self_attn.out_proj" for stack in ("encoder", "decoder") for i in (0, 1)
    },
    ("bart", "attention", "layers=-1"): {
        "encoder.layers.1.self_attn.out_proj",
        "decoder.layers.1.self_attn.out_proj",
        "decoder.layers.1.encoder_attn.out_proj",
    },
    ("bart", "attention", "stacks=decoder attentions=cross layers=0"): {"decoder.layers.0.encoder_attn.out_proj"},
    ("bart", "heads", "stacks=decoder attentions=self layers=1"): {"decoder.layers.1.self_attn"},
    ("bart", "query_value", "attentions=cross layers=0"): {
        f"decoder.layers.0.encoder_attn.{part}_proj" for part in ("q", "v")
    },
    ("bart", "ffn", "stacks=encoder layers=0"): {"encoder.layers.0.fc2.sublayer_dropout"},
    ("bart", "ffn_weights", "stacks=decoder layers=-2"): {"decoder.layers.0.fc1", "decoder.layers.0.fc2"},
    ("mbart", "layer", "stacks=encoder layers=1"): {"encoder.layers.1.fc2.sublayer_dropout"},
    ("bart", "layer", "stacks=encoder layers=1"): {"encoder.layers.1.final_layer_norm"},
    ("roberta", "attention", "stacks=encoder"): {f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)},
    ("roberta", "heads", "layers=-1"): {"encoder.layer.1.attention.self"},
    ("roberta", "ffn", "layers=0,1"): {f"encoder.layer.{i}.output.dropout" for i in (0, 1)},
    ("bert", "layer", "layers=0"): {"encoder.layer.0.output.LayerNorm"},
}


def chosen(representation: str, options: str) -> schema.Modification:
    """A modification with `stacks=a,b attentions=c layers=0,-1` as options."""
    given = {key: value.split(",") for key, value in (option.split("=") for option in options.split())}
    layers = [int(index) for index in given.pop("layers")] if "layers" in given else None
    insertion = "sequential" if representation == "layer" else "parallel"
    lists = {key: tuple(value) for key, value in given.items()}
    return modification("relu", representation, insertion, init="bert", layers=layers, **lists)  # type: ignore[arg-type]  # lists by name


@pytest.mark.parametrize(("family", "representation", "options"), SUBSETS, ids=["-".join(case) for case in SUBSETS])
def test_stacks_attentions_and_layers_choose_the_places(family: str, representation: str, options: str) -> None:
    """Those places and no others, and as many numbers as they have."""
    model = attached(family, {"": chosen(representation, options)})
    expected = SUBSETS[family, representation, options]
    assert places(model) == expected
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
    assert trained == len(expected) * 8 * (16 + (32 if representation == "ffn_weights" else 16))
    assert without_gradient(gradients(model, family)) == []


@pytest.mark.parametrize(
    ("family", "representation", "options", "sentence"),
    [
        ("bart", "ffn", "layers=2", "modified_representation.layers: 2 is outside the encoder's layers 0 to 1."),
        ("bart", "ffn", "layers=-3", "modified_representation.layers: -3 is outside the encoder's layers 0 to 1."),
        ("roberta", "attention", "layers=0,5", "modified_representation.layers: 5 is outside the encoder's"),
        ("roberta", "ffn", "stacks=decoder", "modified_representation.stacks=[decoder] names no stack of the backbone"),
        ("roberta", "attention", "attentions=cross", "modified_representation.attentions=[cross] names no attention"),
        (
            "bart",
            "heads",
            "stacks=encoder attentions=cross",
            "modified_representation.attentions=[cross] names no attention in the encoder",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "mix.second."])
def test_places_that_a_backbone_lacks_are_refused(
    family: str, representation: str, options: str, sentence: str, prefix: str
) -> None:
    """In one sentence that names the key as it is typed."""
    with pytest.raises(UserError) as refused:
        attach(build(family), {prefix: chosen(representation, options)})
    assert str(refused.value).startswith(prefix + sentence)


# ---- the presets in conf/ ----

METHODS = list_methods()


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        *[("bart", "xsum", method) for method in METHODS if method != "head"],  # a summariser has no task head
        ("bart_classifier", "doctopic", "head"),
        *[("roberta", "sst2", method) for method in METHODS],
    ],
)
def test_presets_in_conf_train(family: str, task: str, method: str) -> None:
    """With the sizes of their task, on a tiny model: the loss stays finite and what is trained moves."""
    run = compose_run([f"method={method}", f"task={task}"])
    model = build(family)
    attach(model, schema.list_modifications(run), run.unfreeze)
    before = tensors(model, trained=True)
    losses = take_steps(model, family)
    assert all(torch.isfinite(torch.tensor(losses)))
    now = dict(model.named_parameters())
    unmoved = {name for name, tensor in before.items() if torch.equal(tensor, now[name])}
    assert before and unmoved <= {name for name in before if name.endswith(("k_proj.bias", "key.bias"))}


def test_nothing_to_train_is_refused() -> None:
    """The task head alone means something in classification only."""
    with pytest.raises(UserError, match="with task=xsum leaves nothing to train"):
        compose_run(["method=head", "task=xsum"])
    assert compose_run(["method=head", "task=sst2"])
