"""Adapters in peft's form: peft computes the same logits with them, and what has no such form is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.config import schema
from peftbench.config.compose import compose_run
from peftbench.exchange.export import CONFIG, TENSORS, compute_logits
from peftbench.exchange.peft_form import PeftAdapter, shorten_names
from peftbench.modification.attach import attach, attach_run
from peftbench.modification.state import fold, write_tensors
from peftbench.utils.errors import UserError
from peftbench.utils.files import dump_json
from tests.families import PRESETS, ROW_WRITING, WRITING, batch, build, modification, run_on, shake

EIGHT = ("bart", "t5", "gpt2", "llama", "roberta", "mbart", "bert", "t5_gated")
UNFUSED = ("lora", "lora_ffn", "ia3")
WITH_HEAD = ("bart_classifier", "roberta", "bert", "t5_classifier", "gpt2_classifier", "llama_classifier")
FUSED = ("gpt2", "phi3", "modernbert", "gpt_neox", "bloom", "falcon")
OTHERS = ("distilbert", "electra", "deberta_v2", "mpnet", "albert", "eurobert", "qwen3", "gemma2", "mixtral", "opt")
OTHERS += ("deberta",)


def lora(representation: str, **more: Any) -> schema.Modification:
    return modification(
        "identity", representation, "parallel", "scaled", **{"bottleneck": 5, "scale": 2.0, "dropout": 0.0, **more}
    )


def first_quickly(cases: Iterable[tuple[str, str]]) -> list[Any]:
    """Every pair of a family and a preset; those of a preset after its first three families are slow."""
    seen: Counter[str] = Counter()
    found = []
    for family, preset in cases:
        seen[preset] += 1
        marks = [pytest.mark.slow] if seen[preset] > 3 else []
        found.append(pytest.param(family, preset, id=f"{family}-{preset}", marks=marks))
    return found


LORA_ALL = {"": lora("all_linear")}


def export(
    family: str, found: dict[str, schema.Modification], folder: Path, **more: Any
) -> tuple[PreTrainedModel, PeftAdapter]:
    """A model with modifications of random values, and the folder for peft that is made of it."""
    model = build(family, **more)
    run = run_on(family, folder / "base", found)
    if hasattr(model, "lm_head"):
        run.task.kind = schema.TaskKind.text_to_text
    attach(model, found)
    shake(model)
    fold(model)
    adapter = PeftAdapter.of(model, run)
    (folder / CONFIG).write_text(dump_json(adapter.config))
    write_tensors(adapter.tensors, folder / TENSORS)
    return model.eval(), adapter


def logits(model: Any, family: str) -> Tensor:
    given = batch(family)
    labels = given.pop("labels")
    if family in (*WRITING, *ROW_WRITING):
        given["decoder_input_ids"] = labels
    return compute_logits(model, given)


def compare(family: str, found: dict[str, schema.Modification], folder: Path, **more: Any) -> tuple[float, PeftAdapter]:
    """The largest difference between peft's logits and ours, where both differ from the backbone's."""
    model, adapter = export(family, found, folder, **more)
    theirs = PeftModel.from_pretrained(build(family, **more), str(folder)).eval()
    ours = logits(model, family)
    assert (ours - logits(build(family, **more), family)).abs().max() > 0.01
    return float((ours - logits(theirs, family)).abs().max()), adapter


@pytest.mark.parametrize(("family", "preset"), first_quickly((f, p) for p in UNFUSED for f in EIGHT))
def test_peft_computes_the_same(family: str, preset: str, tmp_path: Path) -> None:
    """To the last digit; but where one product of rank 2r stands for two, it may be rounded in another order."""
    difference, adapter = compare(family, PRESETS[preset], tmp_path)
    assert difference <= (1e-5 if family == "gpt2" and preset == "lora" else 0.0)
    assert adapter.config["target_modules"] == TARGETS.get((family, preset), adapter.config["target_modules"])


TARGETS = {
    ("bart", "lora"): ["q_proj", "v_proj"],
    ("t5", "lora"): ["q", "v"],
    ("llama", "lora_ffn"): ["down_proj", "gate_proj", "up_proj"],
    ("gpt2", "lora"): ["c_attn"],
    ("roberta", "lora"): ["query", "value"],
    ("bart", "ia3"): ["k_proj", "v_proj", "fc2"],
}


@pytest.mark.parametrize("family", WITH_HEAD)
def test_a_task_head_comes_along(family: str, tmp_path: Path) -> None:
    """The folder's head replaces that of the backbone, which is another one here."""
    model, adapter = export(family, PRESETS["lora"], tmp_path)
    base = build(family)
    with torch.no_grad():
        for name in adapter.config["modules_to_save"]:
            for parameter in base.get_submodule(name).parameters():
                parameter.fill_(7.0)
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    difference = (logits(model, family) - logits(theirs, family)).abs().max()
    assert difference <= (1e-5 if family == "gpt2_classifier" else 0.0)
    assert adapter.config["task_type"] == "SEQ_CLS"


def test_a_pooler_that_came_without_weights_comes_along(tmp_path: Path) -> None:
    model = build("bert")
    attach(model, PRESETS["lora"], untrained=["bert.pooler.dense.weight", "bert.pooler.dense.bias"])
    run = run_on("bert", tmp_path, PRESETS["lora"])
    adapter = PeftAdapter.of(model, run, ["bert.pooler.dense.weight", "bert.pooler.dense.bias"])
    assert adapter.config["modules_to_save"] == ["classifier", "bert.pooler"]
    assert "base_model.model.bert.pooler.dense.weight" in adapter.tensors


@pytest.mark.parametrize(
    ("family", "preset"), first_quickly((f, p) for p in ("lora", "lora_all", "ia3") for f in FUSED)
)
def test_parts_of_one_projection_are_a_block_diagonal(family: str, preset: str, tmp_path: Path) -> None:
    found = LORA_ALL if preset == "lora_all" else PRESETS[preset]
    difference, adapter = compare(family, found, tmp_path)
    assert difference < 2e-5
    if preset == "lora":
        name, up = next((name, t) for name, t in adapter.tensors.items() if name.endswith("lora_B.weight"))
        rank = PRESETS["lora"][""].bottleneck
        assert rank is not None and up.shape[1] == 2 * rank, name
        assert not (up[:, :rank].any(1) & up[:, rank:].any(1)).any()  # each row belongs to one part


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "preset"),
    [
        (family, preset)
        for family in OTHERS
        for preset in ("lora", "lora_all", "ia3")
        # The FFNs of experts are refused, and so is what changes all of a value that has its bias later.
        if preset == "lora" or (family not in ("mixtral", "qwen3_moe") and (family, preset) != ("deberta", "ia3"))
    ],
)
def test_other_families(family: str, preset: str, tmp_path: Path) -> None:
    """Exactly, but for DeBERTa: its parts of one projection are a block diagonal, which may be summed otherwise."""
    found = LORA_ALL if preset == "lora_all" else PRESETS[preset]
    assert compare(family, found, tmp_path)[0] <= (2e-5 if family == "deberta" else 0.0)


MIXTURES: dict[str, dict[str, schema.Modification]] = {
    "two ranks": {"": lora("query_value"), "mix.ffn.": lora("ffn_weights", bottleneck=3)},
    "two scales": {"": lora("query"), "mix.other.": lora("query", scale=0.5), "mix.value.": lora("value", scale=-3.0)},
    "learned scale": {"": lora("query_value", learned=True)},
    "biases": {"": lora("query_value", bias=True), "mix.key.": lora("key")},
    "some layers": {"": lora("query_value", layers=[1]), "mix.cross.": lora("key", stacks=("decoder",))},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_low_rank_changes(name: str, tmp_path: Path) -> None:
    difference, adapter = compare("bart", MIXTURES[name], tmp_path)
    assert difference < 2e-5
    assert bool(adapter.notes) == (name in ("two scales", "learned scale"))
    if name == "two ranks":
        assert adapter.config["rank_pattern"] == {"fc1": 3, "fc2": 3}
        assert adapter.config["alpha_pattern"] == {"fc1": 6.0, "fc2": 6.0}


PROMPT = modification("softmax", "embedding", "parallel", "gated", 4)


@pytest.mark.parametrize("family", ["t5", "t5_gated", "mt5", "llama", "qwen3"])
def test_prompts_without_positions_of_their_own(family: str, tmp_path: Path) -> None:
    """Exactly with T5's relative positions; a decoder's rotations are rounded otherwise at other positions."""
    difference, adapter = compare(family, {"": PROMPT}, tmp_path)
    assert difference <= (0.0 if "t5" in family else 2e-5)
    assert adapter.tensors.keys() == {"prompt_embeddings"}


REFUSED = {
    ("bart", "prompt"): "peft's prompts shift the positions of the text",
    ("gpt2", "prompt"): "peft's prompts shift the positions of the text",
    ("mistral", "prompt"): "has a window, which peft's prompts leave",
    ("roberta", "prompt"): "peft's task heads read other positions",
    ("llama", "prefix"): "its prefix vectors have no positions",
    ("bart", "mam"): "mix.attention: its prefix vectors have no positions.*; its functional form is not linear",
    ("bart", "adapter"): "its functional form is not linear",
    ("bart", "learned_gate"): "peft has no gate",
    ("bart", "mh_parallel_adapter"): "it changes single heads",
    ("bart", "identity"): "reads the input of the projection whose output it changes, and this one does not",
    ("bart", "sequential"): "reads the input of the projection whose output it changes, and this one does not",
    ("bart", "normed"): "peft's LoRA has no LayerNorm",
    ("llama", "biased"): "the projection has none that could take them",
    ("bart", "vector"): "peft has no vector that is added",
    ("bart", "both"): "one adapter of peft cannot be IA3 and LORA",
}
MORE: dict[str, dict[str, schema.Modification]] = {
    "identity": {"": modification("identity", "ffn", "parallel", "scaled")},
    "sequential": {"": modification("identity", "query", "sequential", "scaled")},
    "normed": {"": lora("query", layer_norm="input")},
    "biased": {"": lora("query", bias=True)},
    "vector": {"": modification("constant", "ffn", "sequential", "add")},
    "both": {
        "": lora("query_value"),
        "mix.ffn.": modification("constant", "ffn_intermediate", "sequential", "multiply"),
    },
}


@pytest.mark.parametrize(("family", "preset"), REFUSED)
def test_what_has_no_form_in_peft_is_refused(family: str, preset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^method=tiny has no form in peft: .*{REFUSED[family, preset]}") as caught:
        export(family, {**PRESETS, **MORE}[preset], tmp_path)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("kind", ["DORA", pytest.param("LOHA", marks=pytest.mark.slow)])
def test_a_method_of_peft(kind: str, tmp_path: Path) -> None:
    run = compose_run(["method=peft", f"peft.type={kind}", "peft.target_modules=[query,value]", "task=sst2"])
    model = build("roberta")
    attach_run(model, run)
    shake(model)
    adapter = PeftAdapter.of(model, run)
    assert adapter.config["target_modules"] == ["query", "value"]
    (tmp_path / CONFIG).write_text(dump_json(adapter.config))
    write_tensors(adapter.tensors, tmp_path / TENSORS)
    theirs = PeftModel.from_pretrained(build("roberta"), str(tmp_path)).eval()
    found = logits(theirs, "roberta")
    assert (found - logits(model.eval(), "roberta")).abs().max() < 2e-6
    assert (found - logits(build("roberta"), "roberta")).abs().max() > 0.01


def test_trained_parameters_of_the_backbone_are_refused(tmp_path: Path) -> None:
    for unfreeze in ("bias", "all"):
        run = run_on("bart", tmp_path, PRESETS["lora"], unfreeze=schema.Unfreeze[unfreeze])
        with pytest.raises(UserError, match="it trains parameters of the backbone; peftbench merge"):
            PeftAdapter.of(build("bart"), run)


def test_the_shortest_ends_that_name_nothing_else() -> None:
    names = ["a.0.attn.c_proj", "a.1.attn.c_proj", "a.0.mlp.c_proj", "a.1.mlp.c_proj", "a.0.mlp.fc", "a.1.mlp.fc"]
    assert shorten_names(names[:2], names) == ["attn.c_proj"]
    assert shorten_names(names[:4], names) == ["c_proj"]
    assert shorten_names(names[2:5], names) == ["mlp.c_proj", "0.mlp.fc"]
