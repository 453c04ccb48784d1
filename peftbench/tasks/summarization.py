"""Summarisation: a document in, a shorter text out, by a model that generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config import Task
from peftbench.tasks.base import TaskData
from peftbench.tasks.sentences import first_sentence

if TYPE_CHECKING:
    from typing_extensions import Self


class Summarization(TaskData):
    """`task.source_column` in, `task.target_column` out."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        super().__init__(task, tokenizer, model)
        self.collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100)

    def serving(self, model: PreTrainedModel | None) -> Self:
        """The collator asks the model for the decoder's input."""
        data = super().serving(model)
        data.collator = DataCollatorForSeq2Seq(self.tokenizer, model=model, label_pad_token_id=-100)
        return data

    def encode(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """`input_ids` and `attention_mask` of the documents, and the summaries' ids as `labels`."""
        targets = self.encoder(rows[self.task.target_column], max_length=self.task.max_target_length, target=True)
        return {
            **self.encoder(rows[self.task.source_column], max_length=self.task.max_source_length),
            "labels": targets["input_ids"],
        }

    def decode(self, predictions: np.ndarray) -> list[str]:
        """The texts of generated ids (examples, tokens), without special tokens; -100 counts as padding."""
        ids = np.where(predictions < 0, self.tokenizer.pad_token_id, predictions)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def references(self, rows: Dataset) -> list[str]:
        """The whole summary of each row, however long."""
        summaries: list[str] = rows[self.task.target_column][:]
        return summaries

    def baselines(self) -> dict[str, float]:
        """lead1: the document's first sentence."""
        if "lead1" not in self.task.baselines:
            return {}
        return self._named(
            "lead1", [first_sentence(document) for document in self.report_rows[self.task.source_column]]
        )
