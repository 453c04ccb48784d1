"""What training and the record need to know about a task: its tokenised splits and how predictions are scored."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config.own_parts import TASK, OwnPart, find_code
from peftbench.config.stamps import stamp_content
from peftbench.metrics.measure import Measured, measure
from peftbench.metrics.statistics import References
from peftbench.tasks.batch import Collator
from peftbench.tasks.cache import cache_dataset
from peftbench.tasks.deal import ROW
from peftbench.tasks.groups import describe_no_groups, find_groups, list_groups
from peftbench.tasks.load import Loaded, fingerprint_data
from peftbench.tasks.own_task import RowMaker
from peftbench.tasks.rows import take_head
from peftbench.tasks.tokens import CONVERSATION_CUT, QUESTION_CUT, SOURCE_CUT, TARGET_CUT, Encoder
from peftbench.tasks.unknown import describe_unknown_tokens, measure_unknown

if TYPE_CHECKING:
    from typing_extensions import Self

ENCODE_VERSION = 2  # part of the name of what is cached: raise it whenever `encode` or the Encoder changes
CUT = {"sources": SOURCE_CUT, "questions": QUESTION_CUT, "targets": TARGET_CUT, "conversations": CONVERSATION_CUT}
LIMITED_BY = {
    "sources": "max_source_length",
    "questions": "max_source_length",
    "targets": "max_target_length",
    "conversations": "max_length",
}
NOTED = 0.05  # a larger share of truncated texts is reported on the screen
ID_COLUMNS = ("id", "idx", "index", "name", "eid")  # the names that data sets give to the column of row ids


class TaskData(RowMaker, ABC):
    """The data of one run by role: for training, for selecting a state, and for reporting scores.

    A further split on which scores are reported, such as validation_mismatched, has the role
    report_validation_mismatched, and so the attributes report_validation_mismatched and
    report_validation_mismatched_rows. Two roles may share a split, which is then read once. The object holds no model,
    so that the next run can use the same data: `serving` makes the copy for a model. Raises UserError for a backbone
    that cannot read the data.
    """

    train: Dataset  # with the columns that `collator` takes
    selection: Dataset
    report: Dataset
    train_rows: Dataset  # the same rows before tokenisation
    selection_rows: Dataset
    report_rows: Dataset
    # By role: {"split": "test", "examples": 1600, "of": 11334}; "of" only if not all rows were taken.
    splits: dict[str, dict[str, Any]]
    # By role: {"sources": 0.62, "targets": 0.0} or {"conversations": 0.1}, the share of texts that were truncated.
    cut: dict[str, dict[str, float]]
    fingerprint: str  # sha256 over the splits that were read
    unknown: dict[str, float]  # by split: the share of its tokens that the tokenizer does not know
    scored_on: str  # sha256 over the rows of the report split
    groups: dict[str, Any] | None  # of the reported examples, see `find_groups`
    collator: Collator

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self.task = loaded.task
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, model)
        self.signatures: dict[str, str] = {}  # of the metrics that have one, set by `score`
        prints = {split: fingerprint_data(self.task, rows) for split, rows in loaded.rows.items()}
        self.fingerprint = hashlib.sha256(" ".join(prints.values()).encode()).hexdigest()
        datasets.disable_progress_bars()
        self.splits, self.cut = {}, {}
        tokens: dict[tuple[str, bool], Dataset] = {}
        for role, (split, limit) in loaded.roles.items():
            rows = loaded.rows[split]
            training = role == "train"
            if (split, training) not in tokens:
                wanted = take_head(rows, limit) if training else rows  # a row may make several training examples
                tokens[split, training] = self._tokenise(wanted, training, prints[split])
            setattr(self, f"{role}_rows", take_head(rows, limit))
            encoded = tokens[split, True] if training else self.take_examples(tokens[split, False], limit)
            marks = {what: mark for what, mark in CUT.items() if mark in encoded.column_names}
            self.cut[role] = {what: float(np.mean(encoded[mark][:])) for what, mark in marks.items()}
            setattr(self, role, encoded.remove_columns(list(marks.values())))
            examples = getattr(self, role if training else f"{role}_rows")
            self.splits[role] = {"split": split, "examples": len(examples)}
            if len(getattr(self, f"{role}_rows")) < loaded.sizes[split]:
                self.splits[role]["of"] = loaded.sizes[split]

        by_split = {split: [one for (name, _), one in tokens.items() if name == split] for split, _ in tokens}
        known = model.get_input_embeddings().weight.shape[0]
        self.unknown = measure_unknown(by_split, tokenizer, known, required=loaded.labelled)
        self.scored_on = fingerprint_data(self.task, self.report_rows)
        self.notes = [*loaded.notes, *describe_unknown_tokens(self.unknown, tokenizer), *self._reading_notes()]
        self.groups = find_groups(self.task, self.report_rows, getattr(self, "train_rows", None))
        if self.task.group_column is not None and self.groups is None:
            self.notes.append(describe_no_groups(self.task, self.splits["report"]["split"]))

    def serving(self, model: PreTrainedModel) -> Self:
        """Return a copy of the data for a model of the backbone, which shares everything except what `serve` sets."""
        data = copy(self)
        data.serve(model)
        return data

    @abstractmethod
    def serve(self, model: PreTrainedModel) -> None:
        """Set `collator`, and whatever the model must know about the task to generate."""

    def settings(self) -> list[Any]:
        """Return the task's settings on which `encode` depends, as JSON values."""
        return [self.task.max_source_length, self.task.max_target_length, self.task.prompt]

    def limits(self) -> dict[str, int]:
        """Return the maximum length in tokens of the input texts ("sources") and, if any, of the output ("targets"), or
        of both as one text ("conversations")."""
        return {"sources": min(self.task.max_source_length, self.encoder.limit)}

    def reading(self) -> dict[str, Any]:
        """Return JSON values for the record that say how these tokens differ from those of earlier versions, if so."""
        return {}

    @abstractmethod
    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """Return the columns that `collator` takes, including the labels, for a batch of rows given as columns.

        There is one example for each row; in training, and for `take_examples` of a subclass, there may be more.
        """

    def take_examples(self, encoded: Dataset, rows: int | None) -> Dataset:
        """Return the examples of the first `rows` rows, of those that `encode` made without `training`; None: all."""
        return take_head(encoded, rows)

    def read_outputs(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return what `decode` needs of a model's outputs for a batch, (B, ...): its logits in float32."""
        logits: Tensor = outputs.logits.float()
        return logits

    @cached_property
    def lengths(self) -> list[int]:
        """The length in tokens of each training example, by which token-sized batches are made."""
        return [len(ids) for ids in self.train["input_ids"]]

    def label_codes(self) -> list[int]:
        """Return the code of each label that is trained on, for a task with labels."""
        codes: list[int] = self.train["labels"][:]
        return codes

    @abstractmethod
    def decode(self, predictions: np.ndarray, role: str = "report") -> list[str]:
        """Return what the model predicted for each row of a role, as text."""

    @abstractmethod
    def references(self, rows: Dataset) -> References:
        """Return the right answer for each row, as text: one text, or a list of texts that are all right."""

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Return scores on the report split of the `task.baselines` that need no model, `{"NAME.METRIC": score}`."""

    def score(self, decoded: Sequence[str], rows: Dataset) -> dict[str, float]:
        """Return the scores of `task.metric`'s family, in percent."""
        scores, self.signatures = self._measure(decoded, rows)
        return scores

    def records(self, decoded: Sequence[str], rows: Dataset) -> Iterator[dict[str, Any]]:
        """Yield one `{"index", "id", "group", "prediction", "reference"}` for each example; see `name_rows`.

        Without a group if the rows have no `task.group_column`.
        """
        groups = list_groups(self.task, rows)
        named = [{}] * len(rows) if groups is None else [{"group": group} for group in groups]
        told = zip(self.name_rows(rows), named, decoded, self.references(rows), strict=True)
        for name, group, prediction, reference in told:
            yield {**name, **group, "prediction": prediction, "reference": reference}

    def name_rows(self, rows: Dataset) -> Iterator[dict[str, Any]]:
        """Yield one `{"index", "id"}` for each example; without an id if the rows have none.

        The index is the row's position in the file from which it was read, from 0.
        """
        column = next((name for name in ID_COLUMNS if name in rows.column_names), None)
        names = [{"id": name} for name in rows[column][:]] if column else [{}] * len(rows)
        indices = rows[ROW][:] if ROW in rows.column_names else range(len(rows))
        for index, name in zip(indices, names, strict=True):
            yield {"index": index, **name}

    def _reading_notes(self) -> Iterator[str]:
        """Yield a sentence for each way in which the texts are read that may surprise the user."""
        reading = self.reading()
        if "pair_separator" in reading:
            yield (
                f"The tokenizer puts nothing between the texts of a pair: {reading['pair_separator']!r} is added there."
            )
        for what, tokens in self.limits().items():
            roles = ["train"] if what == "targets" else self.cut  # scores always use whole targets
            marked = {self.splits[role]["split"]: self.cut[role] for role in roles if role in self.cut}
            shares = {split: marks[what] for split, marks in marked.items() if what in marks}
            cut = {split: share for split, share in shares.items() if share > NOTED}
            if cut:
                asked = f"task.{LIMITED_BY[what]}={getattr(self.task, LIMITED_BY[what])}"
                why = asked if asked.endswith(f"={tokens}") else f"{self._limited_by(what)}; {asked}"
                told = ", ".join(f"{100 * share:.1f}% of {split}" for split, share in cut.items())
                without = "" if what in ("sources", "questions") else "; the end of a text is not learned there"
                yield f"{what.capitalize()} are truncated to {tokens} tokens ({why}): {told}{without}."

    def _limited_by(self, what: str) -> str:
        """Return what makes the limit lower than the one that the task asks for."""
        return self.encoder.limited_by

    def _measure(self, decoded: Sequence[str], rows: Dataset) -> Measured:
        return measure(self.task.metric, decoded, self.references(rows), self.task.labels)

    def _named(self, baseline: str, decoded: Sequence[str]) -> dict[str, float]:
        scores = self._measure(decoded, self.report_rows).scores
        return {f"{baseline}.{name}": value for name, value in scores.items()}

    def _own_code(self) -> list[Any]:
        """Return what else `encode` depends on in a task of the user's own: its code and its settings."""
        if self.task._target_ is None:
            return []
        return [stamp_content(find_code(OwnPart(TASK, self.task._target_))), self.task.settings]

    def _tokenise(self, rows: Dataset, training: bool, fingerprint: str) -> Dataset:
        """Apply `encode` to all rows. Fast tokenizers spread a batch over the cores by themselves."""

        def make() -> Dataset:
            return rows.map(
                self.encode,
                fn_kwargs={"training": training},
                batched=True,
                remove_columns=rows.column_names,
                keep_in_memory=True,
                load_from_cache_file=False,
                new_fingerprint=fingerprint,  # otherwise datasets pickles `self`, with the tokenizer, for a hash
            )

        what = {
            "encode": [type(self).__name__, ENCODE_VERSION, training, *self._own_code()],
            "task": self.settings(),
            "rows": [fingerprint, len(rows)],
            "tokenizer": self.encoder.fingerprint,
        }
        return cache_dataset(what, len(rows), make)
