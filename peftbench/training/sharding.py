"""Backbones that do not fit on one device: `trainer.sharding=full`.

Each transformer layer is a group of FSDP2 (torch's `fully_shard`): a process holds its share of the layer's frozen
weights, and all shares are gathered while the layer computes. Trained parameters, embeddings and the output layer are
whole in every process, so that gradients, checkpoints and adapter files are as without sharding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from peftbench.backbones.quantisation import is_quantised
from peftbench.backbones.sites import find_sites, list_configs
from peftbench.utils.errors import UserError
from peftbench.utils.team import Team


def shard_layers(model: PreTrainedModel, team: Team, device: torch.device) -> None:
    """Shard the layers of a model, which is on the CPU, over the processes; each layer goes to the device by itself.

    Raises:
        UserError: the backbone's layers, or this torch, cannot be sharded.
    """
    fully_shard = _import_fully_shard()
    _require_layers_of_all(model)
    mesh = init_device_mesh(device.type, (team.size,))
    layers = list(dict.fromkeys(layer.module for layer in find_sites(model).layers))
    frozen = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
    shared = {p for p in model.parameters() if p not in frozen}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=shared)
    # The root has no parameters of its own. It lets the layers gather ahead of their turn.
    fully_shard(model, mesh=mesh, ignored_params=shared)


def is_sharded(model: PreTrainedModel) -> bool:
    """Return whether `shard_layers` has sharded the model."""
    return hasattr(fsdp, "FSDPModule") and isinstance(model, fsdp.FSDPModule)


def _import_fully_shard() -> Callable[..., Any]:
    """Return torch's function. Raises UserError for a torch whose function cannot leave parameters out."""
    found: Callable[..., Any] | None = getattr(fsdp, "fully_shard", None)
    if found is None or "ignored_params" not in inspect.signature(found).parameters:
        raise UserError(f"trainer.sharding=full needs torch 2.8 or newer, and this is {torch.__version__}.")
    return found


def _require_layers_of_all(model: PreTrainedModel) -> None:
    """Raise UserError for a backbone whose layers are packed, or left out at random in each process by itself."""
    if is_quantised(model):
        raise UserError(
            "trainer.sharding=full cannot shard a quantised backbone; use model.quantization=none, or "
            "trainer.sharding=none, with which each process has the packed backbone."
        )
    for config in list_configs(model):
        for key, rate in config.to_dict().items():
            if key.endswith("layerdrop") and rate:
                raise UserError(
                    f"trainer.sharding=full: this backbone leaves layers out at random ({key}={rate} in its "
                    "config.json), and all processes must compute the same; set it to 0 there."
                )
