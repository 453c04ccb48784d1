"""Adapters that other libraries trained, as plain tensors by module: peft's folders and loralib's files."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peftbench.utils.errors import UserError
from peftbench.utils.files import read_json
from peftbench.utils.text import list_first

PEFT_CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ROOT = "base_model.model."
WITH_CONFIG = ("LORA", "IA3", "PROMPT_TUNING")

# Keys of peft's LoraConfig, IA3Config and PromptTuningConfig that are read here, or change nothing after training:
# which modules are changed is read from the names of the tensors.
READ = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias"),
    *("target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "fan_in_fan_out", "lora_dropout", "init_lora_weights", "init_ia3_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying", "num_virtual_tokens", "token_dim"),
    *("num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init"),
    *("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
}
# Starts of LoRA that take a part out of the backbone's weights, which the file does not have.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """A change s(B A x + b) of the output of one module: A (r, in), B (out, r), b (out,) or None."""

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class ForeignAdapter:
    """What another library's files hold. All tensors are float32; modules are named by their paths in the model.

    Args:
        low_rank: LoRA's changes.
        vectors: IA3's, of the `output` or the `input` of a module, as (place, l): h becomes h ∘ l.
        prompt: (l, d), vectors before the embedded input.
        others: further tensors by name, such as those of a task head.
        biases: the backbone's biases were trained, and are among the others.
        dropout: LoRA's, in training.
        base: the backbone that the files name, if they do.
        source: what it is, for a person.
    """

    source: str
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    vectors: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    prompt: Tensor | None = None
    others: dict[str, Tensor] = field(default_factory=dict)
    biases: bool = False
    dropout: float = 0.0
    base: str | None = None


def read_adapter(place: Path, alpha: float | None = None) -> ForeignAdapter:
    """Read a folder of peft or a file of loralib.

    Args:
        alpha: LoRA's α of a loralib file, which does not have it.

    Raises:
        UserError: there is no such folder or file, or it holds something that has no form here, by its name.
    """
    if place.is_dir():
        if alpha is not None:
            raise UserError(f"--alpha {alpha:g}: {place / PEFT_CONFIG} has lora_alpha; leave --alpha out.")
        return _read_peft(place)
    if not place.is_file():
        raise UserError(f"{place} is neither a folder that peft wrote nor a file of tensors; give an existing one.")
    return _read_loralib(place, alpha)


OF_PICKLES = (ValueError, TypeError, LookupError, AttributeError, AssertionError)  # what torch.load raises for damage


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, *OF_PICKLES) as error:
        raise UserError(f"{file} cannot be read as tensors: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{file} holds no tensors by name; give the file that loralib's lora_state_dict was saved to.")
    return {name: tensor.float() for name, tensor in found.items()}


# ---- peft ----


def _read_peft(folder: Path) -> ForeignAdapter:
    config = _read_config(folder / PEFT_CONFIG)
    file = next((folder / name for name in PEFT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no {' or '.join(PEFT_FILES)}; give what peft's save_pretrained wrote.")
    saved = _load_tensors(file).items()  # with bias=all, the modules that modules_to_save replaces are there too
    tensors = {_clean(name): tensor for name, tensor in saved if ".original_module." not in name}
    base, kind = config.get("base_model_name_or_path"), str(config["peft_type"])
    source = f"peft's {kind} in {folder}"
    if kind == "PROMPT_TUNING":
        prompt = tensors.pop("prompt_embeddings", None)
        if prompt is None:
            raise UserError(f"{file} has no prompt_embeddings.")
        return ForeignAdapter(source, prompt=prompt[: config["num_virtual_tokens"]], others=tensors, base=base)
    if kind == "IA3":
        vectors = {name.removesuffix(".ia3_l"): t for name, t in tensors.items() if name.endswith(".ia3_l")}
        others = {name: t for name, t in tensors.items() if not name.endswith(".ia3_l")}
        placed = {name: ("output" if t.shape[-1] == 1 else "input", t.flatten()) for name, t in vectors.items()}
        return ForeignAdapter(source, vectors=placed, others=others, base=base)
    low_rank, others = _pair(tensors, file, lambda path, rank: _find_scale(config, path, rank))
    return ForeignAdapter(
        source,
        low_rank,
        others=others,
        biases=config.get("bias") == "all",
        dropout=float(config.get("lora_dropout") or 0.0),
        base=base,
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = read_json(file)
    except OSError as error:
        raise UserError(f"{file.parent} has no {PEFT_CONFIG}; give what peft's save_pretrained wrote.") from error
    except ValueError as error:
        raise UserError(f"{file} is incomplete or not JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") not in WITH_CONFIG:
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(
            f"{file} has peft_type={kind}, which has no form on the four axes; {', '.join(WITH_CONFIG)} have one."
        )
    faults = _find_odd_values(file, config)
    faults += [
        f"{file} has {key}={json.dumps(value)}, which has no form on the four axes."
        for key, value in config.items()
        if key not in READ and value
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGING_STARTS):
        faults.append(
            f"{file} has init_lora_weights={start}, which takes a part out of the backbone's weights that the file "
            "does not have; convert the adapter with peft's path_initial_model_for_weight_conversion first."
        )
    if config.get("bias") == "lora_only":
        faults.append(f"{file} has bias=lora_only: unfreeze=bias trains all biases, and the axes have no part of them.")
    if faults:
        raise UserError(*faults)
    return config


# What is read of a configuration, and the form that it must have.
FORMS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float, type(None))),
    **dict.fromkeys(("base_model_name_or_path", "bias"), (str, type(None))),
    "alpha_pattern": (dict, type(None)),
}


def _find_odd_values(file: Path, config: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each value that is read here and is of another kind than peft writes."""
    odd = [key for key, kinds in FORMS.items() if not isinstance(config.get(key), kinds) or config.get(key) is True]
    odd += (
        ["alpha_pattern"] if "alpha_pattern" not in odd and not _is_pattern(config.get("alpha_pattern") or {}) else []
    )
    if config["peft_type"] == "PROMPT_TUNING" and type(config.get("num_virtual_tokens")) is not int:
        odd.append("num_virtual_tokens")
    return [f"{file} has {key}={json.dumps(config.get(key))}, which is not what peft writes there." for key in odd]


def _is_pattern(patterns: Mapping[str, Any]) -> bool:
    """Return whether the keys are regular expressions and the values numbers."""
    try:
        return all(re.compile(key) and type(value) in (int, float) for key, value in patterns.items())
    except (re.error, RecursionError, OverflowError):
        return False


def _clean(name: str) -> str:
    """Return the name of a tensor in the model, without what peft puts before and into it."""
    name = name.removeprefix(ROOT)
    name = re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", name)
    return re.sub(r"\.default(\.weight|\.bias)?$", r"\1", name)


def _find_scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return α/r of a module, or with use_rslora α/√r."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), None)
    alpha = float(config.get("lora_alpha", 8) if alpha is None else alpha)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# ---- loralib ----


def _read_loralib(file: Path, alpha: float | None) -> ForeignAdapter:
    tensors = {re.sub(r"^(module\.|model\.)+", "", name): tensor for name, tensor in _load_tensors(file).items()}
    if not any(name.endswith(".lora_A") for name in tensors):
        raise UserError(f"{file} has no tensors named lora_A, as loralib's lora_state_dict writes them.")
    if alpha is None:
        raise UserError(f"{file} does not say LoRA's alpha, as no file of loralib does; give --alpha NUMBER.")
    low_rank, others = _pair(tensors, file, lambda path, rank: alpha / rank)
    return ForeignAdapter(f"loralib's file {file}, with alpha {alpha:g}", low_rank, others=others)


# ---- both ----

_PART = re.compile(r"(.*)\.lora_(A|B|B\.bias)(?:\.weight)?")


def _pair(tensors: Mapping[str, Tensor], file: Path, scale: Any) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Return the pairs A, B by module, and the other tensors. `scale` gives that of a path and a rank."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            others[name] = tensor
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    if odd := [name for name in others if ".lora_" in name]:
        raise UserError(f"{file} has {list_names(odd)}, which has no form on the four axes.")
    found = {}
    for path, pair in parts.items():
        if not {"A", "B"} <= pair.keys():
            raise UserError(f"{file} has only one of lora_A and lora_B for {path}.")
        down, up = pair["A"], pair["B"]
        if down.dim() != 2 or up.dim() != 2 or up.shape[1] != len(down):
            what = f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
            raise UserError(
                f"{file} has {what} for {path}: loralib's MergedLinear, which does not say which parts of the "
                "projection it changes."
                if down.dim() == up.dim() == 2 and len(down) % up.shape[1] == 0
                else f"{file} has {what} for {path}, which are no pair of matrices."
            )
        found[path] = LowRank(down, up, scale(path, len(down)), pair.get("B.bias"))
    return found, others


def list_names(names: Iterable[str]) -> str:
    """Return names for a sentence: three of them at most."""
    return list_first(sorted(names), 3)
