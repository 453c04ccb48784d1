"""Classification of one text or of a pair of texts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config import Task
from peftbench.tasks.base import TaskData


class Classification(TaskData):
    """Text(s) in, one of `task.labels` out."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        super().__init__(task, tokenizer, model)
        self.collator = DataCollatorWithPadding(tokenizer)

    def encode(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """`input_ids`, `attention_mask` (and what else the model reads) and `labels`, a code for each row."""
        texts = [rows[column] for column in self.task.text_columns]
        return {
            **self.encoder(*texts, max_length=self.task.max_source_length),
            "labels": rows[self.task.label_column],
        }

    def decode(self, predictions: np.ndarray) -> list[str]:
        """The name of the label with the largest of the logits (examples, labels)."""
        return self._names(predictions.argmax(axis=-1))

    def references(self, rows: Dataset) -> list[str]:
        """The name of each row's label."""
        return self._names(rows[self.task.label_column][:])

    def baselines(self) -> dict[str, float]:
        """majority: the most frequent label of the training split, given to every example."""
        if "majority" not in self.task.baselines:
            return {}
        counts = Counter(self.references(self.train_rows))
        return self._named("majority", [counts.most_common(1)[0][0]] * len(self.report_rows))

    def _names(self, codes: Any) -> list[str]:
        return [self.task.labels[code] for code in codes]
