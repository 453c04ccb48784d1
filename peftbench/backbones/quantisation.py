"""Backbones whose frozen weights are packed in four or eight bits: what is packed, by which package, and what it holds.

`model.quantization` packs the projections of the repeated layers with bitsandbytes while they are loaded. Embeddings,
norms, the output layer and task heads stay as they are: they are read by the loss or trained. A folder that is
quantised already is loaded as its config.json says: what bitsandbytes has packed in its layers stays packed, the
weights of other formats are unpacked (`unpacking`). A packed weight has fewer elements than the matrix it holds, so
that every count has to ask `count_elements`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from peftbench.backbones.sites import find_sites
from peftbench.backbones.unpacking import is_packed, unpack_outside_layers
from peftbench.config.schema import Model, Quantization
from peftbench.utils.errors import UserError

PACKED = "bitsandbytes"  # the format that stays packed
# The formats of a folder that are loaded: the modules that each needs, by what pip calls them.
PACKAGES = {
    PACKED: {"peftbench[quant]": "bitsandbytes"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "awq": {"gptqmodel": "gptqmodel"},
    "torchao": {"torchao": "torchao"},
    "compressed-tensors": {"compressed-tensors": "compressed_tensors"},
    "fp8": {},
    "gguf": {"gguf": "gguf"},
}
# How transformers has to load them so that they can be unpacked. gptqmodel's other kernels rearrange weights, and some
# are compiled for minutes.
LOADING: dict[str, dict[str, Any]] = {
    "gptq": {"backend": "torch"},
    "awq": {"backend": "torch_awq"},
    "compressed-tensors": {"dequantize": True},
    "fp8": {"dequantize": True},
}


def find_format(config: PretrainedConfig) -> str | None:
    """Return the format in which a place's weights are quantised already, as its config.json names it, or None."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return None
    values = own if isinstance(own, dict) else own.to_dict() if hasattr(own, "to_dict") else {"quant_method": own}
    method = values.get("quant_method")
    return "bitsandbytes" if method is None else str(getattr(method, "value", method))


def require_package(key: str, form: str) -> None:
    """Raise a UserError if `form` cannot be loaded, or its package is missing; `key` is what asked for it, as typed."""
    if form not in {*PACKAGES, *AUTO_QUANTIZATION_CONFIG_MAPPING}:
        raise UserError(f"{key}: transformers knows no quantization_config of the method {form}.")
    if form not in PACKAGES:
        known = ", ".join(PACKAGES)
        raise UserError(
            f"{key} is quantised as {form}, and peftbench reads {known}; bring the unquantised model, with "
            "model.quantization=nf4 if it is large."
        )
    for name, module in PACKAGES[form].items():
        if not _is_installed(module):
            raise UserError(f"{key} needs {module}, which is not installed: pip install {name}.")


def choose_loading(config: PretrainedConfig, form: str) -> dict[str, Any]:
    """Return the options of `from_pretrained` with which the weights of this format can be read; changes `config`."""
    if form == "gguf":
        made = getattr(transformers, "GgufConfig", None)  # earlier versions always unpack
        return {} if made is None else {"quantization_config": made(dequantize=True)}
    own = config.quantization_config
    config.quantization_config = {**(own if isinstance(own, dict) else own.to_dict()), **LOADING.get(form, {})}
    return {}


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a part of a package that is missing as a whole
        return False


def make_quantisation(model: Model, bare: PreTrainedModel, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what `from_pretrained` packs `model.quantization` by.

    Args:
        bare: the model on the meta device, which shows what is outside of the repeated layers and stays unpacked.
        dtype: of the products.

    Raises:
        UserError: bitsandbytes is missing, or the backbone has nothing to pack.
    """
    typed = f"model.quantization={model.quantization.name}"
    require_package(typed, "bitsandbytes")
    inside = {id(module) for layer in find_sites(bare).layers for module in layer.module.modules()}
    projections = {name: module for name, module in bare.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    skipped = [name for name, module in projections.items() if id(module) not in inside]
    if len(skipped) == len(projections):
        raise UserError(
            f"{typed}: the layers of model={model.name} ({bare.config.model_type}) have no linear projections to pack; "
            "use model.quantization=none."
        )
    if model.quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def is_quantised(model: nn.Module) -> bool:
    """Return whether a loaded model's weights are packed."""
    return bool(getattr(model, "is_quantized", False))


def settle_quantised(model: PreTrainedModel, place: str, dtype: torch.dtype, missing: Collection[str] = ()) -> None:
    """Leave what bitsandbytes has packed in the layers as it is, to compute in `dtype`, and unpack the rest.

    Args:
        place: of the weights, as typed.
        missing: names of tensors that came with no weights.

    Raises:
        CannotUnpack: something outside of the layers is packed and cannot be unpacked.
        UserError: bitsandbytes would unpack the weights wrongly.
    """
    unpack_outside_layers(model, missing)
    for module in filter(is_packed, model.modules()):
        packed: Any = module
        if type(module).__name__ == "Linear4bit":
            # A folder may name another dtype. On a CPU with AVX-512 bfloat16, bitsandbytes would rearrange the weights
            # at the first prediction and compute in bfloat16, and could not train them again.
            packed.compute_dtype, packed.compute_type_is_set = dtype, True
            packed.support_avx512bf16_for_cpu = False
            _check_rows(packed, place)


def _check_rows(module: Any, place: str) -> None:
    """Refuse four-bit rows on a CPU that are not whole blocks: bitsandbytes 0.50 packs blocks across rows, but its
    kernel for CPUs unpacks them row by row, and so gives wrong weights without a word."""
    width, block = module.in_features, module.weight.quant_state.blocksize
    if module.weight.device.type == "cpu" and width % block:
        raise UserError(
            f"{place} in four bits on a CPU: its projections have rows of {width} weights, and bitsandbytes may "
            f"unpack what is no multiple of {block} wrongly there; use a GPU or model.quantization=int8."
        )


@contextmanager
def present_as_adapted(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, transformers' Trainer takes a quantised model, as it takes one that peft has adapted: its own
    check for something to train does not know our modifications."""
    if not is_quantised(model):
        yield
        return
    vars(model)["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del vars(model)["_hf_peft_config_loaded"]


def count_elements(parameter: Tensor) -> int:
    """Return the number of elements of a parameter; of a packed one, those of the matrix that it holds."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
