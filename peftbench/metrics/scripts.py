"""Metrics of texts in any script: which tokenizer suits the references of a data set.

The tokenizers of the field's metrics are made for English: ROUGE's keeps a to z and digits alone, BLEU's splits at
spaces. Which one is taken depends on all references together and on no prediction, so that runs on the same data are
always scored in the same way; the signature of a score names it.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

# Above this share of letters beyond a to z ROUGE takes the tokenizer of all scripts. English data sets have 0.01%
# (XSum) to 0.16% (WebNLG, full of names), Romanian news 2.7%.
OTHER_LETTERS = 0.005
UNSPACED_LETTERS = 0.1  # above this share of letters of scripts without spaces BLEU takes a tokenizer for these

KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HAN = "\u2e80-\u2fdf\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNSPACED = f"{HAN}{KANA}\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # and Thai, Lao, Tibetan, Burmese, Khmer


class Letters(NamedTuple):
    """How many letters there are: of all scripts, beyond a to z, of scripts without spaces, and of these Chinese."""

    all: int
    other: int
    unspaced: int
    han: int


def count_letters(texts: Iterable[str]) -> Letters:
    """Counts over all texts; a letter with an accent is one."""
    plain, other, unspaced, han = 0, 0, 0, 0
    for text in texts:
        if text.isascii():
            plain += len(_PLAIN.sub("", text))
            continue
        found = [letter for letter in unicodedata.normalize("NFC", text) if letter.isalpha()]
        beyond = "".join(letter for letter in found if not letter.isascii())
        plain, other = plain + len(found) - len(beyond), other + len(beyond)
        unspaced, han = unspaced + len(_UNSPACED.findall(beyond)), han + len(_HAN.findall(beyond))
    return Letters(plain + other, other, unspaced, han)


def is_english(references: Sequence[Sequence[str]]) -> bool:
    """Return whether ROUGE's own tokenizer suits these references: at most `OTHER_LETTERS` of their letters are others
    than a to z."""
    count = count_letters(text for texts in references for text in texts)
    return count.other <= OTHER_LETTERS * count.all


def choose_bleu_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """sacreBLEU's name of the tokenizer for these references: its default where words are written apart, zh for
    Chinese, and char for Japanese, Thai and the like, whose words ja-mecab and flores200 find with further downloads.
    """
    count = count_letters(text for texts in references for text in texts)
    if count.unspaced <= UNSPACED_LETTERS * count.all:
        return "13a"
    return "zh" if count.han > 0.95 * count.unspaced else "char"


class Words:
    """A tokenizer as rouge_score takes one."""

    def tokenize(self, text: str) -> list[str]:
        """See `split_words`."""
        return split_words(text)


def split_words(text: str) -> list[str]:
    """The words of `text` in lower case: runs of letters, their marks and digits, or each letter of a script without
    spaces.

    >>> words("Ein Café, 東京の2つ")
    ['ein', 'café', '東', '京', 'の', '2', 'つ']
    """
    return _word().findall(unicodedata.normalize("NFKC", text).lower())


@cache
def _word() -> re.Pattern[str]:
    marks = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    joiners = "\u200c\u200d"  # between letters of one word
    mark = f"[{''.join(map(re.escape, marks))}{joiners}]"
    letter = r"[^\W_]"
    return re.compile(f"(?={letter})[{UNSPACED}]{mark}*|(?:(?![{UNSPACED}]){letter}{mark}*)+")


_PLAIN, _UNSPACED, _HAN = re.compile("[^A-Za-z]+"), re.compile(f"[{UNSPACED}]"), re.compile(f"[{HAN}]")
