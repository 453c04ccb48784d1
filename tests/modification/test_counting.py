"""What each method trains, by name, and how many numbers that is: on tiny models, and at the paper's sizes.

The large models are BART-large and RoBERTa-base on the meta device, the modifications those of the presets in conf/, so
that the presets' sizes are held to the paper's tables too.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peftbench.config import schema
from peftbench.config.compose import compose_run
from peftbench.modification import state
from peftbench.modification.attach import attach
from peftbench.modification.counting import Counts, count
from tests.families import FAMILIES, PRESETS, batch, build

ROBERTA_HEAD = {f"classifier.{part}.{tensor}" for part in ("dense", "out_proj") for tensor in ("weight", "bias")}

# The places of the tiny models, by hand, as transformers names them.
BART_LAYERS = [f"model.{stack}.layers.{i}" for stack in ("encoder", "decoder") for i in (0, 1)]
BART_ATTENTIONS = [f"{layer}.self_attn" for layer in BART_LAYERS] + [
    f"{layer}.encoder_attn" for layer in BART_LAYERS[2:]
]
ROBERTA_LAYERS = [f"roberta.encoder.layer.{i}" for i in (0, 1)]
PLACES = {
    "bart": {
        "heads": [f"{attention}.head_modifications" for attention in BART_ATTENTIONS],
        "attention": [f"{attention}.out_proj" for attention in BART_ATTENTIONS],
        "query_value": [f"{attention}.{part}" for attention in BART_ATTENTIONS for part in ("q_proj", "v_proj")],
        "key_value": [f"{attention}.{part}" for attention in BART_ATTENTIONS for part in ("k_proj", "v_proj")],
        "ffn_intermediate": [f"{layer}.fc2" for layer in BART_LAYERS],
        "ffn": [f"{layer}.fc2.sublayer_dropout" for layer in BART_LAYERS],
        "ffn_weights": [f"{layer}.{part}" for layer in BART_LAYERS for part in ("fc1", "fc2")],
        "layer": [f"{layer}.final_layer_norm" for layer in BART_LAYERS],
        "embedding": ["model.encoder.layernorm_embedding"],
    },
    "roberta": {
        "heads": [f"{layer}.attention.self.head_modifications" for layer in ROBERTA_LAYERS],
        "attention": [f"{layer}.attention.output.dense" for layer in ROBERTA_LAYERS],
        "query_value": [f"{layer}.attention.self.{part}" for layer in ROBERTA_LAYERS for part in ("query", "value")],
        "key_value": [f"{layer}.attention.self.{part}" for layer in ROBERTA_LAYERS for part in ("key", "value")],
        "ffn_intermediate": [f"{layer}.output.dense" for layer in ROBERTA_LAYERS],
        "ffn": [f"{layer}.output.dropout" for layer in ROBERTA_LAYERS],
        "ffn_weights": [f"{layer}.{part}.dense" for layer in ROBERTA_LAYERS for part in ("intermediate", "output")],
        "layer": [f"{layer}.output.LayerNorm" for layer in ROBERTA_LAYERS],
        "embedding": ["roberta.embeddings.LayerNorm"],
    },
}
TRUNKS = {  # the layer that lends its name to the MLP part which all layers of one kind of attention share
    "bart": (
        "model.encoder.layers.0.self_attn",
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.encoder_attn",
    ),
    "roberta": ("roberta.encoder.layer.0.attention.self",),
}

PLAIN = ("function.down", "function.up")
BIASED = (*PLAIN, "function.down_bias", "function.up_bias")
GATE = ("composition.weight", "composition.bias")
VECTOR = ("function.vector",)
MLP = ("function.generator.linear.weight", "function.generator.linear.bias")
TRUNK = tuple(f"function.generator.trunk.{name}" for name in ("embedding", "linear.weight", "linear.bias"))

NAMES = {  # preset: places, key, tensors at each place
    "prompt": [("embedding", "modification", ("vectors",))],
    "prefix": [("heads", "modification", MLP)],
    "prefix_no_gating": [("heads", "modification", MLP)],
    "adapter": [("attention", "modification", BIASED), ("ffn", "modification", BIASED)],
    "pfeiffer": [("layer", "modification", BIASED)],
    "lora": [("query_value", "modification", PLAIN)],
    "lora_ffn": [("ffn_weights", "modification", PLAIN)],
    "parallel_adapter": [("ffn", "modification", BIASED)],
    "parallel_adapter_attention": [("attention", "modification", BIASED)],
    "heads_joint": [("attention", "modification", BIASED)],
    "mh_parallel_adapter": [("heads", "modification", PLAIN)],
    "mh_parallel_adapter_hidden": [("heads", "modification", PLAIN)],
    "mh_parallel_adapter_normed_query": [
        ("heads", "modification", MLP),
        ("heads", "modification", ("query_norm.weight", "query_norm.bias")),
    ],
    "scaled_parallel_adapter": [("ffn", "modification", BIASED)],
    "mam": [("ffn", "modification", BIASED), ("heads", "attention", MLP)],
    "ia3": [("key_value", "modification", VECTOR), ("ffn_intermediate", "ffn", VECTOR)],
    "unipelt": [
        ("ffn", "modification", (*BIASED, *GATE)),
        ("heads", "attention", MLP),
        ("query_value", "lora", (*PLAIN, *GATE)),
    ],
    "learned_scale": [("ffn", "modification", (*PLAIN, "composition.scale"))],
    "learned_gate": [("attention", "modification", (*PLAIN, *GATE))],
    "heads_gate": [("heads", "modification", (*PLAIN, *GATE))],
}


def trainable(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_names(family: str, preset: str, *, folded: bool) -> set[str]:
    names: set[str] = set() if family == "bart" else set(ROBERTA_HEAD)
    for where, key, tensors in NAMES[preset]:
        if tensors is MLP and folded:
            tensors = PLAIN
        names |= {f"{place}.{key}.{tensor}" for place in PLACES[family][where] for tensor in tensors}
        if tensors is MLP:
            names |= {f"{place}.head_modifications.{key}.{tensor}" for place in TRUNKS[family] for tensor in TRUNK}
    return names


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", PLACES)
def test_each_method_trains_exactly_these_names(family: str, preset: str) -> None:
    """As trained, and as stored once the prefix's MLP is folded."""
    model = build(family)
    attach(model, PRESETS[preset])
    assert trainable(model) == expected_names(family, preset, folded=False)
    state.fold(model)
    assert trainable(model) == expected_names(family, preset, folded=True)


def test_mam_spelled_out() -> None:
    """One layer of each stack of BART, with shapes: l = 8, r = 5, d = 16 in 4 heads."""
    model = build("bart", encoder_layers=1, decoder_layers=1)
    attach(model, PRESETS["mam"])
    state.fold(model)
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} == {
        "model.encoder.layers.0.self_attn.head_modifications.attention.function.down": (4, 8, 4),
        "model.encoder.layers.0.self_attn.head_modifications.attention.function.up": (4, 4, 8),
        "model.encoder.layers.0.fc2.sublayer_dropout.modification.function.down": (1, 5, 16),
        "model.encoder.layers.0.fc2.sublayer_dropout.modification.function.down_bias": (1, 1, 5),
        "model.encoder.layers.0.fc2.sublayer_dropout.modification.function.up": (1, 16, 5),
        "model.encoder.layers.0.fc2.sublayer_dropout.modification.function.up_bias": (1, 1, 16),
        "model.decoder.layers.0.self_attn.head_modifications.attention.function.down": (4, 8, 4),
        "model.decoder.layers.0.self_attn.head_modifications.attention.function.up": (4, 4, 8),
        "model.decoder.layers.0.encoder_attn.head_modifications.attention.function.down": (4, 8, 4),
        "model.decoder.layers.0.encoder_attn.head_modifications.attention.function.up": (4, 4, 8),
        "model.decoder.layers.0.fc2.sublayer_dropout.modification.function.down": (1, 5, 16),
        "model.decoder.layers.0.fc2.sublayer_dropout.modification.function.down_bias": (1, 1, 5),
        "model.decoder.layers.0.fc2.sublayer_dropout.modification.function.up": (1, 16, 5),
        "model.decoder.layers.0.fc2.sublayer_dropout.modification.function.up_bias": (1, 1, 16),
    }


def test_lora_spelled_out() -> None:
    """One layer of RoBERTa, with shapes and the task head: r = 8, d = 16."""
    model = build("roberta", num_hidden_layers=1)
    attach(model, PRESETS["lora"])
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} == {
        "roberta.encoder.layer.0.attention.self.query.modification.function.down": (1, 8, 16),
        "roberta.encoder.layer.0.attention.self.query.modification.function.up": (1, 16, 8),
        "roberta.encoder.layer.0.attention.self.value.modification.function.down": (1, 8, 16),
        "roberta.encoder.layer.0.attention.self.value.modification.function.up": (1, 16, 8),
        "classifier.dense.weight": (16, 16),
        "classifier.dense.bias": (16,),
        "classifier.out_proj.weight": (3, 16),
        "classifier.out_proj.bias": (3,),
    }


@pytest.mark.parametrize("unfreeze", schema.Unfreeze)
@pytest.mark.parametrize("family", FAMILIES)
def test_bitfit_and_full_train_what_they_name(family: str, unfreeze: schema.Unfreeze) -> None:
    """bias: every parameter that is called a bias, and the head; norm: every norm's, and the head; all: everything;
    none: the head alone."""
    model = build(family)
    named = {name for name, _ in model.named_parameters()}
    head = {name for name in named if name.startswith(("classifier.", "classification_head."))}
    attach(model, {}, unfreeze)
    expected = {
        schema.Unfreeze.none: head,
        schema.Unfreeze.bias: head | {name for name in named if name.endswith(".bias")},
        schema.Unfreeze.norm: head | {name for name in named if "norm" in name.lower()},
        schema.Unfreeze.all: named,
    }
    assert trainable(model) == expected[unfreeze]
    counts = count(model)
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts.head == sum(numbers[name] for name in head)
    assert counts.trained == counts.stored == counts.paper == sum(numbers[name] for name in expected[unfreeze] - head)
    assert counts.backbone == sum(numbers.values()) - counts.head


@cache
def _published(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        if name == "bart_large":
            return BartForConditionalGeneration(BartConfig())
        shape = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        return RobertaForSequenceClassification(shape)


def bart_large() -> PreTrainedModel:
    return deepcopy(_published("bart_large"))


def roberta_base() -> PreTrainedModel:
    return deepcopy(_published("roberta_base"))


def counted(model: PreTrainedModel, *overrides: str) -> Counts:
    """The counts of the preset that a command line names, on a model."""
    run = compose_run(overrides)
    attach(model, schema.list_modifications(run), run.unfreeze)
    assert all(parameter.is_meta for parameter in model.parameters())
    return count(model)


BART_LARGE = [  # overrides on task=xsum: stored, paper's formula, trained where it is not stored
    ("method=prefix", 14_745_600, 14_745_600, 62_130_528),
    ("method=prefix bottleneck=30", 2_211_840, 2_211_840, 61_608_288),
    ("method=prefix_no_gating", 14_745_600, 14_745_600, 62_130_528),
    ("method=prompt", 204_800, 204_800, None),
    ("method=adapter", 24_649_440, 24_576_000, None),
    ("method=adapter modified_representation=attention", 14_789_664, 14_745_600, None),
    ("method=adapter modified_representation=attention layer_norm=output", 14_863_392, 14_745_600, None),
    ("method=pfeiffer", 29_530_176, 29_491_200, None),
    ("method=lora bottleneck=16", 2_359_296, 2_359_296, None),
    ("method=lora", 29_491_200, 29_491_200, None),
    ("method=lora_ffn", 25_067_520, 25_067_520, None),
    ("method=lora_ffn bottleneck=16", 3_932_160, 3_932_160, None),
    ("method=parallel_adapter", 25_202_688, 25_165_824, None),
    ("method=parallel_adapter bottleneck=1024", 50_380_800, 50_331_648, None),
    ("method=parallel_adapter_attention", 14_789_664, 14_745_600, None),
    ("method=mh_parallel_adapter", 14_745_600, 14_745_600, None),
    ("method=scaled_parallel_adapter", 25_202_688, 25_165_824, None),
    ("method=scaled_parallel_adapter composition_function.learned=true", 25_202_712, 25_165_824, None),
    ("method=mam", 27_414_528, 27_377_664, 25_202_688 + 61_608_288),
    ("method=pa_attention_pa_ffn", 27_452_472, 27_377_664, None),
    ("method=prefix_lora_ffn", 27_279_360, 27_279_360, 25_067_520 + 61_608_288),
    ("method=ia3", 172_032, 172_032, None),  # 36 attentions of 2 d, 24 FFNs of 4 d
    ("method=layernorm_tuning", 126_976, 126_976, None),  # 62 norms: 2 and 3 in a layer, 1 behind each embedding
    (
        "method=unipelt",
        27_377_664 + 24 * (464 + 1024) + (24 + 72) * 1025,  # as many weights as MAM, biases, and a gate of d + 1 each
        27_377_664,
        27_377_664 + 24 * (464 + 1024) + (24 + 72) * 1025 - 2_211_840 + 61_608_288,
    ),
]


@pytest.mark.parametrize(
    ("overrides", "stored", "paper", "trained"), BART_LARGE, ids=[overrides for overrides, *_ in BART_LARGE]
)
def test_counts_on_bart_large(overrides: str, stored: int, paper: int, trained: int | None) -> None:
    """The presets at the paper's sizes for generation; attention sub-layers 36, FFN 24, d = 1024."""
    counts = counted(bart_large(), "task=xsum", *overrides.split())
    assert counts == Counts(406_291_456, stored if trained is None else trained, stored, paper, head=0)


# overrides on task=sst2: stored, paper's formula, trained where it is not stored
ROBERTA_BASE = [
    ("method=mam", 599_232, 589_824, 15_391_520 + 304_320),
    ("method=prefix bottleneck=16", 294_912, 294_912, 15_391_520),
    ("method=lora", 589_824, 589_824, None),
    ("method=adapter", 608_640, 589_824, None),
    ("method=pfeiffer", 599_424, 589_824, None),
    ("method=lora_ffn", 552_960, 552_960, None),
    ("method=head", 0, 0, None),
    ("method=bitfit", 102_144, 102_144, None),
    ("method=full", 124_055_040, 124_055_040, None),
    ("method=ia3", 55_296, 55_296, None),  # 12 layers of 2 d + 4 d
    ("method=layernorm_tuning", 38_400, 38_400, None),  # 25 norms of 2 d
    ("method=unipelt", 626_916, 589_824, 626_916 - 147_456 + 15_385_376),  # the MLP for l = 8
]


@pytest.mark.parametrize(
    ("overrides", "stored", "paper", "trained"), ROBERTA_BASE, ids=[overrides for overrides, *_ in ROBERTA_BASE]
)
def test_counts_on_roberta_base(overrides: str, stored: int, paper: int, trained: int | None) -> None:
    """The presets at the sizes for GLUE; 12 attentions, 12 FFNs, d = 768; the head of two labels stands apart."""
    counts = counted(roberta_base(), "task=sst2", *overrides.split())
    assert counts == Counts(124_055_040, stored if trained is None else trained, stored, paper, head=590_592 + 1_538)


def test_percentages_of_the_paper() -> None:
    """By the paper's formula, of BART-large: tables 3 and 6 (reference rows: prefix 3.6%, MAM 6.7%)."""
    for method, percent in {"prefix": 3.6, "mam": 6.7, "parallel_adapter": 6.2, "lora_ffn": 6.2}.items():
        counts = counted(bart_large(), "task=xsum", f"method={method}")
        assert round(counts.percent(counts.paper), 1) == percent


CASES: dict[str, tuple[dict[str, schema.Modification], schema.Unfreeze]] = {
    **{preset: (made, schema.Unfreeze.none) for preset, made in PRESETS.items()},
    "bitfit": ({}, schema.Unfreeze.bias),
    "layernorm_tuning": ({}, schema.Unfreeze.norm),
    "bitfit_and_mam": (PRESETS["mam"], schema.Unfreeze.bias),
    "full": ({}, schema.Unfreeze.all),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["bart", "bart_classifier", "roberta"])
def test_counts_are_what_the_optimiser_holds_and_the_file_has(family: str, case: str, tmp_path: Path) -> None:
    """trained: the numbers that Adam keeps moments of; stored: the numbers in the file; all groups add up."""
    modifications, unfreeze = CASES[case]
    model = build(family)
    bare = sum(parameter.numel() for parameter in model.parameters())
    attach(model, modifications, unfreeze)
    counts = count(model)
    assert counts.backbone + counts.head == bare
    added = sum(parameter.numel() for parameter in model.parameters()) - bare
    unfrozen = {
        schema.Unfreeze.none: 0,
        schema.Unfreeze.all: counts.backbone,
        schema.Unfreeze.bias: sum(
            parameter.numel()
            for name, parameter in build(family).named_parameters()
            if name.endswith(".bias") and not name.startswith("class")
        ),
        schema.Unfreeze.norm: sum(
            parameter.numel() for name, parameter in build(family).named_parameters() if "norm" in name.lower()
        ),
    }
    assert counts.trained == added + unfrozen[unfreeze]
    if counts.trained + counts.head:
        optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        model(**batch(family)).loss.backward()
        optimiser.step()
        held = sum(kept["exp_avg"].numel() for kept in optimiser.state.values())
        assert held == counts.trained + counts.head

    state.fold(model)
    state.save(model, tmp_path)
    written = sum(tensor.numel() for tensor in load_file(tmp_path / state.FILE_NAME).values())
    assert written == counts.stored + counts.head
