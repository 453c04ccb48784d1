"""A text in, a text out, by a model that generates: summarisation, translation, text from data and the like."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.metrics.metrics import References
from peftbench.metrics.sentences import first_sentence
from peftbench.tasks.base import TaskData
from peftbench.tasks.framing import SOURCE, framed
from peftbench.tasks.languages import begin_in_language, set_languages
from peftbench.tasks.load import Loaded


class TextToText(TaskData):
    """`task.source_column` in, `task.target_column` out. A row with several targets trains on each of them."""

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        set_languages(tokenizer, loaded.task.source_language, loaded.task.target_language)
        super().__init__(loaded, tokenizer, model)

    def serve(self, model: PreTrainedModel) -> None:
        """The collator makes the decoder's input, and generation begins in the target's language."""
        self.collator = DataCollatorForSeq2Seq(self.tokenizer, model=model, label_pad_token_id=-100)
        begin_in_language(model, self.tokenizer)

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """`input_ids` and `attention_mask` of the sources, and the targets' ids as `labels`."""
        sources, targets = self.pairs(rows, training)
        written = self.encoder(targets, max_length=self.task.max_target_length, target=True)
        return {
            **framed(self.encoder, self.task.prompt or SOURCE, sources, self.task.max_source_length),
            "labels": written["input_ids"],
        }

    def pairs(self, rows: dict[str, list[Any]], training: bool) -> tuple[list[str], list[str]]:
        """Sources and targets, equally many: in training a source for each of its targets, else one with its first."""
        sources: list[str] = []
        targets: list[str] = []
        for source, cell in zip(rows[self.task.source_column], rows[self.task.target_column], strict=True):
            right = [cell] if isinstance(cell, str) else cell
            for target in right if training else right[:1]:
                sources.append(source)
                targets.append(target)
        return sources, targets

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each training example: of its source or its target, whichever is longer."""
        return [max(pair) for pair in zip(super().lengths, map(len, self.train["labels"]), strict=True)]

    def decode(self, predictions: np.ndarray) -> list[str]:
        """The texts of generated ids (examples, tokens), without special tokens; -100 counts as padding."""
        ids = np.where(predictions < 0, self.tokenizer.pad_token_id, predictions)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def references(self, rows: Dataset) -> References:
        """The whole target of each row, however long, or all of its targets."""
        targets: References = rows[self.task.target_column][:]
        return targets

    def baselines(self) -> dict[str, float]:
        """lead1: the source's first sentence. copy: the source itself."""
        found: dict[str, float] = {}
        sources: list[str] = self.report_rows[self.task.source_column][:]
        if "lead1" in self.task.baselines:
            found |= self._named("lead1", [first_sentence(source) for source in sources])
        if "copy" in self.task.baselines:
            found |= self._named("copy", sources)
        return found
