"""Every metric equals the library that defines it, to the last digit, and so do the `evaluate.Metric`s."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import accuracy_score as token_accuracy
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from peftbench.metrics.evaluate_metric import EvaluateMetric
from peftbench.metrics.measure import measure
from peftbench.metrics.romanian import prepare_text
from peftbench.metrics.scripts import Words
from peftbench.metrics.text import ROUGE_TYPES

SENTENCES = {
    "English": ["The cats sat on a mat", "Prices rose by 3.5% again, he said", "It was raining", "a b", "", "..."],
    "Romanian": ["Preşedintele ţării a spus: „nu”", "Este adus în fața instanței", "Nu există soluții", "", "a"],
    "Chinese": ["他说：你好", "猫在窗台上睡觉", "天晴", "", "2024年"],
}


def draw_labels(draw: np.random.Generator, labels: list[str]) -> tuple[list[str], list[str]]:
    """Predictions and references of some of the labels, of which many agree."""
    occurring = draw.choice(labels, draw.integers(1, len(labels) + 1), replace=False)
    right = draw.choice(occurring, draw.integers(1, 300))
    ours = np.where(draw.random(len(right)) < draw.random(), right, draw.choice(labels, len(right)))
    return ours.tolist(), right.tolist()


def draw_texts(draw: np.random.Generator, sentences: list[str]) -> tuple[list[str], list[list[str]]]:
    """Predictions of up to three sentences, and one to three references, of which some repeat words of predictions."""
    ours = [". ".join(draw.choice(sentences, draw.integers(1, 4))) for _ in range(draw.integers(1, 12))]
    right = [[". ".join(draw.choice(sentences, draw.integers(1, 4))) for _ in range(draw.integers(1, 4))] for _ in ours]
    return ours, right


@pytest.mark.parametrize("number", [2, 3, 8, 9, 25])
def test_metrics_of_labels_equal_scikit_learn(number: int) -> None:
    draw = np.random.default_rng(number)
    labels = [f"label {name}" for name in draw.permutation(number)]  # no more in alphabetical order
    for _ in range(60):
        ours, right = draw_labels(draw, labels)
        accuracy = 100 * accuracy_score(right, ours)
        macro = 100 * f1_score(right, ours, average="macro", zero_division=0)
        assert measure("macro_f1", ours, right, labels).scores["macro_f1"] == macro
        assert measure("matthews", ours, right, labels).scores["matthews"] == 100 * matthews_corrcoef(right, ours)
        assert measure("accuracy", ours, right).scores["accuracy"] == pytest.approx(accuracy, rel=1e-15)
        if number == 2:
            f1 = f1_score(right, ours, labels=labels[1:], average="macro", zero_division=0)
            assert measure("f1", ours, right, labels).scores["f1"] == 100 * f1


@pytest.mark.filterwarnings("ignore")  # of scores that are 0 / 0
@pytest.mark.parametrize("marks", ["BI", "I", "BIES"])
def test_metrics_of_entities_equal_seqeval(marks: str) -> None:
    """On any labels, also an I- that follows nothing of its type; texts without words, and without entities."""
    draw = np.random.default_rng(len(marks))
    labels = ["O", *(f"{mark}-{kind}" for mark in marks for kind in ("PER", "LOC", "A-B"))]
    for _ in range(60):
        weights = np.array([draw.choice([1.0, 50.0]), *[1.0] * (len(labels) - 1)])  # some texts have few entities
        sizes = draw.integers(1, 9, draw.integers(1, 20))
        right = [draw.choice(labels, size, p=weights / weights.sum()) for size in sizes]
        ours = [np.where(draw.random(len(tags)) < 0.7, tags, draw.choice(labels, len(tags))) for tags in right]
        texts = [[" ".join(tags) for tags in side] for side in (ours, right)]
        lists = [[tags.tolist() for tags in side] for side in (right, ours)]
        found = measure("entity_f1", [*texts[0], ""], [*texts[1], ""]).scores
        assert found == {
            "entity_f1": pytest.approx(100 * entity_f1(*lists), rel=1e-12),
            "entity_precision": pytest.approx(100 * precision_score(*lists), rel=1e-12),
            "entity_recall": pytest.approx(100 * recall_score(*lists), rel=1e-12),
            "token_accuracy": pytest.approx(100 * token_accuracy(*lists), rel=1e-12),
        }


def test_correlations_equal_scipy() -> None:
    draw = np.random.default_rng(1)
    for examples in [2, 3, 7, 40, 1000] * 10:
        right = draw.uniform(0, 5, examples).round(examples % 3)
        ours = draw.choice([1, 1e-6]) * (right + draw.normal(0, 1, examples)) + draw.choice([0, 2.5])
        found = measure("pearson", list(map(repr, ours.tolist())), list(map(repr, right.tolist()))).scores
        if len({*ours}) > 1 < len({*right}):
            assert found == {
                "pearson": 100 * pearsonr(ours, right).statistic,
                "spearman": 100 * spearmanr(ours, right).statistic,
            }


@pytest.mark.parametrize(("language", "tokenize"), [("English", "13a"), ("Romanian", "13a"), ("Chinese", "zh")])
def test_metrics_of_texts_equal_rouge_score_and_sacrebleu(language: str, tokenize: str) -> None:
    draw = np.random.default_rng(1)
    how: dict[str, Any] = {"use_stemmer": True} if language == "English" else {"tokenizer": Words()}
    scorer = RougeScorer(ROUGE_TYPES, **how)
    for _ in range(30):
        ours, right = draw_texts(draw, SENTENCES[language])
        right[0] = [SENTENCES[language][0]]  # of the language in any case
        direct = [scorer.score_multi(texts, text) for text, texts in zip(ours, right, strict=True)]
        found = measure("rougeL", ours, right).scores
        for kind in ("rouge1", "rouge2", "rougeL"):
            assert found[kind] == 100 * sum(score[kind].fmeasure for score in direct) / len(direct)

        streams, plain = list(zip_longest(*right)), list(map(prepare_text, ours))
        ready = list(zip_longest(*([prepare_text(text) for text in texts] for texts in right)))
        assert measure("bleu_ro", ours, right).scores == {
            "bleu_ro": BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(plain, ready).score,
            "bleu": BLEU(tokenize=tokenize).corpus_score(ours, streams).score,
            "chrf": CHRF().corpus_score(ours, streams).score,
        }


def test_evaluate_metrics_compute_the_same() -> None:
    ours, right = draw_texts(np.random.default_rng(1), SENTENCES["English"])
    for references in (right, [texts[0] for texts in right]):
        metric = EvaluateMetric("bleu")
        scores = metric.compute(predictions=ours, references=references)
        assert (scores, metric.signatures) == measure("bleu", ours, references)
    f1 = EvaluateMetric("f1", labels=["no", "yes"])
    assert f1.compute(predictions=["yes", "yes"], references=["yes", "no"]) == {"f1": 100 * (2 / 3), "accuracy": 50}
    assert "second of two labels" in f1.description


@pytest.mark.parametrize("metric", ["accuracy", "bleu"])
def test_predictions_and_references_must_be_equally_many(metric: str) -> None:
    """sacreBLEU would score as many as there are of both."""
    for ours, right in ((["a"], ["a", "b"]), (["a", "b"], ["a"]), ([], [])):
        with pytest.raises(ValueError, match=f"{metric} of {len(ours)} predictions and {len(right)} references"):
            measure(metric, ours, right)
