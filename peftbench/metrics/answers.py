"""SQuAD's exact match and F1 of answers, with one reference or several; "" says that there is no answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from peftbench.metrics.statistics import References, Statistics, average

ANSWER_SCORES = ("squad_f1", "squad_exact_match")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def compute_answers(predictions: Sequence[str], references: References, labels: Sequence[str]) -> dict[str, Statistics]:
    """100 x the mean F1 of an answer's words, and 100 x the share of answers that equal a reference.

    As in SQuAD 2.0's own script (Rajpurkar et al., 2018), texts are in lower case, without ASCII punctuation and
    without the words a, an and the. F1 = 2 c / (p + r), with the numbers p and r of words in answer and reference and c
    of those in common; of two texts without words it is 1 if both have none. Of several references the best one counts;
    those without words are left out unless all are. SQuAD 1.1's script is the same but for answers without words.
    """
    found = [
        [_compare(normalise_answer(ours).split(), words) for words in _list_words(right)]
        for ours, right in zip(predictions, references, strict=True)
    ]
    return {
        "squad_f1": average([max(f1 for f1, _ in one) for one in found]),
        "squad_exact_match": average([max(exact for _, exact in one) for one in found]),
    }


def normalise_answer(text: str) -> str:
    """Return a text as the script compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _list_words(references: str | Sequence[str]) -> list[list[str]]:
    """Return the words of each reference that has any; one without words if none has."""
    texts = [references] if isinstance(references, str) else references
    return [words for text in texts if (words := normalise_answer(text).split())] or [[]]


def _compare(ours: list[str], right: list[str]) -> tuple[float, float]:
    """Return F1 and whether the words are equal."""
    if not ours or not right:
        return float(ours == right), float(ours == right)
    common = (Counter(ours) & Counter(right)).total()
    return 2 * common / (len(ours) + len(right)), float(ours == right)
