"""A training of a tiny model by `fit_model`, on a few rows, as several tests have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.backbones.sites import list_configs
from peftbench.config.schema import LOSS, Device, Schedule, Trainer
from peftbench.modification.attach import attach
from peftbench.training.checkpoint import Checkpoint, Checkpoints
from peftbench.training.fit import Criterion, Fitted, Monitor, Recipe, Resuming, fit_model
from peftbench.training.replay import Recorder
from peftbench.training.trainer import Evaluate
from peftbench.utils.team import ALONE, Team
from tests.families import PRESETS, WRITING, batch, build, dropout, shake

EXAMPLES = 8
EPSILON = 10.0  # so large that a step of AdamW, g / (|g| + EPSILON), shows the gradient's scale


class Rows:
    """What `fit_model` takes of a task: rows that are padded already, to train and to select on."""

    def __init__(self, rows: dict[str, Tensor], lengths: Sequence[int]) -> None:
        self.rows, self.lengths = rows, list(lengths)
        self.train = self.selection = Dataset.from_dict({name: column.tolist() for name, column in rows.items()})

    def label_codes(self) -> list[int]:
        codes: list[int] = self.rows["labels"].tolist()
        return codes

    def collator(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}


class Targets(Rows):
    """Eight rows, with 1 to 5 target tokens to predict where there are any; only the first `with_targets` of them."""

    def __init__(self, family: str, with_targets: int = EXAMPLES) -> None:
        lengths = (9, 8, 7, 6, 5, 4, 4, 4)
        rows = batch(family, lengths)
        if rows["labels"].dim() > 1:
            for row in range(EXAMPLES):
                rows["labels"][row, 1 + row % 5 :] = -100
                rows["labels"][row, 1] = 7  # which a decoder alone predicts from the first
            rows["labels"][with_targets:] = -100
        if family in WRITING:
            rows["decoder_input_ids"] = build(family).prepare_decoder_input_ids_from_labels(labels=rows["labels"])
        super().__init__(rows, lengths)


def model_of(family: str, preset: str, **more: float) -> PreTrainedModel:
    """A model to be trained, its modifications shaken, without dropout and KV cache; `more` is for its config."""
    model = build(family, **{**dropout(family), **more})
    attach(model, PRESETS[preset])
    shake(model)
    for config in list_configs(model):
        config.use_cache = False
    return model.train()


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """By name, of the trained tensors on which the loss depends."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def one_step(**settings: Any) -> Trainer:
    """Settings of a step of the plain gradient, or nearly so, on all of `Targets`; others by name."""
    return Trainer(
        **{
            "learning_rate": 1.0,
            "max_steps": 1,
            "batch_size": EXAMPLES,
            "schedule": Schedule.constant,
            "warmup": 0.0,
            "max_grad_norm": 1e9,
            "epsilon": EPSILON,
            "device": Device.cpu,
            **settings,
        }
    )


def fitted(
    model: PreTrainedModel,
    data: Rows,
    settings: Trainer,
    folder: Path,
    *,
    autocast_dtype: torch.dtype | None = None,
    recorder: Recorder | None = None,
    evaluate: Evaluate = dict,
    metric: str = LOSS,
    checkpoints: Checkpoints | None = None,
    resume: Checkpoint | None = None,
    team: Team = ALONE,
    **monitoring: Any,
) -> Fitted:
    """`fit_model`, by default without scores, with no checkpoint in the first hour; `monitoring` is for `Monitor`."""
    return fit_model(
        model,
        data,  # type: ignore[arg-type]  # it has what fit reads of a TaskData
        Recipe(settings, seed=1, autocast_dtype=autocast_dtype, recorder=recorder),
        Criterion(evaluate, metric),
        Resuming(checkpoints or Checkpoints(folder, minutes=60, stamp=""), resume),
        Monitor(**monitoring),
        team,
    )


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of the tensors that are trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
