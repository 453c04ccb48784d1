"""Token classification: a label for each word of a text, as in named entity recognition."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedModel

from peftbench.tasks.batch import NO_TOKEN
from peftbench.tasks.windows import FIRST, Windowed, choose_windows, cut_windows
from peftbench.tasks.word_rows import OUTSIDE

TAGS = "tags"  # a column of the training examples: for each token the code of its word's label, or NO_TOKEN
# Columns: the words that are labelled in a window, and the token that stands for each.
WORDS, PLACES = "words", "places"


class TokenClassification(Windowed):
    """A task that maps each word of `task.text_columns` to one of `task.labels`.

    The words are joined by spaces and tokenised as one text. The first token of a word stands for it (Devlin et al.,
    2019): it alone has a label in training, and its label is the word's in prediction. A word is labelled in one window
    only, that in which it has the most context. A word of which the tokenizer keeps nothing is outside.
    """

    def serve(self, model: PreTrainedModel) -> None:
        """Set `collator`. Every model takes the same batches."""
        self.collator = TagCollator(self.tokenizer, label_pad_token_id=NO_TOKEN)

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """Return the windows of all texts: `input_ids` and `attention_mask`, and in training `tags`; else the words
        that are labelled there, and their tokens."""
        texts, column = rows[self.task.text_columns[0]], rows[self.task.label_column]
        opening, closing = self.encoder.ends()
        room = max(1, self.limits()["sources"] - len(opening) - len(closing))
        pieces = self.encoder.pieces([" ".join(words) for words in texts])
        found: dict[str, list[Any]] = defaultdict(list)
        for words, labels, (ids, spans) in zip(texts, column, pieces, strict=True):
            windows = cut_windows(len(ids), room, self.task.stride)
            firsts = find_first_pieces(words, spans)
            chosen = choose_windows(windows, firsts.values())
            for number, (start, end) in enumerate(windows):
                own = [word for word, window in zip(firsts, chosen, strict=True) if window == number]
                places = [firsts[word] - start + len(opening) for word in own]
                # no model can read a text without any token
                whole = [*opening, *ids[start:end], *closing] or [self.tokenizer.pad_token_id]
                found["input_ids"].append(whole)
                found["attention_mask"].append([1] * len(whole))
                found[FIRST].append(number == 0)
                if training:
                    codes = dict(zip(places, (labels[word] for word in own), strict=True))
                    found[TAGS].append([codes.get(place, NO_TOKEN) for place in range(len(whole))])
                else:
                    found[WORDS].append(own)
                    found[PLACES].append(places)
        return dict(found)

    def read_outputs(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the code of the label with the largest logit at each token, (windows, tokens)."""
        codes: Tensor = outputs.logits.argmax(dim=-1)
        return codes

    def read_logits(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of the labels at each token, (windows, labels, tokens)."""
        logits: Tensor = outputs.logits.float().transpose(1, 2)
        return logits

    def decode(self, predictions: np.ndarray, role: str = "report") -> list[str]:
        """Return the labels of each row's words, with spaces between them, from codes of shape (windows, tokens)."""
        rest = OUTSIDE if OUTSIDE in self.task.labels else self.task.labels[0]
        found = self._find_words(predictions, role)
        return [" ".join(rest if code is None else self.task.labels[int(code)] for code in row) for row in found]

    def probabilities(self, logits: np.ndarray, role: str = "report") -> list[dict[str, list[float | None]]]:
        """Return for each row the probabilities of each label, one for each word, from what `read_logits` kept; None
        for a word without tokens."""
        labels = list(enumerate(self.task.labels))
        return [
            {label: [None if word is None else float(word[code]) for word in row] for code, label in labels}
            for row in self._find_words(softmax(logits.astype(np.float64), axis=1), role)
        ]

    def _find_words(self, predictions: np.ndarray, role: str) -> list[list[Any]]:
        """Return for each word of each row what (windows, ..., tokens) has at its token; None if it has no token."""
        examples, texts = getattr(self, role), getattr(self, f"{role}_rows")[self.task.text_columns[0]]
        found: list[list[Any]] = [[None] * len(words) for words in texts[:]]
        numbers = self.number_examples(role)
        for row, window, words, places in zip(numbers, predictions, examples[WORDS], examples[PLACES], strict=True):
            for word, place in zip(words, places, strict=True):
                found[row][word] = window[..., place]
        return found

    def references(self, rows: Dataset) -> list[str]:
        """Return the labels of each row's words, with spaces between them."""
        return [" ".join(self.task.labels[code] for code in codes) for codes in rows[self.task.label_column][:]]

    def label_codes(self) -> list[int]:
        """Return the code of each word that is trained on."""
        return [code for codes in self.train[TAGS] for code in codes if code != NO_TOKEN]

    def baselines(self) -> dict[str, float]:
        """Return the baseline majority: the most frequent label of a word in training, for every word."""
        if "majority" not in self.task.baselines or not hasattr(self, "train_rows"):
            return {}
        counts = Counter(code for codes in self.train_rows[self.task.label_column] for code in codes)
        most = self.task.labels[counts.most_common(1)[0][0]]
        lengths = [len(words) for words in self.report_rows[self.task.text_columns[0]]]
        return self._named("majority", [" ".join([most] * length) for length in lengths])


def find_first_pieces(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return the index of the first token of each word that has one.

    Args:
        words: of a text in which there is one space between them.
        spans: for each token, its first character in that text and the one after its last. A token may begin with the
            space before its word.
    """
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    found: dict[int, int] = {}
    for piece, (start, end) in enumerate(spans):
        if end <= start:
            continue
        word = bisect_right(starts, end - 1) - 1
        if word < len(words) and end - 1 < starts[word] + len(words[word]):  # not only a space
            found.setdefault(word, piece)
    return dict(sorted(found.items()))


@dataclass
class TagCollator(DataCollatorForTokenClassification):
    """The collator of transformers, for examples with further columns."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        return super().__call__([dict(_select_inputs(example)) for example in features], return_tensors)


def _select_inputs(example: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("input_ids", "attention_mask"):
        yield name, example[name]
    if TAGS in example:
        yield "labels", example[TAGS]
