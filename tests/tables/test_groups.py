"""`group=`: the scores of some of the examples, in every table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from peftbench.cli.claims import main as claims
from peftbench.cli.compare import main as compare
from peftbench.cli.main import main
from peftbench.cli.report import main as report
from peftbench.cli.results import main as results
from peftbench.records.location import locate_run
from peftbench.records.record import Record, Score, Searched, find_record, load_records
from peftbench.records.recording import record_run
from peftbench.records.run_files import write_predictions
from peftbench.records.saved import read_saved_predictions
from peftbench.tables.examples import FILE, read_examples, read_groups, write_examples
from peftbench.tables.select import select_records
from peftbench.utils.errors import UserError
from tests.records.test_record import RUN
from tests.tables.test_claims import make_row

GROUPS = ["sea", "town", "town", "hill", "sea", "hill", "town"]
RIGHT = [
    ["a ship is on the sea", "one ship sails on the sea"],
    ["the old town has a hall and a wall"],
    ["the mayor of the town is old"],
    ["a hill is low and green"],
    ["the sea is deep and blue", "how deep and blue the sea is"],
    ["on the hill there is a house"],
    ["a town with two towers and a gate"],
]
OURS = [
    "a ship sails on the sea",
    "the old town has one hall and a wall",
    "the mayor of a town is very old",
    "a hill is high and green",
    "the sea is deep and blue",
    "there is a house on the hill",
    "a town with towers and gates",
]
SEEN = ["hill", "town"]


def make_run(root: Path, groups: Sequence[str] | None = GROUPS, shift: int = 0, **changes: Any) -> Path:
    """The folder of a run that has predicted the sentences, those from `shift` on as they are, the others cut short."""
    run = replace(RUN, output_dir=str(root), **changes)
    folder = locate_run(run)
    ours = [text if number >= shift else text[: len(text) // 2] for number, text in enumerate(OURS)]
    with record_run(run, folder, []) as record:
        lines = [{"index": n, "prediction": ours[n], "reference": right} for n, right in enumerate(RIGHT)]
        if groups is not None:
            lines = [{**line, "group": group} for line, group in zip(lines, groups, strict=True)]
            record.data["groups"] = {"column": "domain", "seen": SEEN}
        write_predictions(folder, lines)
        record.metric, record.data["scored_on"] = "bleu", "7e57"
        metrics = {"bleu": score_bleu(ours, range(len(ours))), "chrf": 50.0}
        record.scores = {"report": Score("test", len(ours), metrics), "copy": Score("test", len(ours), {"bleu": 99.0})}
        record.score, record.baselines, record.cut_off = metrics["bleu"], {"copy": 99.0}, {"report": 0.5}
    return folder


def score_bleu(ours: Sequence[str], of: Sequence[int] | range) -> float:
    most = max(len(RIGHT[n]) for n in of)
    streams = [[RIGHT[n][k] if k < len(RIGHT[n]) else None for n in of] for k in range(most)]
    return float(BLEU().corpus_score([ours[n] for n in of], streams).score)


def select(root: Path, *words: str) -> list[Record]:
    return select_records(load_records(root)[0], words)


@pytest.mark.parametrize(
    ("word", "of"),
    [
        ("group=seen", [1, 2, 3, 5, 6]),
        ("group=unseen", [0, 4]),
        ("group=town", [1, 2, 6]),
        ("group=s*,hill", [0, 3, 4, 5]),
        ("group=seen,unseen", list(range(7))),
    ],
)
@pytest.mark.parametrize("kept", [False, True], ids=["predictions", "examples.npz"])
def test_the_score_is_that_of_these_examples(word: str, of: list[int], kept: bool, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    before = find_record(folder)
    assert before is not None
    if kept:
        write_examples(read_examples(before)["bleu"].rows, folder, read_groups(before))
        (folder / "predictions.jsonl").unlink()
    (found,) = select(tmp_path, word)
    assert found.score == pytest.approx(score_bleu(OURS, of), abs=1e-9)
    whole = found.scores.pop("report")
    assert (whole.split, whole.examples, whole.of) == (f"{word[6:].replace(',', ', ')} test", len(of), None)
    assert whole.metrics["bleu"] == found.score and ("chrf" in whole.metrics) is not kept
    assert not found.scores and not found.baselines and not found.cut_off  # of all examples
    assert len(read_examples(found)["bleu"].rows) == len(of)
    assert "restricted" not in found.to_json()
    assert find_record(folder) == before and before.score == pytest.approx(score_bleu(OURS, range(7)))


def test_only_runs_that_know_their_groups_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = make_run(tmp_path, seed=1)
    make_run(tmp_path, None, seed=2)
    untrained = make_run(tmp_path, seed=3)
    record = find_record(untrained)
    assert record is not None
    record.data["groups"]["seen"] = None  # what it was trained on is not known
    record.save()
    assert [one.folder for one in select(tmp_path, "group=unseen")] == [known]
    told = "group=unseen leaves out 2 runs of which it is not known which examples are of that kind."
    assert told in capsys.readouterr().err
    assert {one.folder for one in select(tmp_path, "group=sea")} == {known, untrained}
    assert select(tmp_path, "group=sea", "seed=1")[0].folder == known
    assert "group=sea leaves out 1 run of" in capsys.readouterr().err  # that of seed 2, in the first of both calls
    assert select(tmp_path, "group=sea", "seed=1", "or", "seed=3")
    assert not capsys.readouterr().err


def test_a_trial_that_reports_all_examples_stays_without_its_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search counts its trials, and compares them by the selection split."""
    make_run(tmp_path, seed=1)
    trial = find_record(make_run(tmp_path, None, seed=2))
    assert trial is not None and trial.score is not None
    trial.search, trial.scores["selection"] = Searched("lr5", "trial", 2, {}), Score("validation", 3, {"bleu": 30.0})
    trial.save()
    (stays,) = (one for one in select(tmp_path, "group=unseen") if one.seed == 2)
    assert (stays.score, {*stays.scores}, stays.baselines, stays.cut_off) == (None, {"selection"}, {}, {})
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="no run knows which of its examples are of that kind"):
        select(tmp_path, "group=unseen", "seed=2")


def test_filters_are_of_the_restricted_score(tmp_path: Path) -> None:
    make_run(tmp_path)
    whole, sea = score_bleu(OURS, range(7)), score_bleu(OURS, [0, 4])
    assert sea > whole + 5
    assert select(tmp_path, f"score>{whole + 1}", "group=sea")
    assert not select(tmp_path, f"score>{sea + 1}", "group=sea")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["group=harbour"], "group=harbour is unknown. Choices: hill, sea, seen, town, unseen."),
        (["group!=sea"], "group!=sea: give group= once, as group=unseen or group=NAME,NAME."),
        (["group=sea", "group=hill"], "group=sea group=hill: give group= once"),
    ],
)
def test_a_group_that_cannot_be_shown_is_refused(words: list[str], told: str, tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(UserError) as error:
        select(tmp_path, *words)
    assert told in str(error.value)


def test_without_groups_it_is_said_how_to_have_them(tmp_path: Path) -> None:
    make_run(tmp_path, None)
    with pytest.raises(UserError, match=r"group=seen: no run knows .* train with task.group_column=COLUMN"):
        select(tmp_path, "group=seen")


@pytest.mark.parametrize(
    "arrays",
    [
        {"names": np.array(["a"]), "groups": np.zeros(6, np.uint8)},
        {"names": np.array(["a"]), "groups": np.ones(7, np.uint8)},
        {"names": np.array(["a"]), "groups": np.zeros(7)},
        {"names": np.array([1]), "groups": np.zeros(7, np.uint8)},
    ],
    ids=["too few", "without a name", "no codes", "no texts"],
)
def test_damaged_groups_are_refused(arrays: dict[str, Any], tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    record = find_record(folder)
    assert record is not None
    np.savez(folder / FILE, rows=read_examples(record)["bleu"].rows, **arrays)
    (folder / "predictions.jsonl").unlink()
    with pytest.raises(UserError, match=rf"{FILE} cannot be read: "):
        select(tmp_path, "group=seen")


def test_each_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        make_run(tmp_path, seed=seed)
        make_run(tmp_path, shift=4, method="lora", bottleneck=9, seed=seed)
    sea = [score_bleu(OURS, [0, 4]), score_bleu([OURS[0][: len(OURS[0]) // 2], *OURS[1:]], [0, 4])]

    assert results([str(tmp_path), "group=unseen", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted({round(one["score"], 6) for one in told}) == sorted(round(one, 6) for one in sea)
    assert results([str(tmp_path), "group=unseen", "--mean"]) == 0
    assert "bleu on 2 unseen test examples" in " ".join(capsys.readouterr().out.split())

    sides = ["method=mam group=unseen", "method=lora group=unseen"]
    assert compare([*sides, "--folder", str(tmp_path), "--resamples", "500", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]["bleu"]
    assert found["difference"] == pytest.approx(sea[0] - sea[1])
    with pytest.raises(UserError, match="they differ in split: unseen test and seen test"):
        compare([sides[0], "method=lora group=seen", "--folder", str(tmp_path)])

    page = tmp_path / "runs.html"
    assert report([str(tmp_path), "group=sea", "--predictions", "5", "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert RIGHT[4][0] in text and RIGHT[3][0] not in text


def test_claims_are_judged_on_these_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows that are alike on all examples, and not on each half of them."""
    for method, scores in (("parallel_adapter", [80.0, 81.0]), ("adapter", [80.0, 81.0])):
        make_row(tmp_path, scores, method, 2)
    for record in load_records(tmp_path)[0]:
        rows = np.sort(read_examples(record)[record.metric].rows, axis=0)
        rows = rows[::-1] if record.method == "adapter" else rows
        half = len(rows) // 2
        write_examples(rows, record.folder, ["old"] * half + ["new"] * (len(rows) - half))
        record.data["groups"] = {"column": "age", "seen": ["old"]}
        record.save()
    differences = []
    for words in ([], ["group=seen"], ["group=unseen"]):
        assert claims([str(tmp_path), *words, "--json"]) == 0
        (cell,) = json.loads(capsys.readouterr().out)
        (claim,) = (one for one in cell["claims"] if one["name"] == "insertion")
        differences.append(claim["estimate"]["difference"])
    whole, seen, unseen = differences
    assert whole == pytest.approx(0) and seen == pytest.approx(-unseen) and seen < -20


def test_a_run_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"film number {n}", "label": "yn"[n % 2], "domain": [1, 7, None][n % 3]} for n in range(12)]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["domain"] != 7))
    words = ["task=text_classification", "task.train_file=train.jsonl", "task.test_file=test.jsonl", "debug=smoke"]
    assert main(["train", *words, "task.group_column=domain", "task.selection_split=test"]) == 0
    (record,) = load_records(Path("outputs"))[0]
    assert record.data["groups"] == {"column": "domain", "seen": ["", "1"]}
    predictions = read_saved_predictions(record.folder, "report")
    assert [one["group"] for one in predictions] == ["1", "7", ""] * (len(predictions) // 3)
    (unseen,) = select(Path("outputs"), "group=unseen")
    right = [one["prediction"] == one["reference"] for one in predictions if one["group"] == "7"]
    assert unseen.score == pytest.approx(100 * np.mean(right)) and unseen.scores["report"].examples == len(right)
    capsys.readouterr()
    assert main(["train", *words, "task.selection_split=test"]) == 0  # they change no run
    assert "This run is done already" in capsys.readouterr().out
    assert main(["train", *words, "task.group_column=area", "task.selection_split=test", "rerun=true"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "test has no column area (task.group_column), so no score of a group can be shown." in told
    (record,) = load_records(Path("outputs"))[0]
    assert "groups" not in record.data and "group" not in read_saved_predictions(record.folder, "report")[0]
