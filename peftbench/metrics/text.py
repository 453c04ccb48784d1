"""ROUGE, BLEU, chrF and exact match of texts, each of which has one reference or several."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from peftbench.metrics.scripts import Words, choose_bleu_tokenizer, is_english
from peftbench.metrics.statistics import References, Statistics, average

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU
    from sacrebleu.metrics.base import Metric

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def compute_rouge(predictions: Sequence[str], references: References, labels: Sequence[str]) -> dict[str, Statistics]:
    """100 x the mean F-measure of ROUGE-1, -2, -L and -Lsum (Lin, 2004), by the package rouge_score.

    F = 2PR / (P + R). P and R are the shares of n-grams that the two texts have in common, or of the longest common
    subsequence. Of several references, each measure takes the one that gives the highest F. English is tokenised and
    stemmed as in the package; other languages are tokenised by `metrics.scripts` and not stemmed. ROUGE-Lsum matches
    sentence by sentence. As in the paper's code the sentences are put on lines of their own, but they are split by
    `metrics.sentences`, which says how it differs from nltk's download. Only ROUGE-Lsum depends on the split.
    """
    from rouge_score.rouge_scorer import RougeScorer

    from peftbench.metrics.sentences import split_sentences

    right = _list_texts(references)
    if is_english(right):
        scorer, how = RougeScorer(ROUGE_TYPES, use_stemmer=True), "tok:rouge_score|stem:porter"
    else:
        scorer, how = RougeScorer(ROUGE_TYPES, tokenizer=Words()), "tok:words|stem:no"
    found = [
        scorer.score_multi(["\n".join(split_sentences(text)) for text in texts], "\n".join(split_sentences(text)))
        for text, texts in zip(predictions, right, strict=True)
    ]
    signature = f"{how}|version:{version('rouge_score')}"
    return {name: average([scores[name].fmeasure for scores in found], signature) for name in ROUGE_TYPES}


def compute_bleu(predictions: Sequence[str], references: References, labels: Sequence[str]) -> dict[str, Statistics]:
    """BLEU and chrF of the corpus over all references, by sacreBLEU with its defaults (Post, 2018; Popović, 2015).

    BLEU = 100 exp(min(0, 1 - r / c)) (p1 p2 p3 p4)^(1/4), with the lengths c of the predictions and r of the closest
    references, and the shares p of n-grams that are right. chrF is F2 of character n-grams. In a language without
    spaces between words, BLEU has a tokenizer for it.
    """
    from sacrebleu.metrics import BLEU, CHRF

    right = _list_texts(references)
    return {
        "bleu": _score_bleu(BLEU(force=True, tokenize=choose_bleu_tokenizer(right)), predictions, right),
        "chrf": _score_corpus(CHRF(), predictions, right),
    }


def compute_romanian_bleu(
    predictions: Sequence[str], references: References, labels: Sequence[str]
) -> dict[str, Statistics]:
    """BLEU and chrF, and as `bleu_ro` the paper's en-ro figure: BLEU of texts that `metrics.romanian` has prepared.

    sacreBLEU then neither tokenises nor smooths (exps/romanian_postprocess.sh).
    """
    from sacrebleu.metrics import BLEU

    from peftbench.metrics.romanian import prepare_text

    ours, right = (
        list(map(prepare_text, predictions)),
        [list(map(prepare_text, texts)) for texts in _list_texts(references)],
    )
    found = _score_bleu(BLEU(tokenize="none", smooth_method="none", force=True), ours, right)
    signature = f"{found.signature}|text:romanian.prepared|sacremoses:{version('sacremoses')}"
    return {"bleu_ro": found._replace(signature=signature), **compute_bleu(predictions, references, labels)}


def compute_exact_match(
    predictions: Sequence[str], references: References, labels: Sequence[str]
) -> dict[str, Statistics]:
    """100 x the share of predictions that equal one of their references except for white space."""
    pairs = zip(predictions, _list_texts(references), strict=True)
    return {"exact_match": average([ours.split() in [text.split() for text in texts] for ours, texts in pairs])}


def _score_bleu(metric: BLEU, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """Return BLEU of the corpus. The bootstrap asks for thousands of scores at once: where n-grams of each length are
    right, none is smoothed, and the formula takes a hundredth of sacreBLEU's time."""
    found = _score_corpus(metric, predictions, references)

    def score(sums: np.ndarray, examples: int) -> np.ndarray:
        right, written = np.split(sums[..., 2:], 2, axis=-1)
        if sums.ndim == 1 or not right.all():
            return found.score(sums, examples)
        brevity = np.minimum(0, 1 - sums[..., 1] / sums[..., 0])
        scores: np.ndarray = 100 * np.exp(brevity + np.log(right / written).mean(axis=-1))
        return scores

    return found._replace(score=score)


def _score_corpus(metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """Return a metric of sacreBLEU, which computes it from integer sums of its statistics over the examples.

    Both steps are called as sacreBLEU's own tests of significance call them.
    """
    # None where an example has fewer references than another: an empty text would count as one of length 0.
    rows = np.array(metric._extract_corpus_statistics(predictions, list(zip_longest(*references))), dtype=float)

    def score_one(sums: np.ndarray) -> float:
        score: float = metric._compute_score_from_stats(sums.astype(int).tolist()).score
        return score

    return Statistics(rows, lambda sums, n: np.apply_along_axis(score_one, -1, sums), str(metric.get_signature()))


def _list_texts(references: References) -> list[list[str]]:
    return [[right] if isinstance(right, str) else list(right) for right in references]
