"""Backbones with packed weights: every preset next to them, their gradients, counts, merging, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from peftbench.backbones import quantisation
from peftbench.backbones.load import load_backbone
from peftbench.backbones.precision import resolve_dtype
from peftbench.backbones.quantisation import settle_quantised
from peftbench.backbones.sites import find_sites
from peftbench.backbones.unpacking import CannotUnpack, is_packed, unpack_backbone, unpack_weight
from peftbench.config import schema
from peftbench.config.identity import hash_run
from peftbench.config.validity import find_faults
from peftbench.evaluation.inference import prepare_inference
from peftbench.modification.attach import attach
from peftbench.modification.counting import count
from peftbench.modification.merge import merge
from peftbench.training.arithmetic import count_operations
from peftbench.training.batching import Lengths
from peftbench.training.token_loss import find_output_layer
from peftbench.utils.errors import UserError
from tests.families import (
    CONTINUING,
    DECODERS,
    PRESETS,
    VOCABULARY,
    WRITING,
    batch,
    build,
    modification,
    shake,
)
from tests.fitting import Targets, fitted

pytest.importorskip("bitsandbytes", reason="bitsandbytes packs the weights: pip install peftbench[quant]")

PACKED = ("llama", "bart", "bert", "t5")
FORMS = ("nf4", "int8")
_ENCODER = {"hidden_size": 64, "intermediate_size": 128}
WIDE: dict[str, dict[str, int]] = {  # rows of whole blocks of 64 weights
    "llama": _ENCODER,
    "bert": _ENCODER,
    "bart": {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    "gpt2": {"n_embd": 64, "n_inner": 128},
}
QUICK = (("llama", "mam"), ("bart", "lora_ffn"), ("bert", "adapter"), ("t5", "ia3"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of weights and tokenizer for each family."""
    words = {**{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    found = {}
    for family in (*PACKED, "gpt2"):
        found[family] = tmp_path_factory.mktemp(family)
        build(family, **WIDE[family]).save_pretrained(found[family])
        tokenizer.save_pretrained(found[family])
    return found


def plain(family: str) -> PreTrainedModel:
    """The same model, which is not packed."""
    return build(family, **WIDE[family])


def task_of(family: str) -> schema.Task:
    writes = family in (*WRITING, *CONTINUING)
    kind = schema.TaskKind.text_to_text if writes else schema.TaskKind.classification
    return schema.Task(name="some", kind=kind, labels=[] if writes else ["a", "b", "c"], metric="accuracy")


def load(folders: dict[str, Path], family: str, form: str) -> PreTrainedModel:
    model = schema.Model(name=family, path=str(folders[family]), quantization=schema.Quantization[form])
    return load_backbone(model, task_of(family)).model.eval()


def logits(model: PreTrainedModel, family: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch(family)).logits
    return found


def cases() -> list[Any]:
    return [
        pytest.param(family, form, preset, marks=[] if (family, preset) in QUICK else [pytest.mark.slow])
        for family in PACKED
        for form in FORMS
        for preset in PRESETS
        if preset != "prompt" or family not in DECODERS
    ]


@pytest.mark.parametrize(("family", "form", "preset"), cases())
def test_every_method_is_trained_next_to_packed_weights(
    folders: dict[str, Path], tmp_path: Path, family: str, form: str, preset: str
) -> None:
    """Counts are those of the unpacked backbone, Δh = 0 changes nothing, and two steps train it."""
    model, bare_model = load(folders, family, form), plain(family)
    assert any(map(is_packed, model.modules()))
    bare = logits(model, family)
    attach(model, PRESETS[preset])
    attach(bare_model, PRESETS[preset])
    assert count(model) == count(bare_model)
    lengths = Lengths([9, 6], [5, 5], joined=False)
    assert count_operations(model, lengths) == count_operations(bare_model, lengths)
    if all(
        m.init is schema.Init.lora
        and m.composition_function.name.name in ("add", "scaled", "multiply")
        and m.modified_representation.name.name not in ("heads", "embedding")
        for m in PRESETS[preset].values()
    ):
        torch.testing.assert_close(logits(model, family), bare, rtol=1e-4, atol=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    shake(model)
    settings = schema.Trainer(learning_rate=1e-3, max_steps=2, batch_size=4, device=schema.Device.cpu)
    result = fitted(model, Targets(family), settings, tmp_path)
    assert result.steps == 2 and result.diverged is None
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("family", [*PACKED, "gpt2"])
def test_gradients_are_those_of_the_unpacked_backbone(folders: dict[str, Path], family: str) -> None:
    found = []
    for unpacks in (False, True):
        model = load(folders, family, "nf4")
        if unpacks:
            unpack_backbone(model)
            assert not any(map(is_packed, model.modules()))
        torch.manual_seed(3)
        attach(model, PRESETS["lora_ffn"])
        shake(model)
        model(**batch(family)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(grad.abs().sum() > 0 for name, grad in found[0].items() if "modification" in name)
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_only_projections_of_layers_are_packed(folders: dict[str, Path], form: str) -> None:
    """The loss reads the output layer, and a classifier and its pooler are trained."""
    llama, bert = load(folders, "llama", form), load(folders, "bert", form)
    attach(llama, PRESETS["lora"])
    assert type(find_output_layer(llama)) is torch.nn.Linear
    assert not any(map(is_packed, bert.classifier.modules())) and not any(map(is_packed, bert.bert.pooler.modules()))
    for model in (llama, bert):
        assert all(is_packed(layer.ffn.second) for layer in find_sites(model).layers)


@pytest.mark.parametrize("form", FORMS)
def test_lora_is_pefts(folders: dict[str, Path], form: str) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = load(folders, "llama", form), load(folders, "llama", form)
    attach(ours, {"": modification("identity", "query_value", "parallel", "scaled", 4, scale=2.0, dropout=0.0)})
    shake(ours)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, config).eval()
    edits = dict(ours.named_modules())
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            function = edits[f"{name}.modification"].function
            module.lora_A["default"].weight.data = function.down.data[0].clone()
            module.lora_B["default"].weight.data = function.up.data[0].clone()
    torch.testing.assert_close(logits(ours, "llama"), logits(adapted, "llama"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*PACKED, "gpt2"])
def test_prediction_leaves_packed_weights_alone_and_merging_unpacks_them(folders: dict[str, Path], family: str) -> None:
    model, unpacked = load(folders, family, "nf4"), load(folders, family, "nf4")
    unpack_backbone(unpacked)
    for each in (model, unpacked):
        torch.manual_seed(3)
        attach(each, PRESETS["lora_ffn"])
        shake(each)
    expected = logits(model, family)
    with prepare_inference(model):
        torch.testing.assert_close(logits(model, family), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, family), expected, rtol=0, atol=0)
    merge(unpacked)
    torch.testing.assert_close(logits(unpacked, family), expected, rtol=1e-3, atol=1e-3)


def test_unpacked_weights_are_near_the_original(folders: dict[str, Path]) -> None:
    for form, error in (("nf4", 0.12), ("int8", 0.02)):
        packed, original = load(folders, "llama", form), plain("llama")
        weight = original.model.layers[0].mlp.down_proj.weight
        found = unpack_weight(packed.model.layers[0].mlp.down_proj)
        assert found.shape == weight.shape
        assert 0 < (found - weight).norm() / weight.norm() < error


def test_a_folder_that_is_packed_already(folders: dict[str, Path], tmp_path: Path) -> None:
    """It is loaded as it is; packing it again, and training its weights, are refused."""
    packed = load(folders, "llama", "nf4")
    packed.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["llama"] / name).read_bytes())
    model = schema.Model(name="llama", path=str(tmp_path))
    again = load_backbone(model, task_of("llama")).model.eval()
    torch.testing.assert_close(logits(again, "llama"), logits(packed, "llama"), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"^unfreeze=all: the backbone is quantised"):
        attach(again, {}, schema.Unfreeze.all)
    with pytest.raises(UserError, match=r"is quantised already \(bitsandbytes\)"):
        load_backbone(replace(model, quantization=schema.Quantization.nf4), task_of("llama"))


@pytest.mark.parametrize("form", FORMS)
def test_a_task_head_that_is_packed_already_is_unpacked(folders: dict[str, Path], tmp_path: Path, form: str) -> None:
    """transformers packs BERT's classifier, which is trained. With other labels it is refused, not trained as it is."""
    options = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}[form]
    packing = BitsAndBytesConfig(**options, llm_int8_skip_modules=["nothing"])
    packed = AutoModelForSequenceClassification.from_pretrained(folders["bert"], quantization_config=packing)
    assert is_packed(packed.classifier)
    packed.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["bert"] / name).read_bytes())
    model, task = schema.Model(name="bert", path=str(tmp_path)), task_of("bert")
    backbone = load_backbone(model, task)
    assert not backbone.untrained
    weight = backbone.model.classifier.weight
    torch.testing.assert_close(weight.float(), unpack_weight(packed.classifier).float(), rtol=0, atol=0)
    attach(backbone.model, PRESETS["lora"])
    assert backbone.model.classifier.weight.requires_grad
    assert any(is_packed(module) for module in backbone.model.modules())
    with pytest.raises(UserError, match=r"classifier is packed as \(3, 64\), not as \(5, 64\)"):
        load_backbone(model, replace(task, labels=list("abcde")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["bart", "bert", "t5"])
def test_a_new_task_head_on_a_folder_that_is_packed_is_refused(
    folders: dict[str, Path], tmp_path: Path, family: str, form: str
) -> None:
    """transformers would pack it, and ends with torch's error as it draws its numbers."""
    options = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}[form]
    AutoModel.from_pretrained(folders[family], quantization_config=BitsAndBytesConfig(**options)).save_pretrained(
        tmp_path
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders[family] / name).read_bytes())
    place = re.escape(f"model.path={tmp_path} is quantised as bitsandbytes and has no weights of the task head")
    with pytest.raises(UserError, match=f"^{place}, and transformers would pack the new one.*; bring the unquantised"):
        load_backbone(schema.Model(name=family, path=str(tmp_path)), task_of("bert"))


def test_a_new_task_head_that_is_packed_is_no_head(folders: dict[str, Path]) -> None:
    """Where transformers can initialise it, as with zeros: its weights would be anything."""
    packing = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["nothing"])
    packed = AutoModelForSequenceClassification.from_pretrained(folders["bert"], quantization_config=packing)
    with pytest.raises(CannotUnpack, match=r"^classifier is packed and has no weights in it$"):
        settle_quantised(packed, "x", torch.float32, ["classifier.weight"])


def test_a_missing_package_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"^model.quantization=nf4 needs bitsandbytes.*pip install peftbench\[quant\]"):
        load(folders, "llama", "nf4")
    with pytest.raises(UserError, match=r"^model.path=X needs gptqmodel, which is not installed"):
        quantisation.require_package("model.path=X", "gptq")


def test_rows_that_a_cpu_unpacks_wrongly_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    """bitsandbytes' kernel for CPUs takes the blocks of 64 weights row by row, though they were packed across rows."""
    for file in folders["llama"].glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    build("llama").save_pretrained(tmp_path)  # 16 wide
    model = schema.Model(name="llama", path=str(tmp_path), quantization=schema.Quantization.nf4)
    with pytest.raises(UserError, match="rows of 16 weights"):
        load_backbone(model, task_of("llama"))
    load_backbone(replace(model, quantization=schema.Quantization.int8), task_of("llama"))


def run_of(form: str, **more: Any) -> schema.Run:
    model = schema.Model(name="some", hub_id="some/model", sizes="x", quantization=schema.Quantization[form])
    task = schema.Task(name="some", kind=schema.TaskKind.classification, metric="accuracy", labels=["a", "b"])
    return schema.Run(method="some", model=model, task=task, trainer=schema.Trainer(learning_rate=1e-3), **more)


def test_packing_names_a_run_and_excludes_training_the_backbone() -> None:
    assert len({hash_run(run_of(form)) for form in ("none", *FORMS)}) == 3
    found = find_faults(run_of("nf4", unfreeze=schema.Unfreeze.all))
    assert any(fault.startswith("unfreeze=all with model.quantization=nf4") for fault in found)
    assert not any("quantization" in fault for fault in find_faults(run_of("none", unfreeze=schema.Unfreeze.all)))
    assert resolve_dtype(run_of("nf4")).model.dtype is schema.DType.float32


def test_the_attention_function_is_the_one_that_is_named(folders: dict[str, Path]) -> None:
    model = schema.Model(name="bart", path=str(folders["bart"]), attn_implementation="eager")
    assert load_backbone(model, task_of("bart")).model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"^model\.attn_implementation=egaer: "):
        load_backbone(replace(model, attn_implementation="egaer"), task_of("bart"))
