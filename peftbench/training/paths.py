"""Which fast paths a training takes: what `auto` means for a backbone on a device."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from peftbench import config
from peftbench.errors import UserError
from peftbench.training.padding_free import refusal

AUTO = "auto"
LAYERDROP = ("encoder_layerdrop", "decoder_layerdrop")  # keys of a backbone's config, decided in Python at each step


def settled(settings: config.Trainer, model: PreTrainedModel, *, bf16: bool, records: bool) -> config.Trainer:
    """The settings with true or false in place of `auto`: true where a path is quick and the backbone can have it.

    Args:
        bf16: the training runs under bfloat16 autocast.
        records: steps can be recorded, as on a GPU.

    Raises:
        UserError: `graphs=true` where they cannot.
    """
    dropped = [key for key in LAYERDROP if getattr(model.config, key, 0.0) > 0]
    if settings.graphs is True and not records:
        raise UserError(
            "trainer.graphs=true: CUDA graphs need a GPU, and there is none here; use trainer.graphs=false."
        )
    if settings.graphs is True and dropped:
        raise UserError(
            f"trainer.graphs=true: this backbone drops whole layers at random ({' and '.join(dropped)} in its "
            "config.json), and a CUDA graph would drop the same ones in every step; use trainer.graphs=false."
        )
    padding_free, graphs = settings.padding_free, settings.graphs
    if padding_free == AUTO:
        quick = model.device.type == "cuda" and (bf16 or model.dtype is torch.bfloat16)
        padding_free = quick and refusal(model) is None
    if graphs == AUTO:
        whole = settings.micro_batch is None and settings.accumulation == 1 and not settings.gradient_checkpointing
        graphs = records and whole and not dropped
    return replace(settings, padding_free=padding_free, graphs=graphs)
