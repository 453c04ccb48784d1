"""Accuracy and ROUGE as subclasses of `evaluate.Metric` that need no network, and one function that computes them."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Features, Value
from evaluate import Metric, MetricInfo
from rouge_score.rouge_scorer import RougeScorer

from peftbench.tasks.sentences import sentences

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def compute_metrics(name: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All scores of the metric that has a score called `name`, as percentages.

    >>> compute_metrics("accuracy", ["yes", "no", "no", "no"], ["yes", "no", "no", "yes"])
    {'accuracy': 75.0}
    """
    scores: dict[str, float] = METRICS[name]().compute(predictions=predictions, references=references)
    return scores


class _Metric(Metric):
    """A metric over pairs of strings that leaves no files behind."""

    description: str
    citation: str

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions, references: equally many strings.",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )


class Accuracy(_Metric):
    """100 x the share of labels that are right. Labels are given by name."""

    description = "The percentage of predictions that equal their reference."
    citation = ""

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        right = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
        return {"accuracy": 100 * right / len(references)}


class Rouge(_Metric):
    """100 x the mean F-measure of ROUGE-1, -2, -L and -Lsum with Porter's stemmer, by the package rouge_score.

    ROUGE-Lsum matches sentence by sentence. As in the paper's code the sentences are put on lines of their own, but
    split by `peftbench.tasks.sentences`, which says how it differs from nltk's download. It has no part in the rest.
    """

    description = "ROUGE F-measures in percent, stemmed, averaged over the examples."
    citation = "Chin-Yew Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004."

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
        pairs = zip(predictions, references, strict=True)
        scores = [scorer.score("\n".join(sentences(r)), "\n".join(sentences(p))) for p, r in pairs]
        return {kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in ROUGE_TYPES}


METRICS: dict[str, type[_Metric]] = {"accuracy": Accuracy, **dict.fromkeys(ROUGE_TYPES, Rouge)}
