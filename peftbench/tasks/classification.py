"""Tasks that map one text or a pair of texts to a label or a number."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel

from peftbench.tasks.base import TaskData


class Classification(TaskData):
    """A task that maps one text or a pair of texts to one of `task.labels`."""

    def serve(self, model: PreTrainedModel) -> None:
        """Set `collator`. Every model takes the same batches."""
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """Return `input_ids`, `attention_mask` (and what else the model reads), and as `labels` codes or numbers."""
        texts = [rows[column] for column in self.task.text_columns]
        return {
            **self.encoder(*texts, max_length=self.task.max_source_length),
            "labels": rows[self.task.label_column],
        }

    def reading(self) -> dict[str, Any]:
        """Return the separator between the texts of a pair, if the tokenizer puts nothing there."""
        if len(self.task.text_columns) < 2 or not self.encoder.separator:
            return {}
        return {"pair_separator": self.tokenizer.decode(self.encoder.separator)}

    def decode(self, predictions: np.ndarray, role: str = "report") -> list[str]:
        """Return the name of the label with the largest logit, from logits of shape (examples, labels)."""
        return self._names(predictions.argmax(axis=-1))

    def references(self, rows: Dataset) -> list[str]:
        """Return the name of each row's label."""
        return self._names(rows[self.task.label_column][:])

    def baselines(self) -> dict[str, float]:
        """Return the baseline majority: the most frequent label of the training split for every example.

        There is none if the training split was not read.
        """
        if "majority" not in self.task.baselines or not hasattr(self, "train_rows"):
            return {}
        counts = Counter(self.references(self.train_rows))
        return self._named("majority", [counts.most_common(1)[0][0]] * len(self.report_rows))

    def _names(self, codes: Any) -> list[str]:
        return [self.task.labels[code] for code in codes]


class Regression(Classification):
    """A task that maps text(s) to a number, the only output of the task head, trained with the mean squared error."""

    def decode(self, predictions: np.ndarray, role: str = "report") -> list[str]:
        """Return the numbers, given as (examples, 1), with enough digits to parse back to the same numbers."""
        return [repr(float(number)) for number in predictions[:, 0]]

    def references(self, rows: Dataset) -> list[str]:
        """Return each row's number."""
        return [repr(float(number)) for number in rows[self.task.label_column][:]]

    def baselines(self) -> dict[str, float]:
        """Return no baselines: a constant has no correlation."""
        return {}
