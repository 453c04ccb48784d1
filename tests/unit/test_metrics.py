"""Metrics against values worked out by hand and against rouge_score used directly; the sentence splitter."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from peftbench.config import TaskKind
from peftbench.tasks.metrics import METRICS, ROUGE_TYPES, compute_metrics
from peftbench.tasks.sentences import first_sentence, sentences
from peftbench.validity import METRICS as METRICS_OF_KIND

PREDICTIONS = ["The cats sat on a mat. It rained.", "", "Prices rose again"]
REFERENCES = ["It was raining. A cat sat on the mat.", "Nothing was said.", "Prices rose again"]


def test_accuracy() -> None:
    assert compute_metrics("accuracy", ["a", "b", "b"], ["a", "b", "c"]) == {"accuracy": pytest.approx(200 / 3)}


def test_rouge_by_hand() -> None:
    # 2 of 3 words are shared, 1 of 2 pairs of words, and the longest common subsequence is "the cat"
    scores = compute_metrics("rouge2", ["the cat sat"], ["the cat ran"])
    assert scores == pytest.approx({"rouge1": 200 / 3, "rouge2": 50, "rougeL": 200 / 3, "rougeLsum": 200 / 3})


def test_rouge_stems() -> None:
    assert compute_metrics("rouge1", ["cats running"], ["cat runs"])["rouge1"] == 100


def test_rouge_is_the_mean_of_rouge_score() -> None:
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
    lines = [text.replace(". ", ".\n") for text in PREDICTIONS], [text.replace(". ", ".\n") for text in REFERENCES]
    direct = [scorer.score(reference, prediction) for prediction, reference in zip(*lines, strict=True)]
    expected = {kind: 100 * sum(score[kind].fmeasure for score in direct) / 3 for kind in ROUGE_TYPES}
    assert compute_metrics("rougeL", PREDICTIONS, REFERENCES) == pytest.approx(expected, abs=1e-9)


def test_lsum_does_not_mind_the_order_of_sentences() -> None:
    scores = compute_metrics("rougeLsum", ["It rained. He left."], ["He left. It rained."])
    assert scores["rougeLsum"] == 100 > scores["rougeL"]


def test_every_metric_that_a_task_may_name_exists() -> None:
    assert set(METRICS) == {name for kind in TaskKind for name in METRICS_OF_KIND[kind]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith met Dr. J. Jones in St. Louis. He left.", ["Mr. Smith met Dr. J. Jones in St. Louis.", "He left."]),
        ("It cost 3.5 million. Really? Yes!", ["It cost 3.5 million.", "Really?", "Yes!"]),
        ("See e.g. numpy. Then the U.S. economy grew.", ["See e.g. numpy.", "Then the U.S. economy grew."]),
        ("A headline\nA sentence.", ["A headline", "A sentence."]),
        ("no end", ["no end"]),
        ("  \n", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_first_sentence() -> None:
    assert first_sentence("\nA sentence that is\nwrapped. Another.\n\nMore.") == "A sentence that is wrapped."
    assert first_sentence("Parameters\n\nMore. And more.") == "Parameters"
    assert first_sentence(" ") == ""
