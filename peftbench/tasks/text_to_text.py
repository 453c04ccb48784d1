"""A text in, a text out, by a model that generates: summarisation, translation, text from data and the like."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.metrics.sentences import first_sentence
from peftbench.metrics.statistics import References
from peftbench.tasks.base import TaskData
from peftbench.tasks.framing import SOURCE, framed, special_tokens
from peftbench.tasks.languages import begin_in_language, set_languages, written_language
from peftbench.tasks.load import Loaded
from peftbench.tasks.tokens import TARGET_CUT


class TextToText(TaskData):
    """`task.source_column` in, `task.target_column` out. A row with several targets trains on each of them."""

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        set_languages(tokenizer, loaded.task.source_language, loaded.task.target_language)
        super().__init__(loaded, tokenizer, model)

    def serve(self, model: PreTrainedModel) -> None:
        """The collator makes the decoder's input, and generation begins in the target's language."""
        self.collator = TargetCollator(self.tokenizer, model=model, label_pad_token_id=-100)
        begin_in_language(model, self.tokenizer)

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """`input_ids` and `attention_mask` of the sources, and the targets' ids as `labels`; of a target that is cut
        without its end."""
        sources, targets = self.pairs(rows, training)
        return {
            **framed(self.encoder, self.prompt, sources, self.limits()["sources"]),
            **self.written(targets, *self.encoder.ends(target=True)),
        }

    @property
    def prompt(self) -> str:
        """What the model reads, with {source} in it."""
        return self.task.prompt or SOURCE

    def limits(self) -> dict[str, int]:
        """Tokens of a target count its end."""
        return {**super().limits(), "targets": min(self.task.max_target_length, self.encoder.limit)}

    def reading(self) -> dict[str, Any]:
        """Special tokens of the prompt are such, and of a text that goes on no end is learned."""
        found: dict[str, Any] = {"special_tokens": special_tokens(self.encoder, self.prompt)}
        if self.cut.get("train", {}).get("targets"):
            found["cut_targets"] = "no end"
        return {name: value for name, value in found.items() if value}

    def written(self, targets: list[str], opening: list[int], closing: list[int]) -> dict[str, list[Any]]:
        """The ids of targets between `opening` and `closing` as `labels`, and whether each was cut.

        A target with its ends is cut on the right at the limit. Where it is, `closing` is gone but for the language
        code, which mBART turns to the front of the decoder's input: a model that is taught an end there learns to stop
        in mid-sentence.
        """
        length = self.limits()["targets"]
        kept = [token for token in closing if token == written_language(self.tokenizer)]
        labels, cut = [], []
        for ids in self.encoder.ids(targets, target=True):
            whole = [*opening, *ids, *closing]
            cut.append(len(whole) > length)
            labels.append([*[*opening, *ids][: max(0, length - len(kept))], *kept] if cut[-1] else whole)
        return {"labels": labels, TARGET_CUT: cut}

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


class TargetCollator(DataCollatorForSeq2Seq):
    """Transformers' own, but that a language code after a target without its end is not learned: it is there for the
    decoder's input alone."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        batch = super().__call__(features, return_tensors)
        code, labels = written_language(self.tokenizer), batch.get("labels")
        if code is not None and labels is not None:
            for row in labels:
                last = int((row != -100).sum()) - 1
                if row[last] == code and (last == 0 or row[last - 1] != self.tokenizer.eos_token_id):
                    row[last] = -100
        return batch
