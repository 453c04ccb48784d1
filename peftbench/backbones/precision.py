"""The device and the floating-point format that a run computes with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from peftbench.config import schema
from peftbench.utils.errors import UserError


def choose_device(settings: schema.Trainer) -> torch.device:
    """Return `trainer.device`, with `auto` as the GPU if there is one. Raises UserError for a GPU that is not there."""
    if settings.device is schema.Device.cuda and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but torch sees no CUDA device here; use trainer.device=auto or cpu.")
    cpu = settings.device is schema.Device.cpu or not torch.cuda.is_available()
    return torch.device("cpu" if cpu else "cuda")


def use_bf16(settings: schema.Trainer) -> bool:
    """Return whether to compute in bfloat16: with `precision=bf16`, or with `auto` on a GPU that supports it."""
    if settings.precision is not schema.Precision.auto:
        return settings.precision is schema.Precision.bf16
    return choose_device(settings).type == "cuda" and torch.cuda.is_bf16_supported()


def resolve_dtype(run: schema.Run) -> schema.Run:
    """Return the run with `model.dtype=auto` decided; see config/schema.py.

    The float32 of a quantised backbone is decided like `auto`: what is not packed is small, and everything next to
    packed weights would be computed in float32.
    """
    packed = run.model.quantization is not schema.Quantization.none and run.model.dtype is schema.DType.float32
    if run.model.dtype is not schema.DType.auto and not packed:
        return run
    cuda = choose_device(run.trainer).type == "cuda"
    small = cuda and use_bf16(run.trainer) and run.unfreeze is schema.Unfreeze.none
    dtype = schema.DType.bfloat16 if small else schema.DType.float32
    return replace(run, model=replace(run.model, dtype=dtype))


def use_autocast(settings: schema.Trainer, model: schema.Model) -> bool:
    """Return whether to run under bfloat16 autocast, which a bfloat16 backbone does not need."""
    return use_bf16(settings) and model.dtype is not schema.DType.bfloat16


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Return bfloat16 autocast on `device`, or a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def cast_for_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Return a floating-point tensor in the dtype in which autocast would multiply it; unchanged without autocast."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
