"""What AdaLoRA of peft needs beside its layers: ranks that are pruned in training, and a penalty on the loss.

peft has both in its wrapper of the model, which peftbench does not use: the model stays one of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from peftbench.modification.peft_method import ADAPTER, get_settings
from peftbench.utils.errors import UserError

STATE_FILE = "ranks.pt"  # in a checkpoint
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def is_adaptive(model: nn.Module) -> bool:
    """Return whether the method of peft that is attached to a model is AdaLoRA."""
    settings = get_settings(model)
    return settings is not None and settings.peft_type.value == "ADALORA"


def make_penalty(model: nn.Module) -> Callable[[], Tensor] | None:
    """Return a function that computes AdaLoRA's penalty, or None for other methods.

    It is the mean over all A and B of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖, times peft's `orth_reg_weight` (Zhang et al. 2023).
    """
    if not is_adaptive(model):
        return None
    weight = get_settings(model).orth_reg_weight
    grams = [(p, True) for name, p in model.named_parameters() if f".lora_A.{ADAPTER}" in name]
    grams += [(p, False) for name, p in model.named_parameters() if f".lora_B.{ADAPTER}" in name]

    def compute_penalty() -> Tensor:
        products = [p @ p.T if is_down else p.T @ p for p, is_down in grams]
        norms = [torch.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in products]
        penalty: Tensor = weight * torch.stack(norms).mean()
        return penalty

    return compute_penalty


class PruneRanks(TrainerCallback):
    """Has peft update the importance of AdaLoRA's ranks after each optimiser step, and prune them by its schedule."""

    def __init__(self, model: PreTrainedModel) -> None:
        from peft.tuners.adalora import RankAllocator

        settings = get_settings(model)
        allocator = RankAllocator(model, settings, ADAPTER)
        # What `AdaLoraModel.update_and_allocate` reads of itself.
        self.part: Any = SimpleNamespace(
            model=model, peft_config={ADAPTER: settings}, trainable_adapter_name=ADAPTER, rankallocator=allocator
        )

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        settings = self.part.peft_config[ADAPTER]
        if settings.tinit + settings.tfinal + 2 > state.max_steps:  # a step to measure in, and one to prune at
            raise UserError(
                f"peft.tinit={settings.tinit} and peft.tfinal={settings.tfinal} leave too few of the {state.max_steps} "
                "optimiser steps to prune ranks in; make them smaller."
            )
        self.part.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from peft import AdaLoraModel

        AdaLoraModel.update_and_allocate(self.part, state.global_step + 1)

    def save(self, folder: Path) -> None:
        """Write the importance of the ranks to a checkpoint's folder."""
        allocator = self.part.rankallocator
        values = {name: getattr(allocator, name) for name in _IMPORTANCE}
        torch.save({**values, "rank_pattern": self.part.peft_config[ADAPTER].rank_pattern}, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Restore this object to its state when the checkpoint was written."""
        values = torch.load(folder / STATE_FILE, map_location=self.part.model.device, weights_only=True)
        self.part.peft_config[ADAPTER].rank_pattern = values.pop("rank_pattern")
        for name, value in values.items():
            setattr(self.part.rankallocator, name, value)
