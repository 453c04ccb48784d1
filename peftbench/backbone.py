"""The frozen backbone: a model and its tokenizer, from a local folder or the hub, for a kind of task.

Everything that can be wrong with the place (no folder, no config, no network) is found before weights are read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftbench.config import Model, Task, TaskKind
from peftbench.errors import UserError
from peftbench.sites import family_of

MINI = Path(__file__).resolve().parent / "mini"  # the embedded backbone, see scripts/pretrain.py


@dataclass(frozen=True)
class Backbone:
    """A loaded model with its tokenizer. `untrained` names the parameters that came with no weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    untrained: frozenset[str]


def load_backbone(model: Model, task: Task) -> Backbone:
    """Load the backbone for a task, on the CPU, in `model.dtype`, with SDPA attention.

    Raises:
        UserError: the place holds no model, cannot be reached, or its architecture has no family or no such head.
    """
    source = _source(model)
    where = {"revision": model.revision} if model.revision else {}
    config = _explained(model, source, lambda: AutoConfig.from_pretrained(source, **where))
    family_of(config.model_type)
    if task.kind is TaskKind.classification:
        labels = {"num_labels": len(task.labels), "id2label": dict(enumerate(task.labels))}
        labels["label2id"] = {label: code for code, label in enumerate(task.labels)}
        auto, more = AutoModelForSequenceClassification, labels
    else:
        auto, more = AutoModelForSeq2SeqLM, {}
        if not config.is_encoder_decoder:
            raise UserError(
                f"task={task.name} writes text and model={model.name} is an encoder ({config.model_type}); take an "
                "encoder-decoder such as model=bart_large or model=mini."
            )
    loaded, report = _explained(
        model,
        source,
        lambda: auto.from_pretrained(
            source,
            **where,
            **more,
            dtype=getattr(torch, model.dtype.name),
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a folder tuned for other labels: its head is made anew, and trained
        ),
    )
    tokenizer = _explained(model, source, lambda: AutoTokenizer.from_pretrained(source, **where))
    untrained = set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}
    return Backbone(loaded, tokenizer, frozenset(untrained))
