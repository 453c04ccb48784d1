"""Tasks that map a text to a generated text: summarisation, translation, data-to-text and the like."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.metrics.sentences import take_first_sentence
from peftbench.metrics.statistics import References
from peftbench.tasks.base import TaskData
from peftbench.tasks.batch import NO_TOKEN, make_decoder_inputs
from peftbench.tasks.framing import SOURCE, frame_sources, special_tokens
from peftbench.tasks.languages import begin_in_language, get_written_language, set_languages
from peftbench.tasks.load import Loaded
from peftbench.tasks.tokens import TARGET_CUT


class TextToText(TaskData):
    """A task that maps `task.source_column` to `task.target_column`. A row with several targets trains on each."""

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        set_languages(tokenizer, loaded.task.source_language, loaded.task.target_language)
        super().__init__(loaded, tokenizer, model)

    def serve(self, model: PreTrainedModel) -> None:
        """Set `collator`, which makes the decoder's input, and make generation begin in the target's language."""
        self.collator = TargetCollator(self.tokenizer, model=model, label_pad_token_id=NO_TOKEN)
        begin_in_language(model, self.tokenizer)

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """Return `input_ids` and `attention_mask` of the sources, and the targets' ids as `labels`; a truncated target
        has no end token."""
        sources, targets = self.pairs(rows, training)
        return {
            **frame_sources(self.encoder, self.prompt, sources, self.limits()["sources"]),
            **self.written(targets, *self.encoder.ends(target=True)),
        }

    @property
    def prompt(self) -> str:
        """The template of the model's input, with {source} in it."""
        return self.task.prompt or SOURCE

    def limits(self) -> dict[str, int]:
        """Return the maximum lengths in tokens; the length of a target includes its end."""
        return {**super().limits(), "targets": min(self.task.max_target_length, self.encoder.limit)}

    def reading(self) -> dict[str, Any]:
        """Return for the record which tokens of the prompt are special, and that truncated targets have no end."""
        found: dict[str, Any] = {"special_tokens": special_tokens(self.encoder, self.prompt)}
        if self.cut.get("train", {}).get("targets"):
            found["cut_targets"] = "no end"
        return {name: value for name, value in found.items() if value}

    def taught_ends(self) -> list[str]:
        """Return the tokens with which the model is taught to end a text."""
        found: list[str] = self.tokenizer.convert_ids_to_tokens(self.encoder.ends(target=True)[1])
        return found

    def written(self, targets: list[str], opening: list[int], closing: list[int]) -> dict[str, list[Any]]:
        """Return the ids of targets between `opening` and `closing` as `labels`, and whether each was truncated.

        A target with its ends is truncated on the right at the limit. A truncated target has no `closing` except the
        language code, which mBART moves to the front of the decoder's input: a model that is trained on an end there
        learns to stop in mid-sentence.
        """
        length = self.limits()["targets"]
        kept = [token for token in closing if token == get_written_language(self.tokenizer)]
        labels, cut = [], []
        for ids in self.encoder.ids(targets, target=True):
            whole = [*opening, *ids, *closing]
            cut.append(len(whole) > length)
            labels.append([*[*opening, *ids][: max(0, length - len(kept))], *kept] if cut[-1] else whole)
        return {"labels": labels, TARGET_CUT: cut}

    def pairs(self, rows: dict[str, list[Any]], training: bool) -> tuple[list[str], list[str]]:
        """Return equally many sources and targets: in training a pair for each target, else only with the first."""
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
        """The length in tokens of each training example: of its source or its target, whichever is longer."""
        return [max(pair) for pair in zip(super().lengths, map(len, self.train["labels"]), strict=True)]

    def decode(self, predictions: np.ndarray, role: str = "report") -> list[str]:
        """Return the texts of generated ids (examples, tokens), without special tokens; `NO_TOKEN` is padding."""
        ids = np.where(predictions < 0, self.tokenizer.pad_token_id, predictions)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def references(self, rows: Dataset) -> References:
        """Return the whole target of each row, however long, or all of its targets."""
        targets: References = rows[self.task.target_column][:]
        return targets

    def baselines(self) -> dict[str, float]:
        """Return the scores of the baselines lead1 (the source's first sentence) and copy (the source itself)."""
        found: dict[str, float] = {}
        sources: list[str] = self.report_rows[self.task.source_column][:]
        if "lead1" in self.task.baselines:
            found |= self._named("lead1", [take_first_sentence(source) for source in sources])
        if "copy" in self.task.baselines:
            found |= self._named("copy", sources)
        return found


class TargetCollator(DataCollatorForSeq2Seq):
    """The collator of transformers, but without a loss on the language code after a target without an end: the code is
    there only for the decoder's input."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        batch = super().__call__(features, return_tensors)
        code, labels = get_written_language(self.tokenizer), batch.get("labels")
        if labels is not None and "decoder_input_ids" not in batch:
            batch["decoder_input_ids"] = make_decoder_inputs(self.model, labels)
        if code is not None and labels is not None:
            for row in labels:
                last = int((row != NO_TOKEN).sum()) - 1
                if row[last] == code and (last == 0 or row[last - 1] != self.tokenizer.eos_token_id):
                    row[last] = NO_TOKEN
        return batch
