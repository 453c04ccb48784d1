"""Folders that are quantised already: what they hold is what is trained on, or one sentence says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import InvalidVersion
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_gguf_available

from peftbench.backbones import quantisation
from peftbench.backbones.load import load_backbone
from peftbench.backbones.quantisation import is_quantised
from peftbench.config import schema
from peftbench.evaluation.inference import prepare_inference
from peftbench.modification.attach import attach
from peftbench.modification.counting import count
from peftbench.modification.merge import merge
from peftbench.utils.errors import UserError
from tests.families import PRESETS, VOCABULARY, batch, build, shake

TASK = schema.Task(name="some", kind=schema.TaskKind.text_to_text, metric="bleu")
WIDE = {"hidden_size": 64, "intermediate_size": 128}
BLOCK = 32
Weights = dict[str, torch.Tensor]
Pack = Callable[[str, torch.Tensor, Weights], torch.Tensor]
WORDS = {**{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, **{f"w{i}": i for i in range(4, VOCABULARY)}}


def save_plain(folder: Path) -> Path:
    """A tiny Llama with its tokenizer."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    build("llama", **WIDE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantise(
    folder: Path, config: dict[str, Any], pack: Callable[[str, torch.Tensor, Weights], torch.Tensor]
) -> Weights:
    """Pack the layers' projections of the weights in `folder`; return all weights with the values that these hold.

    Args:
        pack: puts what is stored for a matrix into the last argument, and returns the matrix that it holds.
    """
    packed: Weights = {}
    held: Weights = {}
    for name, mapped in load_file(folder / "model.safetensors").items():
        weight = mapped.clone()  # older safetensors map the file, which is written anew below
        if name.endswith("_proj.weight"):
            held[name] = pack(name.removesuffix(".weight"), weight, packed)
        else:
            held[name] = packed[name] = weight
    stored = {name: weight.contiguous() for name, weight in packed.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**own, "quantization_config": config}))
    return held


def pack_fp8(name: str, weight: torch.Tensor, packed: Weights) -> torch.Tensor:
    """Eight-bit floats with a scale for each block."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    packed[f"{name}.weight"], packed[f"{name}.weight_scale_inv"] = small.reshape(rows, columns), scale
    return (small.float() * scale[:, None, :, None]).reshape(rows, columns)


def pack_int8(name: str, weight: torch.Tensor, packed: Weights) -> torch.Tensor:
    """Integers with a scale for each row, as compressed-tensors has them."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    small = (weight / scale).round().to(torch.int8)
    packed[f"{name}.weight"], packed[f"{name}.weight_scale"] = small, scale
    return small.float() * scale


def pack_gptq(name: str, weight: torch.Tensor, packed: Weights) -> torch.Tensor:
    """Four bits, eight rows of W^T in an integer, with a scale for each group of a row; the zero is stored less one."""
    outputs, inputs = weight.shape
    groups = weight.reshape(outputs, -1, BLOCK)
    scale = (groups.abs().amax(-1) / 7).half()
    codes = (groups / scale[..., None]).round().clamp(-8, 7).to(torch.int64) + 8
    rows = codes.reshape(outputs, inputs).T
    packed[f"{name}.qweight"] = _pack(rows.reshape(inputs // 8, 8, outputs), 1)
    packed[f"{name}.qzeros"] = _pack(torch.full((inputs // BLOCK, outputs // 8, 8), 7), 2)
    packed[f"{name}.scales"] = scale.T
    packed[f"{name}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // BLOCK
    return ((codes - 8) * scale[..., None]).reshape(outputs, inputs).float()


def _pack(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Put eight codes of four bits, along `dim`, into an int32."""
    shape = [1] * codes.dim()
    shape[dim] = 8
    words = (codes << (4 * torch.arange(8)).reshape(shape)).sum(dim)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FORMS: dict[str, tuple[str | None, dict[str, Any], Pack]] = {
    "fp8": (None, {"activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}, pack_fp8),
    "compressed-tensors": (
        "compressed_tensors",
        {
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT8}},
        },
        pack_int8,
    ),
    "gptq": ("gptqmodel", {"bits": 4, "group_size": BLOCK, "sym": True, "desc_act": False}, pack_gptq),
}


def load(folder: Path) -> Any:
    return load_backbone(schema.Model(name="tiny", path=str(folder)), TASK)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch("llama")).logits
    return found


@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_of_other_packages_are_unpacked(tmp_path: Path, form: str) -> None:
    """Logits next to a modification, counts, predictions and what is merged are those of the unpacked backbone."""
    package, config, pack = FORMS[form]
    if package is not None:
        pytest.importorskip(package, reason=f"{package} unpacks {form}: pip install {package}")
    held = quantise(save_plain(tmp_path / "packed"), {"quant_method": form, **config}, pack)
    backbone, plain = load(tmp_path / "packed"), build("llama", **WIDE)
    assert any(f"quantised as {form}: its weights are unpacked to float32" in note for note in backbone.notes)
    assert backbone.quantization == form and not is_quantised(backbone.model)
    plain.load_state_dict(held, strict=False)
    for model in (backbone.model.eval(), plain):
        torch.manual_seed(3)
        attach(model, PRESETS["lora_ffn"])
    assert count(backbone.model) == count(plain)
    shake(plain)
    added = {name: tensor for name, tensor in plain.state_dict().items() if "modification" in name}
    backbone.model.load_state_dict(added, strict=False)  # not shaken: the order of a package's modules is its own
    expected = logits(plain)
    torch.testing.assert_close(logits(backbone.model), expected, rtol=1e-5, atol=1e-5)
    with prepare_inference(backbone.model):
        torch.testing.assert_close(logits(backbone.model), expected, rtol=1e-4, atol=1e-4)
    names = [name for name in backbone.model.state_dict() if "modification" not in name]
    merge(backbone.model)
    tensors = backbone.model.state_dict()
    backbone.model.save_pretrained(tmp_path / "merged", state_dict={name: tensors[name] for name in names})
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_what_torchao_has_packed_is_unpacked(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao packs the weights: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    packing = TorchAoConfig(Int8WeightOnlyConfig())
    plain = save_plain(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=packing, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    for file in plain.glob("token*"):
        (tmp_path / "packed" / file.name).write_bytes(file.read_bytes())
    backbone, bare = load(tmp_path / "packed"), build("llama", **WIDE)
    assert all(type(parameter) is torch.nn.Parameter for parameter in backbone.model.parameters())
    torch.testing.assert_close(logits(backbone.model.eval()), logits(packed.eval()), rtol=1e-4, atol=1e-4)
    for model in (backbone.model, bare):
        attach(model, PRESETS["mam"])
    assert count(backbone.model) == count(bare)


def test_a_head_that_torchao_has_packed_for_other_labels_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao packs the weights: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForSequenceClassification, TorchAoConfig

    plain = save_plain(tmp_path / "plain")
    build("bert", **WIDE).save_pretrained(plain)
    packing = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["nothing"])
    packed = AutoModelForSequenceClassification.from_pretrained(plain, quantization_config=packing, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    for file in plain.glob("token*"):
        (tmp_path / "packed" / file.name).write_bytes(file.read_bytes())
    task = replace(TASK, kind=schema.TaskKind.classification, labels=list("abcde"), metric="accuracy")
    with pytest.raises(UserError, match=r"classifier\.weight is packed as \(3, 64\), not as \(5, 64\)"):
        load_backbone(schema.Model(name="tiny", path=str(tmp_path / "packed")), task)


def save_gguf(folder: Path, model: LlamaForCausalLM, form: str) -> None:
    """Write a GGUF file of a Llama, with metadata that describes it, as llama.cpp does."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[form]
    for name, weight in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbours, transformers halves
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        values, path = weight.contiguous().numpy(), names.get_name(name, try_suffixes=(".weight",))
        if name.endswith("_proj.weight"):
            writer.add_tensor(path, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(path, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(("form", "error"), [("F32", 1e-6), ("Q8_0", 0.02)])
def test_a_gguf_file_is_unpacked(tmp_path: Path, form: str, error: float, described: bool) -> None:
    """With its config.json beside it or without, since the file describes itself."""
    pytest.importorskip("gguf", reason="gguf reads the file: pip install gguf")
    try:
        is_gguf_available()
    except InvalidVersion as error:
        pytest.skip(f"this transformers does not find the version of gguf: {error}")
    folder, plain = save_plain(tmp_path / "tiny"), build("llama", **WIDE)
    (folder / "model.safetensors").unlink()
    if not described:
        (folder / "config.json").unlink()
    save_gguf(folder, plain, form)
    backbone = load(folder)
    assert backbone.quantization == "gguf" and not is_quantised(backbone.model)
    found, weights = backbone.model.state_dict(), plain.state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= error * weight.norm(), name
    assert count(backbone.model) == count(plain)
    (folder / "second.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"has 2 GGUF files \(second\.gguf, tiny\.gguf\); give a folder with one"):
        load(folder)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("hqq", r"is quantised as hqq, and peftbench reads bitsandbytes, gptq, awq, .*; bring the unquantised model"),
        ("spqr", "is quantised as spqr, and peftbench reads"),
        ("gptq", "needs gptqmodel, which is not installed: pip install gptqmodel"),
        ("awq", "needs gptqmodel, which is not installed"),
        ("torchao", "needs torchao, which is not installed"),
        ("compressed-tensors", "needs compressed_tensors, which is not installed: pip install compressed-tensors"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, said: str) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda module: None)
    folder = save_plain(tmp_path / "tiny")
    quantise(folder, {"quant_method": form, "bits": 4}, lambda name, weight, packed: weight)
    with pytest.raises(UserError, match=said):
        load(folder)


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda module: None)
    (tmp_path / "tiny.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"needs gguf, which is not installed: pip install gguf"):
        load(tmp_path)


def test_a_package_that_cannot_load_a_folder_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages raise errors of all kinds, for a missing GPU for example."""

    def fail(*args: object, **options: object) -> None:
        raise NotImplementedError("only supported on GPU.")

    folder = save_plain(tmp_path / "tiny")
    quantise(folder, {"quant_method": "fp8", **FORMS["fp8"][1]}, pack_fp8)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    said = r"^model\.path=.* is quantised as fp8, and transformers cannot load it here \(NotImplementedError: only supp"
    with pytest.raises(UserError, match=said):
        load(folder)


def test_a_backbone_that_caps_its_scores_is_loaded_with_the_cap(tmp_path: Path) -> None:
    """Some versions of transformers take sdpa for Gemma 2, which leaves the cap out and says nothing."""
    folder = save_plain(tmp_path / "tiny")  # for its tokenizer
    build("gemma2").save_pretrained(folder)
    assert load(folder).model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"^model\.attn_implementation=sdpa: gemma2 caps its attention scores; sdpa"):
        load_backbone(schema.Model(name="tiny", path=str(folder), attn_implementation="sdpa"), TASK)


def test_a_folder_is_not_quantised_twice(tmp_path: Path) -> None:
    folder = save_plain(tmp_path / "tiny")
    quantise(folder, {"quant_method": "fp8", **FORMS["fp8"][1]}, pack_fp8)
    model = schema.Model(name="tiny", path=str(folder))
    with pytest.raises(UserError, match=r"is quantised already \(fp8\); leave model\.quantization out"):
        load_backbone(replace(model, quantization=schema.Quantization.nf4), TASK)
