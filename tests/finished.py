"""Finished runs on disk that were never trained: their modifications and heads have random values."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertTokenizerFast, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.backbones.load import load_backbone
from peftbench.config.compose import compose_run
from peftbench.modification.attach import attach_run
from peftbench.modification.state import fold, save
from peftbench.records.record import Score
from peftbench.records.recording import record_run
from tests.families import build, shake


def make_run(folder: Path, *words: str, labels: tuple[str, ...] = ()) -> Path:
    """A run of `peftbench train WORDS`, recorded as done with a score of 50 on 16 examples; its data need not exist."""
    run = compose_run([*words, *([f"task.labels=[{','.join(labels)}]"] if labels else [])], reads_data=False)
    torch.manual_seed(0)
    with record_run(run, folder, list(words)) as record:
        backbone = load_backbone(run.model, run.task)
        attach_run(backbone.model, run, backbone.untrained)
        shake(backbone.model)
        fold(backbone.model)
        save(backbone.model, folder / "adapter", backbone.untrained)
        splits = {"report": {"split": "test", "examples": 16}}
        record.data = {"splits": splits, "scored_on": "", "fingerprint": "", "notes": []}
        if labels:
            record.data["labels"] = list(labels)
        record.scores["report"] = Score("test", 16, {run.task.metric: 50.0})
        record.score = 50.0
    return folder


def save_backbone(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder for model.path."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_bert(folder: Path) -> Path:
    """A BERT whose tokenizer knows letters and digits only."""
    signs = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs), "film", "good"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "words.txt"), model_max_length=64)
    return save_backbone(folder, build("bert"), tokenizer)
