"""Exact match of what a generated text concludes with: a number, or one of the choices of a question."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from peftbench.metrics.statistics import References, Statistics, average

MARK = "####"  # before the answer in GSM8K
_NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")
_CHOICE = re.compile(r"true|false|(?:solution|answer|ending|option)[1-5]")


def compute_final_number(
    predictions: Sequence[str], references: References, labels: Sequence[str]
) -> dict[str, Statistics]:
    """100 x the share of texts whose final number is that of a reference: 1,200 equals 1200.00.

    It is the number after the last "####", as in GSM8K (Cobbe et al., 2021), or without that mark the last number of
    the text, as in LLM-Adapters (Hu et al., 2023). A text without a number is wrong.
    """
    return {"final_number": _match(find_final_number, predictions, references)}


def compute_choice(predictions: Sequence[str], references: References, labels: Sequence[str]) -> dict[str, Statistics]:
    """100 x the share of texts whose choice is that of a reference, by the rule of LLM-Adapters (Hu et al., 2023).

    The choice is the first of the words true and false, or of solution, answer, ending and option with a number from 1
    to 5, such as solution2. A text that names none is wrong.
    """
    return {"choice": _match(find_choice, predictions, references)}


def find_final_number(text: str) -> float | None:
    """Return the number that a text concludes with; None if there is none."""
    _, mark, rest = text.rpartition(MARK)
    found = _NUMBER.findall(rest)
    if not found:
        return None
    return float((found[0] if mark else found[-1]).replace(",", ""))


def find_choice(text: str) -> str | None:
    """Return the first choice that a text names; None if there is none."""
    found = _CHOICE.search(text)
    return None if found is None else found[0]


def _match(find: Callable[[str], float | str | None], predictions: Sequence[str], references: References) -> Statistics:
    right = [[texts] if isinstance(texts, str) else texts for texts in references]
    found = [(find(text), set(map(find, texts))) for text, texts in zip(predictions, right, strict=True)]
    return average([ours is not None and ours in theirs for ours, theirs in found])
