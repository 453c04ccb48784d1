"""Adapters of peft and loralib as modifications: the same logits, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, RobertaConfig, RobertaForSequenceClassification

from peftbench import load_run
from peftbench.backbones.load import Backbone
from peftbench.cli.main import main
from peftbench.config import schema
from peftbench.exchange.export import TENSORS
from peftbench.exchange.foreign import ForeignAdapter, read_adapter
from peftbench.exchange.importing import put_tensors
from peftbench.exchange.points import Placed, describe_adapter
from peftbench.modification.attach import attach
from peftbench.modification.state import write_tensors
from peftbench.records.record import load_records
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.exchange.test_peft_form import EIGHT, FUSED, LORA_ALL, MIXTURES, PROMPT, export, first_quickly, logits
from tests.families import PRESETS, build, shake
from tests.finished import save_tiny_bert

NAMES = ("lora", "lora_ffn", "ia3")


def restore(family: str, folder: Path) -> tuple[PreTrainedModel, Placed, ForeignAdapter]:
    """A model with what a folder of peft holds."""
    adapter, model = read_adapter(folder), build(family)
    described = describe_adapter(build(family), adapter)
    attach(model, described.modifications, schema.Unfreeze.bias if adapter.biases else schema.Unfreeze.none)
    put_tensors(Backbone(model, None, frozenset()), adapter, described)  # type: ignore[arg-type]  # no tokenizer is read
    return model.eval(), described, adapter


def point(m: schema.Modification) -> tuple[Any, ...]:
    r = m.modified_representation
    places = (r.name.name, [s.name for s in r.stacks], [a.name for a in r.attentions], r.layers)
    return (
        m.functional_form.name,
        *places,
        m.composition_function.name.name,
        m.composition_function.scale,
        m.bottleneck,
    )


@pytest.mark.parametrize(
    ("family", "name"),
    first_quickly((f, n) for n in NAMES for f in EIGHT)
    + first_quickly((f, n) for n in ("lora", "lora_all") for f in FUSED if f != "gpt2" or n != "lora")
    + first_quickly(("bart", n) for n in MIXTURES)
    + first_quickly((f, "prompt") for f in ("t5", "llama")),
)
def test_the_way_out_and_back(family: str, name: str, tmp_path: Path) -> None:
    """The same tensors at the same places, and so the same logits to the last digit."""
    found = {**PRESETS, **MIXTURES, "prompt": {"": PROMPT}, "lora_all": LORA_ALL}[name]
    exported, _ = export(family, found, tmp_path)
    again, described, _ = restore(family, tmp_path)
    exact = name not in ("two scales", "learned scale", "biases")  # one B for two scales, one bias for two
    assert (logits(again, family) - logits(exported, family)).abs().max() <= (0.0 if exact else 2e-5)
    if name in (*NAMES, "lora_all", "two ranks", "some layers"):
        assert sorted(map(point, described.modifications.values()), key=str) == sorted(
            map(point, found.values()), key=str
        )


MADE: dict[str, tuple[str, Any]] = {
    "rslora": ("bart", LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"])),
    "patterns": (
        "llama",
        LoraConfig(
            r=4,
            target_modules=["q_proj", "o_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"o_proj": 3, "^model.layers.0.self_attn.q_proj": 16},
        ),
    ),
    "some layers": (
        "roberta",
        LoraConfig(
            r=3, target_modules=["query", "dense"], layers_to_transform=[1], exclude_modules=r".*(pooler|classifier).*"
        ),
    ),
    "all linear": ("mbart", LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")),
    "a pattern": ("t5", LoraConfig(r=2, target_modules=r".*decoder.*EncDecAttention\.(q|k)", lora_dropout=0.25)),
    "biases": ("bert", LoraConfig(r=2, target_modules=["value"], bias="all", task_type="SEQ_CLS")),
    "biases of B": ("roberta", LoraConfig(r=2, target_modules=["query", "key"], lora_bias=True)),
    "Conv1D": ("gpt2", LoraConfig(r=3, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)),
    "fused": ("phi3", LoraConfig(r=3, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])),
    "ia3": ("t5", IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "fused ia3": ("gpt2", IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "prompt": ("t5", PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")),
}


def make(name: str, folder: Path) -> tuple[str, PeftModel]:
    """An adapter that peft made, with random values, and its folder."""
    family, config = MADE[name]
    torch.manual_seed(3)
    model = get_peft_model(build(family), config)
    shake(model)
    model.save_pretrained(str(folder))
    return family, model.eval()


@pytest.mark.parametrize("name", MADE)
def test_what_peft_made(name: str, tmp_path: Path) -> None:
    family, theirs = make(name, tmp_path)
    ours, described, _ = restore(family, tmp_path)
    wanted = logits(theirs, family)
    assert (wanted - logits(build(family), family)).abs().max() > 0.01
    assert (logits(ours, family) - wanted).abs().max() < 2e-5
    (first, *_) = described.modifications.values()
    if name == "a pattern":
        assert point(first)[1:4] == ("query", ["encoder", "decoder"], ["cross"])
        assert (first.input_dropout, len(described.modifications)) == (0.25, 2)
    elif name == "all linear":
        assert point(first)[1] == "all_linear" and len(described.modifications) == 1
    elif name == "rslora":
        assert first.composition_function.scale == 3.0  # alpha / sqrt(r)


REFUSED = {
    "dora": (LoraConfig(target_modules=["q_proj"], use_dora=True), "has use_dora=true, which has no form"),
    "pissa": (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "has init_lora_weights=pissa, which"),
    "lora_only": (LoraConfig(target_modules=["q_proj"], bias="lora_only"), "has bias=lora_only"),
    "half an FFN": (
        LoraConfig(target_modules=["fc2"]),
        r"changes model.decoder.layers.0.fc2, .* and 1 more",
    ),
    "output layer": (LoraConfig(target_modules=["lm_head"]), "changes lm_head, where the axes have no point"),
    "embeddings": (LoraConfig(target_modules=["embed_positions"]), "embed_positions.lora_embedding_A"),
    "more modules": (
        LoraConfig(target_modules=["q_proj"], modules_to_save=["layernorm_embedding"]),
        "has model.decoder.layernorm_embedding.bias, .*, where the axes have no point",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_point_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, sentence = REFUSED[name]
    get_peft_model(build("bart"), config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=sentence) as caught:
        restore("bart", tmp_path)
    assert len(caught.value.faults) == 1


def test_other_types_other_backbones_and_broken_files(tmp_path: Path) -> None:
    make("rslora", tmp_path)
    with pytest.raises(UserError, match=r"changes .*encoder_attn.q_proj, and the backbone \(bert\) has no such module"):
        restore("bert", tmp_path)
    adapter = read_adapter(tmp_path)
    with pytest.raises(UserError, match=r"changes .* from 16 to 16 numbers, and that of the backbone is from 32 to 32"):
        describe_adapter(build("bart", d_model=32), adapter)
    with pytest.raises(UserError, match=r"--alpha 4: .* has lora_alpha"):
        read_adapter(tmp_path, alpha=4)
    (tmp_path / TENSORS).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        read_adapter(tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors or adapter_model.bin"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(UserError, match="peft_type=LOHA, which has no form on the four axes; LORA, IA3"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match="is neither a folder that peft wrote nor a file"):
        read_adapter(tmp_path / "nothing")


# ---- loralib ----

LAYERS, WIDTH, RANK, ALPHA = 12, 24, 8, 16.0


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RoBERTa-base's twelve layers, narrow, with the tokenizer of another model, and rows to score it on."""
    folder = tmp_path_factory.mktemp("roberta")
    save_tiny_bert(folder)
    torch.manual_seed(5)
    config = RobertaConfig(
        vocab_size=99, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=70, pad_token_id=0, num_labels=2, initializer_range=0.2,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    write_lines(folder / "rows.jsonl", [{"text": f"film {i} {'good' * (i % 3)}", "label": i % 2} for i in range(24)])
    return folder


def draw_file() -> dict[str, Tensor]:
    """What loralib's lora_state_dict has of RoBERTa with LoRA at query and value, and of its head: 52 tensors."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        f"roberta.encoder.layer.{i}.attention.self.{part}.lora_{side}": (RANK, WIDTH) if side == "A" else (WIDTH, RANK)
        for i in range(LAYERS)
        for part in ("query", "value")
        for side in "AB"
    }
    shapes |= {"classifier.dense.weight": (WIDTH, WIDTH), "classifier.dense.bias": (WIDTH,)}
    shapes |= {"classifier.out_proj.weight": (2, WIDTH), "classifier.out_proj.bias": (2,)}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("ending", ["bin", pytest.param("safetensors", marks=pytest.mark.slow)])
def test_a_file_of_loralib(ending: str, roberta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, file, out = draw_file(), tmp_path / f"lora.{ending}", tmp_path / "run"
    assert len(tensors) == 52
    torch.save(tensors, file) if ending == "bin" else write_tensors(tensors, file)
    words = ["task.text_columns=[text]", f"task.test_file={roberta}/rows.jsonl", "task.labels=[0,1]"]
    words += ["model=roberta_base", f"model.path={roberta}", "task=text_classification"]
    assert main(["import", str(file), *words, "--out", str(out)]) == 2
    assert "does not say LoRA's alpha, as no file of loralib does; give --alpha NUMBER." in capsys.readouterr().err
    assert main(["import", str(file), *words, "--alpha", str(ALPHA), "--out", str(out)]) == 0
    assert f"lora: identity · query_value · parallel · scaled 2, bottleneck {RANK}" in capsys.readouterr().out

    wanted = RobertaForSequenceClassification.from_pretrained(roberta).eval()
    state = wanted.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith("lora_A"):
                up = tensors[name.replace("lora_A", "lora_B")]
                state[name.replace("lora_A", "weight")] += ALPHA / RANK * up @ tensor  # W + (α/r) B A
            elif "lora_B" not in name:
                state[name].copy_(tensor)
    found, tokenizer = load_run(out)
    ids = tokenizer(["a good film", "rain"], return_tensors="pt", padding=True)
    given = {name: ids[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        difference = (found(**given).logits - wanted(**given).logits).abs().max()
        assert difference < 1e-5
        untouched = RobertaForSequenceClassification.from_pretrained(roberta).eval()(**given).logits
        assert (untouched - wanted(**given).logits).abs().max() > 0.1

    (record,) = load_records(out)[0]
    assert (record.status, record.method, record.steps, record.trainer) == ("done", "lora", None, {})
    assert record.counts is not None and record.counts.stored == 2 * LAYERS * 2 * RANK * WIDTH
    assert "not trained here: it is loralib's file" in record.notes[-1]


def test_files_of_loralib_that_do_not_fit(roberta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["task.text_columns=[text]", f"task.test_file={roberta}/rows.jsonl", "model=roberta_base"]
    words += [f"model.path={roberta}", "task=text_classification", "--alpha", "16", "--out", str(tmp_path / "run")]

    def refuse(tensors: dict[str, Tensor], *more: str) -> str:
        write_tensors(tensors, tmp_path / "lora.safetensors")
        assert main(["import", str(tmp_path / "lora.safetensors"), *words, *more]) == 2
        assert not (tmp_path / "run").exists()
        (sentence,) = capsys.readouterr().err.splitlines()
        return sentence

    tensors = draw_file()
    two, three = "task.labels=[0,1]", "task.labels=[0,1,2]"
    headless = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    assert "classifier.out_proj.bias is (2,), and that of this task is (3,)" in refuse(tensors, three)
    assert "has no classifier.out_proj.bias, classifier.out_proj.weight, for which" in refuse(headless, three)
    halved = {name: tensor for name, tensor in tensors.items() if "layer.3.attention.self.query.lora_B" not in name}
    assert "has only one of lora_A and lora_B for roberta.encoder.layer.3.attention.self.query" in refuse(halved, two)
    name = "roberta.encoder.layer.0.attention.self.query.lora_A"
    assert "loralib's MergedLinear" in refuse({**tensors, name: torch.zeros(2 * RANK, WIDTH)}, two)
    assert "bottleneck=3: import takes keys of task, model and trainer" in refuse(tensors, "bottleneck=3")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lora_alpha", value) for value in ("x", [], {}, True)),
        *(("alpha_pattern", value) for value in ([], "x", {"(": 1}, {"a": "b"})),
        *(("lora_dropout", "x"), ("base_model_name_or_path", 1), ("bias", [])),
    ],
)
def test_values_that_peft_never_writes_are_named(key: str, value: object, tmp_path: Path) -> None:
    write_tensors({"base_model.model.x.lora_A.weight": torch.ones(2, 4)}, tmp_path / TENSORS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", key: value}))
    if not value and key != "lora_alpha":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", key: [1]}))
    with pytest.raises(UserError, match=f"has {key}=.*, which is not what peft writes there"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("text", ["null", "[]", "[" * 10_000, '{"r": ' + "9" * 400 + "}"])
def test_a_damaged_config_of_peft_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)
