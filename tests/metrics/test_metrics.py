"""Metrics against values worked out by hand and against rouge_score used directly; the sentence splitter."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from peftbench.config.schema import TaskKind
from peftbench.config.task_validity import METRIC_NAMES as METRICS_OF_KIND
from peftbench.metrics.evaluate_metric import EvaluateMetric
from peftbench.metrics.measure import DEFINITIONS, measure
from peftbench.metrics.sentences import split_sentences, take_first_sentence
from peftbench.metrics.text import ROUGE_TYPES

PREDICTIONS = ["The cats sat on a mat. It rained.", "", "Prices rose again"]
REFERENCES = ["It was raining. A cat sat on the mat.", "Nothing was said.", "Prices rose again"]


def test_accuracy() -> None:
    assert measure("accuracy", ["a", "b", "b"], ["a", "b", "c"]).scores == {"accuracy": pytest.approx(200 / 3)}


def test_rouge_by_hand() -> None:
    # 2 of 3 words are shared, 1 of 2 pairs of words, and the longest common subsequence is "the cat"
    scores = measure("rouge2", ["the cat sat"], ["the cat ran"]).scores
    assert scores == pytest.approx({"rouge1": 200 / 3, "rouge2": 50, "rougeL": 200 / 3, "rougeLsum": 200 / 3})


def test_rouge_stems() -> None:
    assert measure("rouge1", ["cats running"], ["cat runs"]).scores["rouge1"] == 100


def test_rouge_is_the_mean_of_rouge_score() -> None:
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
    lines = [text.replace(". ", ".\n") for text in PREDICTIONS], [text.replace(". ", ".\n") for text in REFERENCES]
    direct = [scorer.score(reference, prediction) for prediction, reference in zip(*lines, strict=True)]
    expected = {kind: 100 * sum(score[kind].fmeasure for score in direct) / 3 for kind in ROUGE_TYPES}
    assert measure("rougeL", PREDICTIONS, REFERENCES).scores == pytest.approx(expected, abs=1e-9)


def test_lsum_does_not_mind_the_order_of_sentences() -> None:
    scores = measure("rougeLsum", ["It rained. He left."], ["He left. It rained."]).scores
    assert scores["rougeLsum"] == 100 > scores["rougeL"]


def test_every_metric_that_a_task_may_name_exists() -> None:
    assert set(DEFINITIONS) == {name for kind in TaskKind for name in METRICS_OF_KIND[kind]}


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
    assert split_sentences(text) == expected


def test_first_sentence() -> None:
    assert take_first_sentence("\nA sentence that is\nwrapped. Another.\n\nMore.") == "A sentence that is wrapped."
    assert take_first_sentence("Parameters\n\nMore. And more.") == "Parameters"
    assert take_first_sentence(" ") == ""


def test_f1_is_that_of_the_second_label() -> None:
    # 2 found, of which 1 is right; 3 are there, of which 1 is found: P = 1/2, R = 1/3
    predictions, references = ["no", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"]
    scores = measure("f1", predictions, references, ["no", "yes"]).scores
    assert scores == pytest.approx({"f1": 40, "accuracy": 40})
    assert measure("f1", ["no"] * 5, references, ["no", "yes"]).scores["f1"] == 0


def test_macro_f1_is_the_mean_over_the_labels_that_occur() -> None:
    """As scikit-learn has it: a test file without one of the labels does not make it wrong."""
    # a: P 1, R 1/2; b: P 1/2, R 1; c: never predicted, never right
    found = measure("macro_f1", ["a", "b", "b"], ["a", "a", "b"], ["a", "b", "c"])
    assert found.scores["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert found.signatures == {"macro_f1": "mean over 2 of 3 labels, those that occur"}
    assert measure("macro_f1", ["a", "b"], ["a", "b"], ["a", "b", "c"]).scores == {"macro_f1": 100, "accuracy": 100}
    predicted = measure("macro_f1", ["a", "c"], ["a", "b"], ["a", "b", "c"])  # b is never found, and c never right
    assert predicted.scores["macro_f1"] == pytest.approx(100 / 3) and predicted.signatures == {}


def test_matthews_by_hand() -> None:
    # true positives 2, true negatives 1, false positives 1, false negatives 1: (2 - 1) / sqrt(3 * 3 * 2 * 2)
    predictions, references = ["1", "1", "0", "1", "0"], ["1", "1", "0", "0", "1"]
    assert measure("matthews", predictions, references).scores["matthews"] == pytest.approx(100 / 6)
    assert measure("matthews", ["1"] * 5, references).scores["matthews"] == 0


def test_correlations_by_hand() -> None:
    # deviations (-1, 0, 1) and (-2, -1, 3): covariance 5, variances 2 and 14; the ranks agree
    scores = measure("pearson", ["1", "2", "3"], ["0", "1.0", "5"]).scores
    assert scores == pytest.approx({"pearson": 500 / 28**0.5, "spearman": 100})
    assert measure("spearman", ["2.0", "2.0"], ["1", "3"]).scores == {"pearson": 0, "spearman": 0}


def test_bleu_by_hand() -> None:
    # of 6 words 5 are there, of 5 pairs 3, of 4 triples 2, of 3 quadruples 1, and the lengths are equal
    measured = measure("bleu", ["the cat sat on a mat"], ["the cat sat on the mat"])
    assert measured.scores["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert measured.signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert set(measured.scores) == set(measured.signatures) == {"bleu", "chrf"}


def test_every_reference_counts_and_their_number_may_differ() -> None:
    predictions, references = ["a b c d e", "f g h i"], [["x y z", "a b c d e"], ["f g h i"]]
    measured = measure("bleu", predictions, references)
    assert measured.scores == pytest.approx({"bleu": 100, "chrf": 100})
    assert "nrefs:var" in measured.signatures["bleu"]
    assert measure("rougeL", predictions, references).scores["rougeL"] == 100
    assert measure("exact_match", ["a  b c d e", "f g h"], references).scores == {"exact_match": 50}


def test_rouge_equals_the_libraries_own_command_line(tmp_path: Path) -> None:
    """To the last digit it prints of each example: six behind the point."""
    for name, texts in (("ours", PREDICTIONS), ("right", REFERENCES)):
        (tmp_path / name).write_text("".join(text.replace(". ", ".\n") + "\x1e" for text in texts))
    command = [sys.executable, "-m", "rouge_score.rouge", "--prediction_filepattern=ours", "--target_filepattern=right"]
    command += ["--use_stemmer", "--noaggregate", "--delimiter=\x1e", f"--rouge_types={','.join(ROUGE_TYPES)}"]
    subprocess.run([*command, "--output_filename=out.csv"], cwd=tmp_path, check=True, capture_output=True)
    printed = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(printed) == len(PREDICTIONS)
    for row, ours, right in zip(printed, PREDICTIONS, REFERENCES, strict=True):
        scores = measure("rougeL", [ours], [right]).scores
        assert {kind: f"{scores[kind] / 100:.6f}" for kind in ROUGE_TYPES} == {
            kind: row[f"{kind}-F"] for kind in ROUGE_TYPES
        }


@pytest.mark.parametrize("second", [2, 1], ids=["as many references everywhere", "fewer here and there"])
def test_bleu_equals_the_libraries_own_command_line(tmp_path: Path, second: int) -> None:
    """To the last digit it prints. Its files have a line for each reference; one that repeats another adds nothing."""
    ours = ["The cats sat on a mat, it rained.", "Nothing happened here today!", "Prices rose again by 3.5%"]
    references = [
        ["A cat sat on the mat; it rained.", "Cats sat there."],
        ["Nothing happened.", "Nothing at all has happened here."][:second],
        ["Prices rose by 3.5% again", "Prices rose."],
    ]
    files = {"ours": ours, "first": [texts[0] for texts in references], "last": [texts[-1] for texts in references]}
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    command = [sys.executable, "-m", "sacrebleu", "first", "last", "-i", "ours", "-m", "bleu", "chrf", "-w", "10"]
    printed = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, text=True).stdout)
    scores = measure("chrf", ours, references).scores
    assert [round(scores["bleu"], 10), round(scores["chrf"], 10)] == [entry["score"] for entry in printed]


RUSSIAN = ["Мама мыла раму. Шёл дождь.", "Кошка спит на окне."]
CHINESE = ["他说：「你好。」我走了。", "猫在窗台上睡觉。"]
JAPANESE = ["東京の天気は晴れです。", "猫が窓で寝ている。"]
THAI = ["แมวนอนหลับอยู่บนหน้าต่าง", "วันนี้ฝนตก"]
HINDI = ["बिल्ली खिड़की पर सोती है।", "आज बारिश हो रही है।"]
GERMAN = ["Für die Übung fährt sie später.", "Das Mädchen hört Musik."]
PLAIN = "Bread and cakes are sold in most of the shops of the town, all through the year."
ACCENTED = [PLAIN.replace("shops", "cafés")] * 2 + [PLAIN] * 20


@pytest.mark.parametrize("texts", [RUSSIAN, CHINESE, JAPANESE, THAI, HINDI, GERMAN])
def test_texts_in_any_script_that_are_right_score_100_and_others_less(texts: list[str]) -> None:
    found = measure("rougeL", texts, texts)
    assert found.scores == dict.fromkeys(ROUGE_TYPES, 100)
    assert set(found.signatures) == set(ROUGE_TYPES)
    assert found.signatures["rougeL"].startswith("tok:words|stem:no|version:")
    assert measure("bleu", texts, texts).scores == pytest.approx({"bleu": 100, "chrf": 100})
    assert measure("rougeL", ["", texts[0]], texts).scores["rougeL"] < 60


def test_rouge_of_russian_by_hand() -> None:
    # 2 of 3 words are shared, 1 of 2 pairs of words; letters with marks are letters, and no word is stemmed
    scores = measure("rouge2", ["мама мыла пол"], ["Мама мыла раму"]).scores
    assert scores == pytest.approx({"rouge1": 200 / 3, "rouge2": 50, "rougeL": 200 / 3, "rougeLsum": 200 / 3})
    assert measure("rouge1", ["猫睡觉"], ["猫在睡"]).scores["rouge1"] == pytest.approx(200 / 3)  # by character
    assert measure("rouge1", ["बिल्ली"], ["बिल्ला"]).scores["rouge1"] == 0  # a vowel sign is part of the word
    assert measure("rouge1", ["e\u0301te\u0301"], ["été"]).scores["rouge1"] == 100


def test_a_few_accents_leave_the_figures_of_english_as_they_are() -> None:
    """It is the references that decide, whatever was predicted: those of XSum have 0.01% of such letters."""
    for predictions in (ACCENTED[::-1], ["кафе" for _ in ACCENTED]):
        scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
        direct = [scorer.score(right, ours) for ours, right in zip(predictions, ACCENTED, strict=True)]
        found = measure("rouge1", predictions, ACCENTED)
        for kind in ("rouge1", "rouge2", "rougeL"):
            assert found.scores[kind] == 100 * sum(score[kind].fmeasure for score in direct) / len(direct)
        assert found.signatures["rouge1"].startswith("tok:rouge_score|stem:porter|")


def test_bleu_is_tokenised_by_the_script_of_the_references() -> None:
    """The names are sacreBLEU's; a few foreign names in English change nothing."""
    for texts, name in (
        (RUSSIAN, "13a"),
        (GERMAN, "13a"),
        (HINDI, "13a"),
        (CHINESE, "zh"),
        (JAPANESE, "char"),
        (THAI, "char"),
        (["He lives in Beijing, which is 北京, and not in Tokyo."], "13a"),
    ):
        measured = measure("bleu", ["..." for _ in texts], [[text] for text in texts])
        assert f"|tok:{name}|" in measured.signatures["bleu"]
    direct = BLEU(tokenize="zh").corpus_score(["他说你好。我走"], [[CHINESE[0]]]).score
    assert measure("bleu", ["他说你好。我走"], [CHINESE[0]]).scores["bleu"] == pytest.approx(direct) != 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("他说：「你好。」我走了。真的？！是", ["他说：「你好。」", "我走了。", "真的？！", "是"]),
        ("आज बारिश है। कल नहीं।", ["आज बारिश है।", "कल नहीं।"]),
        ("هل تمطر؟ نعم.", ["هل تمطر؟", "نعم."]),
    ],
)
def test_sentences_of_other_scripts(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


def test_romanian_bleu_compares_prepared_texts() -> None:
    measured = measure("bleu_ro", ["Presedintele a spus: „nu”."], ['Preşedintele a spus: "nu".'])
    assert measured.scores["bleu_ro"] == pytest.approx(100)
    assert measured.scores["bleu"] < 90
    assert "tok:none|smooth:none" in measured.signatures["bleu_ro"]
    assert "sacremoses:" in measured.signatures["bleu_ro"]


def test_no_home_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "home" / "metrics"))
    scores = EvaluateMetric("accuracy").compute(predictions=["a", "b"], references=["a", "a"])
    assert scores == {"accuracy": 50.0}
