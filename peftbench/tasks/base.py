"""What training and the record need to know of a task: its tokenised splits and how predictions are scored."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config import Task
from peftbench.tasks.load import data_fingerprint, head, load_rows
from peftbench.tasks.metrics import compute_metrics
from peftbench.tasks.tokens import Encoder

if TYPE_CHECKING:
    from typing_extensions import Self

ID_COLUMNS = ("id", "idx", "index", "name")  # what data sets call a row's own name


class TaskData(ABC):
    """The data of one run in its three roles: trained on, used to select a state, and reported on.

    Two roles may share a split, which is then read and tokenised once. Raises UserError for data that cannot be used.
    """

    train: Dataset  # columns as `collator` takes them
    selection: Dataset
    report: Dataset
    train_rows: Dataset  # the same rows as they were read
    selection_rows: Dataset
    report_rows: Dataset
    splits: dict[str, dict[str, Any]]  # {"train": {"split": "train", "examples": 67349}, "selection": ...}
    fingerprint: str  # sha256 over the splits that were read
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]  # examples -> a padded batch of tensors

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, model)
        roles = {
            "train": (task.train_split, task.max_train),
            "selection": (task.selection_split, task.max_selection),
            "report": (task.report_split, task.max_eval),
        }
        limits: dict[str, list[int | None]] = defaultdict(list)
        for split, limit in roles.values():
            limits[split].append(limit)
        rows = {split: load_rows(task, split, _largest(wanted)) for split, wanted in limits.items()}
        prints = {split: data_fingerprint(task, of_split) for split, of_split in rows.items()}
        datasets.disable_progress_bars()
        tokens = {split: self._tokenise(of_split, prints[split]) for split, of_split in rows.items()}

        self.fingerprint = hashlib.sha256(" ".join(prints.values()).encode()).hexdigest()
        self.splits = {}
        for role, (split, limit) in roles.items():
            setattr(self, role, head(tokens[split], limit))
            setattr(self, f"{role}_rows", head(rows[split], limit))
            self.splits[role] = {"split": split, "examples": len(getattr(self, role))}

    def serving(self, model: PreTrainedModel | None) -> Self:
        """The same data for another model of the same backbone, or None for one that is yet to come."""
        return copy(self)

    @abstractmethod
    def encode(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The columns that `collator` takes, labels among them, for a batch of rows given as columns."""

    @abstractmethod
    def decode(self, predictions: np.ndarray) -> list[str]:
        """What the model predicted for each example, in words."""

    @abstractmethod
    def references(self, rows: Dataset) -> list[str]:
        """What would have been right for each row, in words."""

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Scores on the report split of those of `task.baselines` that need no model, as `{"NAME.METRIC": score}`."""

    def score(self, decoded: Sequence[str], rows: Dataset) -> dict[str, float]:
        """The scores of `task.metric`'s family, in percent."""
        return compute_metrics(self.task.metric, decoded, self.references(rows))

    def records(self, decoded: Sequence[str], rows: Dataset) -> Iterator[dict[str, Any]]:
        """One `{"index", "id", "prediction", "reference"}` for each example; no id where the rows have none."""
        column = next((name for name in ID_COLUMNS if name in rows.column_names), None)
        names = [{"id": name} for name in rows[column][:]] if column else [{}] * len(rows)
        for index, (name, prediction, reference) in enumerate(zip(names, decoded, self.references(rows), strict=True)):
            yield {"index": index, **name, "prediction": prediction, "reference": reference}

    def _named(self, baseline: str, decoded: Sequence[str]) -> dict[str, float]:
        return {f"{baseline}.{name}": value for name, value in self.score(decoded, self.report_rows).items()}

    def _tokenise(self, rows: Dataset, fingerprint: str) -> Dataset:
        return rows.map(
            self.encode,
            batched=True,
            remove_columns=rows.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=fingerprint,  # given, or datasets would pickle `self` for a hash, the tokenizer with it
        )


def _largest(limits: Sequence[int | None]) -> int | None:
    numbers = [limit for limit in limits if limit is not None]
    return max(numbers) if len(numbers) == len(limits) else None
