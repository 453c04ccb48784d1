"""Metrics as subclasses of `evaluate.Metric` that need no network, and one function that computes them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from itertools import zip_longest
from typing import Any, NamedTuple

from datasets import Features, Value
from datasets import Sequence as ListOf
from evaluate import Metric, MetricInfo
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from peftbench.metrics.romanian import prepared
from peftbench.metrics.scripts import ROUGE_TYPES, bleu_tokenizer, rouge

References = Sequence[str] | Sequence[Sequence[str]]  # of each example the right text, or all texts that are right


class Measured(NamedTuple):
    """Scores in percent, and the signatures of those that have one: how exactly they were computed."""

    scores: dict[str, float]
    signatures: dict[str, str]


def measure(name: str, predictions: Sequence[str], references: References, labels: Sequence[str] = ()) -> Measured:
    """All scores of the metric that has a score called `name`.

    >>> measure("accuracy", ["yes", "no", "no", "no"], ["yes", "no", "no", "yes"]).scores
    {'accuracy': 75.0}

    Args:
        labels: the task's, in the order of their codes; of two labels, the second is the one that F1 looks for.
    """
    metric = METRICS[name](labels)
    scores: dict[str, float] = metric.compute(predictions=predictions, references=metric.shaped(references))
    return Measured(scores, metric.signatures)


class _Metric(Metric):
    """A metric over strings that leaves no files behind."""

    description: str
    citation: str
    reference: Any = Value("string")

    def __init__(self, labels: Sequence[str] = ()) -> None:
        super().__init__(keep_in_memory=True)
        self.labels = labels
        self.signatures: dict[str, str] = {}

    def _build_data_dir(self) -> str:
        """evaluate would make a folder in the user's home, which need not be one that can be written to."""
        root: str = self._data_dir_root
        return root

    def shaped(self, references: References) -> References:
        """`references` as this metric takes them."""
        return references

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions, references: equally many.",
            features=Features({"predictions": Value("string"), "references": self.reference}),
        )


class Accuracy(_Metric):
    """100 x the share of labels that are right. Labels are given by name."""

    description = "The percentage of predictions that equal their reference."
    citation = ""

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        right = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
        return {"accuracy": 100 * right / len(references)}


class F1(Accuracy):
    """100 x F1 = 2PR / (P + R) of the second of two labels, as in GLUE, and the accuracy; 0 where it is never found."""

    description = "F1 of the second of two labels, and accuracy, in percent."

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        f1 = f1_score(references, predictions, labels=list(self.labels[1:2]), average="macro", zero_division=0)
        return {"f1": 100 * float(f1), **super()._compute(predictions, references)}


class MacroF1(Accuracy):
    """100 x the mean F1 of the labels that are true or predicted anywhere, as scikit-learn has it, and the accuracy."""

    description = "The unweighted mean of the F1 of each label that occurs, and accuracy, in percent."

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        there = {*references, *predictions}
        if absent := len(set(self.labels) - there):
            self.signatures["macro_f1"] = f"mean over {len(there)} of {len(there) + absent} labels, those that occur"
        f1 = f1_score(references, predictions, average="macro", zero_division=0)
        return {"macro_f1": 100 * float(f1), **super()._compute(predictions, references)}


class Matthews(Accuracy):
    """100 x Matthews' correlation of predicted and true labels, and the accuracy; 0 where all predictions are one."""

    description = "Matthews correlation coefficient, and accuracy, in percent."
    citation = "Matthews, Comparison of the predicted and observed secondary structure of T4 phage lysozyme, 1975."

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        correlation = matthews_corrcoef(references, predictions)
        return {"matthews": 100 * float(correlation), **super()._compute(predictions, references)}


class Correlation(_Metric):
    """100 x Pearson's and Spearman's correlation of predicted and true numbers; 0 where either side is constant."""

    description = "Pearson's r and Spearman's rho of numbers that are given as strings, in percent."
    citation = ""

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        ours, right = [float(number) for number in predictions], [float(number) for number in references]
        if len(set(ours)) < 2 or len(set(right)) < 2:
            return {"pearson": 0.0, "spearman": 0.0}
        found = {"pearson": pearsonr(ours, right), "spearman": spearmanr(ours, right)}
        return {name: 100 * float(result.statistic) for name, result in found.items()}


class _TextMetric(_Metric):
    """A metric over texts, each of which has a list of references."""

    reference = ListOf(Value("string"))

    def shaped(self, references: References) -> References:
        """A list of texts for each example."""
        return [[right] if isinstance(right, str) else list(right) for right in references]


class Rouge(_TextMetric):
    """100 x the mean F-measure of ROUGE-1, -2, -L and -Lsum, by the package rouge_score.

    English is tokenised and stemmed as in the package, other languages by `metrics.scripts`. Of several references,
    each measure takes the one that gives the highest F. ROUGE-Lsum matches sentence by sentence. As in the paper's
    code the sentences are put on lines of their own, but split by `metrics.sentences`, which says how it differs from
    nltk's download. It has no part in the rest.
    """

    description = "ROUGE F-measures in percent, averaged over the examples."
    citation = "Chin-Yew Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004."

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        found = rouge(predictions, references)
        self.signatures.update(dict.fromkeys(ROUGE_TYPES, found.signature))
        return {kind: 100 * sum(scores) / len(scores) for kind, scores in found.by_example.items()}


class Bleu(_TextMetric):
    """BLEU and chrF of the whole corpus as sacreBLEU computes them by default, over all references; BLEU of a language
    without spaces between words with a tokenizer for it."""

    description = "sacreBLEU's corpus BLEU and chrF."
    citation = "Post, A Call for Clarity in Reporting BLEU Scores, 2018; Popovic, chrF, 2015."

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        bleu = BLEU(force=True, tokenize=bleu_tokenizer(references))
        return {
            "bleu": self._corpus("bleu", bleu, predictions, references),
            "chrf": self._corpus("chrf", CHRF(), predictions, references),
        }

    def _corpus(
        self, name: str, metric: BLEU | CHRF, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> float:
        # None where an example has fewer references than another: an empty text would count as one of length 0.
        streams = list(zip_longest(*references))
        score: float = metric.corpus_score(predictions, streams).score
        self.signatures[name] = str(metric.get_signature())
        return score


class RomanianBleu(Bleu):
    """`Bleu`, and as `bleu_ro` the paper's en-ro figure: BLEU of texts that `peftbench.metrics.romanian` has prepared.

    sacreBLEU then neither tokenises nor smooths (exps/romanian_postprocess.sh).
    """

    description = "BLEU of Romanian text, normalised, tokenised and without diacritics; sacreBLEU's BLEU and chrF."

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        ours, right = map(prepared, predictions), [[prepared(text) for text in texts] for texts in references]
        bare = BLEU(tokenize="none", smooth_method="none", force=True)
        scores = {
            "bleu_ro": self._corpus("bleu_ro", bare, list(ours), right),
            **super()._compute(predictions, references),
        }
        self.signatures["bleu_ro"] += f"|text:romanian.prepared|sacremoses:{version('sacremoses')}"
        return scores


class ExactMatch(_TextMetric):
    """100 x the share of predictions that equal one of their references but for white space."""

    description = "The percentage of predictions that equal a reference."
    citation = ""

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        right = sum(ours.split() in [text.split() for text in texts] for ours, texts in pairs)
        return {"exact_match": 100 * right / len(references)}


METRICS: dict[str, type[_Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "macro_f1": MacroF1,
    "matthews": Matthews,
    "pearson": Correlation,
    "spearman": Correlation,
    **dict.fromkeys(ROUGE_TYPES, Rouge),
    "bleu": Bleu,
    "chrf": Bleu,
    "bleu_ro": RomanianBleu,
    "exact_match": ExactMatch,
}
