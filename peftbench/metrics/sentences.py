"""Split English text into sentences with nltk's Punkt algorithm, without the trained model that nltk downloads.

The model is a list of abbreviations, collocations and words that often start a sentence, learned from newswire. A short
list of abbreviations replaces it. Therefore, unlike with `nltk.sent_tokenize`, an abbreviation that is not listed ends
a sentence, and a listed one never does ("at 5 p.m. He left." is one sentence here).
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

ABBREVIATIONS = (
    "mr mrs ms dr prof rev hon sr jr st gen col lt capt sgt cpl sen rep gov pres "  # people
    "inc ltd co corp bros dept univ est approx "  # bodies
    "e.g i.e etc vs cf al fig eq vol pp ed eds viz "  # scholarship
    "u.s u.k u.n u.s.a d.c a.m p.m b.c a.d ph.d m.d b.a m.a "
    "jan feb apr aug sept oct nov dec"
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of `text` in order. A line break ends one, and so do full stops of other scripts."""
    lines = [part.strip() for line in text.splitlines() for part in _OTHER_END.split(line)]
    return [sentence for line in lines for sentence in _build_punkt().tokenize(line)]


def take_first_sentence(text: str) -> str:
    """Return the first sentence of the first paragraph, whose lines are joined because documents may be wrapped."""
    paragraph = text.strip().split("\n\n")[0]
    return next(iter(split_sentences(" ".join(paragraph.split()))), "")


@cache
def _build_punkt() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer  # half a second, with scipy.stats

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters)


# Full stops and question marks that no English text has; a closing quotation mark or bracket goes with them.
_STOP = "\u3002\uff01\uff1f\uff61\u0964\u0965\u06d4\u061f\u0589\u1362\u17d4\u104b\u0f0d"
_CLOSING = "\u300d\u300f\u201d\u2019\uff09\u3011"
_OTHER_END = re.compile(f"(?<=[{_STOP}])(?![{_STOP}{_CLOSING}])|(?<=[{_STOP}][{_CLOSING}])")
