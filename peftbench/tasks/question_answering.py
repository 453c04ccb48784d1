"""Extractive question answering: the part of a context that answers a question, as in SQuAD."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.metrics.statistics import References
from peftbench.tasks.answer_rows import STARTS
from peftbench.tasks.batch import is_decoder_alone
from peftbench.tasks.load import Loaded
from peftbench.tasks.tokens import QUESTION_CUT
from peftbench.tasks.windows import FIRST, Windowed, cut_windows

START, END = "start_positions", "end_positions"  # columns of the training examples, as transformers' models call them
# Columns of the others: the token at which the context begins, for each of its tokens the first character and the one
# after the last, and the token that stands for "no answer".
CONTEXT, BEGINS, ENDS, NULL = "context_at", "begins", "ends", "null_at"
READ = ("input_ids", "attention_mask", "token_type_ids", START, END)


class QuestionAnswering(Windowed):
    """A task that finds the answer to the first of `task.text_columns` in the second, a context.

    A model gives each token a score as the first one of the answer and one as the last (Devlin et al., 2019). The
    answer is the part of at most `task.max_answer_length` tokens with the largest sum of the two, over all windows of
    the context. A window without the answer, in training, has it at the token that stands for none: the first one or,
    in a decoder alone, whose first token has seen nothing, the last. With `task.unanswerable`, the prediction is "" if
    the sum there is larger, in every window, than that of the best answer.
    """

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self.null_last = is_decoder_alone(model)
        super().__init__(loaded, tokenizer, model)

    def serve(self, model: PreTrainedModel) -> None:
        """Set `collator`. Every model takes the same batches."""
        self.collator = AnswerCollator(self.tokenizer)

    def settings(self) -> list[Any]:
        """Return the settings on which `encode` depends."""
        return [*super().settings(), self.null_last]

    def limits(self) -> dict[str, int]:
        """Return the maximum lengths in tokens; a question takes at most half of a window."""
        limits = super().limits()
        return {**limits, "questions": limits["sources"] // 2}

    def reading(self) -> dict[str, Any]:
        """Return the separator between question and context, if the tokenizer puts nothing there."""
        separator = self.encoder.separator
        return {"pair_separator": self.tokenizer.decode(separator)} if separator else {}

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """Return the windows of all contexts, each after its question: what the model reads, and in training the first
        and the last token of the first answer; else what `decode` needs of the tokens."""
        opening, middle, closing, types = self.encoder.frame_pair()
        if self.null_last and not closing:
            closing = [self.tokenizer.eos_token_id]
        limit, longest = self.limits()["sources"], self.limits()["questions"]
        questions, contexts = (rows[column] for column in self.task.text_columns)
        asked, found = self.encoder.ids(questions), defaultdict[str, list[Any]](list)
        for row, (ids, spans) in enumerate(self.encoder.pieces(contexts)):
            before = [*opening, *asked[row][:longest], *middle]
            room = max(1, limit - len(before) - len(closing))
            answer = find_tokens(spans, rows[self.task.label_column][row], rows[STARTS][row]) if training else None
            for number, (start, end) in enumerate(cut_windows(len(ids), room, self.task.stride)):
                after = [*ids[start:end], *closing]
                null = len(before) + len(after) - 1 if self.null_last else 0
                found["input_ids"].append([*before, *after])
                found["attention_mask"].append([1] * len(found["input_ids"][-1]))
                if types is not None:
                    found["token_type_ids"].append([types[0]] * len(before) + [types[1]] * len(after))
                found[FIRST].append(number == 0)
                found[QUESTION_CUT].append(len(asked[row]) > longest)
                if training:
                    inside = answer is not None and start <= answer[0] and answer[1] < end
                    places = [len(before) + token - start for token in answer] if inside and answer else [null, null]
                    found[START].append(places[0])
                    found[END].append(places[1])
                else:
                    found[CONTEXT].append(len(before))
                    found[BEGINS].append([begin for begin, _ in spans[start:end]])
                    found[ENDS].append([after for _, after in spans[start:end]])
                    found[NULL].append(null)
        return dict(found)

    def read_outputs(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the scores of each token as the first and as the last one of the answer, (windows, 2, tokens)."""
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()

    def decode(self, predictions: np.ndarray, role: str = "report") -> list[str]:
        """Return the answer for each row, "" for none."""
        examples, contexts = getattr(self, role), getattr(self, f"{role}_rows")[self.task.text_columns[1]][:]
        best, texts = np.full(len(contexts), -np.inf), [""] * len(contexts)
        none = np.full(len(contexts), np.inf)
        columns = (examples[name][:] for name in (CONTEXT, BEGINS, ENDS, NULL))
        for row, scores, at, begins, ends, null in zip(self.number_examples(role), predictions, *columns, strict=True):
            none[row] = min(none[row], scores[:, null].sum())
            part = slice(at, at + len(begins))
            first, last, score = find_best_span(scores[0, part], scores[1, part], self.task.max_answer_length)
            if score > best[row]:
                best[row], texts[row] = score, contexts[row][begins[first] : ends[last]].strip()
        if self.task.unanswerable:
            texts = [text if best[row] >= none[row] else "" for row, text in enumerate(texts)]
        return texts

    def references(self, rows: Dataset) -> References:
        """Return the texts that are right for each row; [""] where there is no answer."""
        return [answers or [""] for answers in rows[self.task.label_column][:]]

    def baselines(self) -> dict[str, float]:
        """Return the scores of the baselines copy (the whole context) and no_answer."""
        found: dict[str, float] = {}
        if "copy" in self.task.baselines:
            found |= self._named("copy", self.report_rows[self.task.text_columns[1]][:])
        if "no_answer" in self.task.baselines:
            found |= self._named("no_answer", [""] * len(self.report_rows))
        return found

    def _limited_by(self, what: str) -> str:
        return "half of a window" if what == "questions" else super()._limited_by(what)


def find_tokens(
    spans: Sequence[tuple[int, int]], answers: Sequence[str], starts: Sequence[int]
) -> tuple[int, int] | None:
    """Return the first and the last token of the first answer; None if there is no answer, or no token of it.

    Args:
        spans: for each token of the context, its first character and the one after its last.
        starts: the first character of each answer in the context.
    """
    if not answers:
        return None
    start, end = starts[0], starts[0] + len(answers[0])
    inside = [index for index, (begin, after) in enumerate(spans) if begin < end and after > start and after > begin]
    return (inside[0], inside[-1]) if inside else None


def find_best_span(start: np.ndarray, end: np.ndarray, longest: int) -> tuple[int, int, float]:
    """Return i and j with the largest start[i] + end[j] and i <= j < i + longest, and that sum; -inf of no tokens."""
    best = (0, 0, -np.inf)
    for length in range(min(longest, len(start))):
        sums = start[: len(start) - length] + end[length:]
        first = int(sums.argmax())
        if sums[first] > best[2]:
            best = (first, first + length, float(sums[first]))
    return best


class AnswerCollator(DataCollatorWithPadding):
    """The collator of transformers, for examples with further columns."""

    def __call__(self, features: Any) -> Any:
        return super().__call__([{name: one[name] for name in READ if name in one} for one in features])
