"""The files by which the peft library itself reads a run: `PeftModel.from_pretrained(backbone, folder)`."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_sites
from peftbench.modification.peft_method import ADAPTER, get_settings, list_added
from peftbench.modification.state import write_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # as peft names them


def write_peft_files(model: PreTrainedModel, folder: Path, base: str, untrained: Collection[str] = ()) -> None:
    """Write the files that `PeftModel.from_pretrained(backbone, folder)` reads; see `make_peft_files`."""
    config, tensors = make_peft_files(model, base, untrained)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / WEIGHTS_FILE)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")


def make_peft_files(
    model: PreTrainedModel, base: str, untrained: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return peft's config and tensors of the method of peft that is attached to a model, with the trained task head.

    Args:
        base: what peft should call the backbone: its hub id or folder.
        untrained: names of parameters that the backbone's files do not have.
    """
    settings = get_settings(model)
    heads = find_sites(model).family.task_head
    added = list_added(model)
    tensors = {_name_for_peft(model, name): tensor for name, tensor in added.items() if ".ranknum." not in name}
    others = {
        f"base_model.model.{name}": p
        for name, p in model.named_parameters()
        if name not in added and name.split(".")[0] in heads and (p.requires_grad or name in untrained)
    }
    values = settings.to_dict()
    values |= {"base_model_name_or_path": base, "inference_mode": True}
    if others:
        values["modules_to_save"] = sorted({name.split(".")[2] for name in others})
    if "rank_pattern" in values:
        values["rank_pattern"] = {}  # the tensors keep their pruned entries, which are 0
    config: dict[str, Any] = json.loads(json.dumps(values, default=_to_json))
    return config, {**tensors, **others}


def _name_for_peft(model: PreTrainedModel, name: str) -> str:
    """Return peft's name for a tensor in a file. What several layers share is at the top of peft's wrapper."""
    short = name.replace(f".{ADAPTER}", "")
    owner = name
    while owner and not hasattr(model.get_submodule(owner.rpartition(".")[0]), "base_layer"):
        owner = owner.rpartition(".")[0]
    layer = owner.rpartition(".")[0]
    leaf = short.removeprefix(f"{layer}.")
    everywhere = model.state_dict(keep_vars=True)
    alike = sum(tensor is everywhere[name] for tensor in everywhere.values())
    frozen = leaf in getattr(model.get_submodule(layer), "other_param_names", ())
    return f"base_model.{leaf}" if alike > 1 or frozen else f"base_model.model.{short}"


def _to_json(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))
