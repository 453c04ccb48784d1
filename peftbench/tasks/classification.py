"""One text or a pair of texts in, a label or a number out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel

from peftbench.tasks.base import TaskData


class Classification(TaskData):
    """Text(s) in, one of `task.labels` out."""

    def serve(self, model: PreTrainedModel) -> None:
        """Every model takes the same batches."""
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """`input_ids`, `attention_mask` (and what else the model reads) and `labels`, a code or number for each row."""
        texts = [rows[column] for column in self.task.text_columns]
        return {
            **self.encoder(*texts, max_length=self.task.max_source_length),
            "labels": rows[self.task.label_column],
        }

    def reading(self) -> dict[str, Any]:
        """What stands between the texts of a pair, where the tokenizer puts nothing there."""
        if len(self.task.text_columns) < 2 or not self.encoder.separator:
            return {}
        return {"pair_separator": self.tokenizer.decode(self.encoder.separator)}

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


class Regression(Classification):
    """Text(s) in, a number out: the one output of the task head, trained by the mean squared error."""

    def decode(self, predictions: np.ndarray) -> list[str]:
        """The numbers (examples, 1) in so many digits that reading them gives the same numbers again."""
        return [repr(float(number)) for number in predictions[:, 0]]

    def references(self, rows: Dataset) -> list[str]:
        """Each row's number."""
        return [repr(float(number)) for number in rows[self.task.label_column][:]]

    def baselines(self) -> dict[str, float]:
        """None: a constant has no correlation."""
        return {}
