"""The device and the floating-point format that a run computes with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_family
from peftbench.config import schema
from peftbench.utils.errors import UserError


def choose_device(settings: schema.Trainer) -> torch.device:
    """Return `trainer.device`, with `auto` as the GPU if there is one. Raises UserError for a GPU that is not there."""
    if settings.device is schema.Device.cuda and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but torch sees no CUDA device here; use trainer.device=auto or cpu.")
    cpu = settings.device is schema.Device.cpu or not torch.cuda.is_available()
    return torch.device("cpu" if cpu else "cuda")


HALF = {schema.Precision.bf16: torch.bfloat16, schema.Precision.fp16: torch.float16}


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the number of a CPU's threads, for a record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"


def identify_gpu(device: torch.device) -> str | None:
    """Return the UUID of a GPU, for a record; None for a CPU, or where torch does not say."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) or None if device.type == "cuda" else None


def choose_half_dtype(settings: schema.Trainer) -> torch.dtype | None:
    """Return the 16-bit dtype to compute in; None: float32. `auto` is bfloat16 on a GPU that supports it.

    Raises:
        UserError: `precision=fp16` without a GPU.
    """
    if settings.precision is schema.Precision.auto:
        quick = choose_device(settings).type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if quick else None
    if settings.precision is schema.Precision.fp16 and choose_device(settings).type != "cuda":
        raise UserError("trainer.precision=fp16 needs a GPU, and this run has none; use trainer.precision=fp32.")
    return HALF.get(settings.precision)


def resolve_dtype(run: schema.Run) -> schema.Run:
    """Return the run with `model.dtype=auto` decided; see config/schema.py.

    The float32 of a quantised backbone is decided like `auto`: what is not packed is small, and everything next to
    packed weights would be computed in float32.
    """
    packed = run.model.quantization is not schema.Quantization.none and run.model.dtype is schema.DType.float32
    if run.model.dtype is not schema.DType.auto and not packed:
        return run
    cuda = choose_device(run.trainer).type == "cuda"
    bf16 = choose_half_dtype(run.trainer) is torch.bfloat16
    small = cuda and bf16 and run.unfreeze is schema.Unfreeze.none
    dtype = schema.DType.bfloat16 if small else schema.DType.float32
    return replace(run, model=replace(run.model, dtype=dtype))


def choose_autocast_dtype(settings: schema.Trainer, model: schema.Model, loaded: PreTrainedModel) -> torch.dtype | None:
    """Return the dtype of the autocast to run under; None: without, as a bfloat16 backbone in bfloat16.

    Raises:
        UserError: transformers' class of the `loaded` model fails under autocast.
    """
    dtype = None if model.dtype is schema.DType.bfloat16 else choose_half_dtype(settings)
    model_type = str(loaded.config.model_type)
    if dtype is not None and not find_family(model_type).autocast:
        raise UserError(
            f"trainer.precision={settings.precision.name}: transformers' {model_type} cannot compute in 16 bits beside "
            "weights in float32; use trainer.precision=fp32, or model.dtype=bfloat16 if the backbone stays frozen."
        )
    return dtype


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return autocast to `dtype` on `device`; None: a context that does nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def cast_for_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Return a floating-point tensor in the dtype in which autocast would multiply it; unchanged without autocast."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
