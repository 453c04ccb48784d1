"""Packed weights as ordinary ones of the same values.

What bitsandbytes has packed stays packed while a run is trained. The packages of other formats have projections whose
weights nobody can read, tensors without gradients or activations in eight bits. So their weights are unpacked when they
are loaded; from then on such a backbone is like any other.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftbench.backbones.sites import find_sites


class CannotUnpack(Exception):
    """Something is packed in a way that cannot be read; the message says what, to follow the name of the place."""


PACKED_CLASSES = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' classes, by name: the package may be missing
# What transformers leaves on a model that is loaded as quantised. It would save such a model by undoing the conversions
# of its tensors, most of which it cannot undo.
_MARKS = ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "_weight_conversions")


def is_packed(module: nn.Module) -> bool:
    """Return whether a module is a projection of bitsandbytes, whose weight is no matrix to compute with."""
    return type(module).__name__ in PACKED_CLASSES


@torch.no_grad()
def unpack_weight(module: nn.Module) -> Tensor:
    """Return the matrix (out, in) that a packed projection holds, in the dtype of its package.

    Raises:
        CannotUnpack: the package of the module does not say what it holds.
    """
    if is_packed(module):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        weight: Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
        return weight
    found: Any = module  # of gptqmodel, whose matrices are (in, out)
    if type(module).__name__ == "AwqTorchLinear":
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        transposed: Tensor = dequantize_gemm(found.qweight, found.qzeros, found.scales, found.bits, found.group_size)
    elif hasattr(module, "dequantize_weight"):  # the class's: the module's own is compiled, which takes a minute
        transposed = type(found).dequantize_weight(found)
    else:
        raise CannotUnpack(f"a {type(module).__name__} cannot be unpacked")
    return transposed.T


def unpack_backbone(model: PreTrainedModel, missing: Collection[str] = ()) -> None:
    """Replace all packed weights by unpacked ones of the same values, in place, before anything is attached.

    Args:
        missing: names of tensors that came with no weights.

    Raises:
        CannotUnpack: something is packed that cannot be unpacked.
    """
    if getattr(model, "is_quantized", False):  # else transformers has unpacked it, and left its marks
        _unpack(model, missing)
    for mark in _MARKS:
        vars(model).pop(mark, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _unpack(model: PreTrainedModel, missing: Collection[str]) -> None:
    dtype, bare = model.dtype, _build_bare(model)
    for name, plain in list(bare.named_modules()):
        if type(model.get_submodule(name)) is not type(plain):
            _replace(model, name, plain, dtype, missing)
    _unpack_tensors(model, dtype)
    found, wanted = model.state_dict(), bare.state_dict()
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise CannotUnpack(f"{odd[0]} cannot be unpacked")
    for name, tensor in found.items():  # a head that was packed for other labels
        if tensor.shape != wanted[name].shape:
            raise CannotUnpack(f"{name} is packed as {tuple(tensor.shape)}, not as {tuple(wanted[name].shape)}")


def unpack_outside_layers(model: PreTrainedModel, missing: Collection[str] = ()) -> None:
    """Unpack in place what bitsandbytes has packed outside of the repeated layers: the loss reads the output layer, and
    task heads are trained.

    Args:
        missing: names of tensors that came with no weights.

    Raises:
        CannotUnpack: such a tensor is packed, or something has another shape than the model.
    """
    inside = {id(module) for layer in find_sites(model).layers for module in layer.module.modules()}
    outside = [name for name, module in model.named_modules() if is_packed(module) and id(module) not in inside]
    if outside:
        bare = _build_bare(model)
        for name in outside:
            _replace(model, name, bare.get_submodule(name), model.dtype, missing)


def _build_bare(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class and config without packed weights, on the meta device."""
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        bare: PreTrainedModel = type(model)(config)
    return bare


def _replace(model: nn.Module, name: str, plain: nn.Module, dtype: torch.dtype, missing: Collection[str]) -> None:
    """Put the weights of the packed module `name` into `plain`, which is on the meta device, and that in its place."""
    found: Any = model.get_submodule(name)
    if not isinstance(plain, nn.Linear | Conv1D):
        raise CannotUnpack(f"{name}, a {type(found).__name__}, cannot be unpacked")
    if any(tensor.startswith(f"{name}.") for tensor in missing):
        raise CannotUnpack(f"{name} is packed and has no weights in it")
    weight = unpack_weight(found)
    if isinstance(plain, Conv1D):
        weight = weight.T
    if weight.shape != plain.weight.shape:
        raise CannotUnpack(f"{name} is packed as {tuple(weight.shape)}, not as {tuple(plain.weight.shape)}")
    plain.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if plain.bias is not None:
        plain.bias = nn.Parameter(found.bias.detach().to(dtype), requires_grad=False)
    model.set_submodule(name, plain.train(found.training))


@torch.no_grad()
def _unpack_tensors(model: nn.Module, dtype: torch.dtype) -> None:
    """Unpack weights whose modules are ordinary ones: torchao's are tensors of its own classes."""
    known: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or type(parameter) is nn.Parameter:
                continue
            if id(parameter) not in known:
                known[id(parameter)] = nn.Parameter(parameter.dequantize().to(dtype), requires_grad=False)
            setattr(module, name, known[id(parameter)])
