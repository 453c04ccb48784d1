"""scripts/reproduction.sh: each step is one sweep, none of whose runs is refused; nothing is trained.

scripts/keep_records.py: what it keeps of runs is compared as they are.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from peftbench.cli.compare import main as compare
from peftbench.config.compose import compose_points
from peftbench.config.search import check_searches, list_settings
from peftbench.config.studies import group_studies, is_study
from peftbench.records.record import RecordedCounts, Searched, Selection, Trial, find_record
from peftbench.records.run_files import write_predictions
from peftbench.records.saved import read_saved_predictions
from peftbench.tables.examples import FILE, read_examples, write_examples
from peftbench.utils.errors import UserError
from tests.cli.test_compare import trained
from tests.project.test_reference_runs import shared

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CELLS = {  # the points of the steps mam and saturation, and of all steps
    "minilm-l6/sst2": (9, 62),
    "minilm-l6/rte": (9, 62),
    "minilm-l6/nli": (9, 62),
    "mpnet-base/nli": (6, 43),
    "bart-mini/webnlg": (9, 62),
    "bart-mini/en_ro": (9, 62),
    "smollm2-135m/xsum": (9, 61),
}

__all__ = ["shared"]


def arguments(shared: Path, *words: str, command: str = "train", **environment: str) -> list[str]:
    """What the script gives to `python3 -m peftbench`."""
    python = shared / "bin" / "python3"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    for name in ("smollm2-135m", "mpnet-base"):
        (shared / "backbones" / name).mkdir(exist_ok=True)
    for file in ("sst2/train.tsv", "sst2/dev.tsv", "rte/train.tsv", "rte/dev.tsv"):
        (shared / "data" / file).touch()
    done = subprocess.run(
        ["bash", SCRIPTS / "reproduction.sh", shared, shared / "backbones", "outputs", *words],
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    module, name, called, option, *rest = json.loads(done.stdout.splitlines()[-1])
    assert (module, name, called, option) == ("-m", "peftbench", command, "-m")
    return list(rest)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["minilm-l6/sst2", "mpnet-base/nli", "bart-mini/en_ro", "smollm2-135m/xsum"])
def test_a_step_is_one_sweep(cell: str, shared: Path) -> None:
    points = compose_points(arguments(shared, cell, "mam", "saturation"), multirun=True)
    check_searches(points)
    assert len(points) == 3 * CELLS[cell][0]
    (steps,) = {run.trainer.max_steps for _, run in points}
    assert steps
    for _, run in points:
        assert run.search is not None and len(list_settings(run, run.search)) == 5 and run.search.extend == 2
        assert run.task.selection_split != run.task.report_split
        assert str(run.model.path).endswith(cell.partition("/")[0])


def test_all_steps_have_a_point_once(shared: Path) -> None:
    for cell, (_, number) in CELLS.items():
        words = arguments(shared, cell)
        budgets = [word.partition("=")[2] for word in words if word.startswith("budget=")]
        rows = [word.partition("=")[2].split(",") for word in words if word.startswith("row=")]
        found = [(budget, row) for budget, of in zip(budgets, rows, strict=True) for row in of]
        assert len(found) == len(set(found)) == number


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["bart-mini/sst2"], "no cell bart-mini/sst2"),
        (["minilm-l6/sst2", "heds"], "no step heds"),
        (["minilm-l6/sst2", "mam", "search_2%"], "a call without other steps, here mam"),
        (["mpnet-base/sst2", "search_2%"], "no head of mpnet-base"),
    ],
)
def test_what_is_not_there_is_refused(words: list[str], named: str, shared: Path) -> None:
    done = subprocess.run(
        ["bash", SCRIPTS / "reproduction.sh", shared, shared, "outputs", *words], capture_output=True, text=True
    )
    assert done.returncode == 2 and named in done.stderr


def test_a_list_of_a_search_step_trains_nothing(shared: Path) -> None:
    words = arguments(shared, "minilm-l6/sst2", "search_2%", command="params", LIST="1")
    assert words[-2:] == ["seed=42", "method=mam,lora,scaled_parallel_adapter,prefix"] and "and" not in words


@pytest.fixture
def keep_records(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return __import__("keep_records")


def test_what_is_kept_is_compared_alike(
    keep_records: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, kept, again = (tmp_path / name for name in ("outputs", "kept", "again"))
    for seed in (1, 2):
        for method, right in (("mam", 80), ("lora", 60)):
            folder = trained(outputs, right + seed, method=method, seed=seed)
            record = find_record(folder)
            assert record is not None
            record.overrides = [f"output_dir={outputs}"]
            record.data["groups"] = {"column": "half", "seen": ["first"]}
            record.save()
            rows = read_saved_predictions(folder, "report")
            write_predictions(folder, ({**row, "group": ["first", "second"][row["index"] > 70]} for row in rows))

    def keep(source: Path, target: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["keep_records.py", str(source), str(target), "--shared", "/nowhere"])
        keep_records.main()

    keep(outputs, kept)
    keep(kept, again)  # nothing is lost of what was kept before
    assert not list(kept.rglob("predictions*")) and len(list(kept.rglob(FILE))) == 4
    capsys.readouterr()
    told = []
    for place in (outputs, kept, again):
        for group in ("", " group=unseen"):
            sides = [f"method=mam{group}", f"method=lora{group}"]
            assert compare([*sides, "--folder", str(place), "--resamples", "200", "--json"]) == 0
            told.append(json.loads(capsys.readouterr().out)["metrics"])
    assert told[:2] == told[2:4] == told[4:]
    assert told[0]["accuracy"]["b"] == pytest.approx(61.5) and told[1]["accuracy"]["b"] == pytest.approx(0)
    file = next(again.rglob(FILE))
    assert file.stat().st_size < 1000
    write_examples(np.ones((99, 1)), file.parent)
    with pytest.raises(UserError, match=r"examples\.npz cannot be read: it holds uint8 of the shape \(99, 1\)"):
        compare(["method=mam", "method=lora", "--folder", str(again)])


def test_of_trials_that_a_search_has_not_chosen_the_record_alone_is_kept(
    keep_records: ModuleType, tmp_path: Path
) -> None:
    searched = Searched("lr5", "trial", 42, {})
    records = []
    for index, role in enumerate(("final", "trial", "trial")):
        record = find_record(trained(tmp_path, 80, seed=index))
        assert record is not None
        record.search = replace(searched, role=role)
        records.append(record)
    final, loser, _ = records
    assert final.search is not None
    final.search.trials = [Trial({}, run.run, 1.0, "done") for run in (final, loser)]  # the third is of another search
    assert keep_records.find_losers(records) == {loser.run}


@pytest.mark.parametrize("status", ["done", "interrupted"])
def test_trials_are_kept_whole_until_a_run_of_their_search_has_ended(
    status: str, keep_records: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is interrupted is not kept; then nothing says that its search has chosen."""
    outputs, kept = tmp_path / "outputs", tmp_path / "kept"
    records = []
    for index, role in enumerate(("final", "trial")):
        record = find_record(trained(outputs, 80, seed=index))
        assert record is not None
        (record.folder / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
        record.search = Searched("lr5", role, 42, {})
        record.overrides = [f"output_dir={outputs}"]
        records.append(record)
    final, trial = records
    assert final.search is not None
    final.search.trials = [Trial({}, trial.run, 1.0, "done")]
    final.status = status
    for record in records:
        record.save()
    monkeypatch.setattr(sys, "argv", ["keep_records.py", str(outputs), str(kept), "--shared", "/nowhere"])
    keep_records.main()
    assert len(list(kept.rglob("record.json"))) == (2 if status == "done" else 1)
    assert {file.parent.name for file in kept.rglob("config.yaml")} == {final.run if status == "done" else trial.run}


def test_a_log_keeps_its_looks_and_a_few_lines_of_training(keep_records: ModuleType) -> None:
    look = {"stage": "train mam", "step": 50, "eval_accuracy": 81.234567}
    log = [{"stage": "train mam", "step": step, "loss": 1 / step} for step in range(1, 101)]
    kept = keep_records.thin_log([*log[:50], look, *log[50:]])
    assert [line["step"] for line in kept if "loss" in line] == [8, 16, 25, 33, 41, 50, 58, 66, 75, 83, 91, 100]
    assert {**look, "eval_accuracy": 81.2346} in kept and kept[0] == {"stage": "train mam", "step": 8, "loss": 0.125}
    assert keep_records.thin_log(kept) == kept  # so that what was kept can be kept again
    assert keep_records.thin_log([]) == [] and len(keep_records.thin_log(log[:5])) == 5


@pytest.mark.parametrize(("budget", "kept"), [("2%", [2]), (None, [0, 2])])
def test_of_beaten_trials_of_a_study_the_record_alone_is_kept(
    budget: str | None, kept: list[int], keep_records: ModuleType, tmp_path: Path
) -> None:
    """Without a budget a trial is beaten by one that stores no more, too; a pruned one has no score."""
    records = []
    for index, (score, stored) in enumerate([(70.0, 10), (60.0, 20), (80.0, 30), (0.0, 5)]):
        record = find_record(trained(tmp_path / "outputs", 80, seed=7, method="lora"))
        assert record is not None
        record.run, record.budget, record.counts = f"run{index}", budget, RecordedCounts(1000, 1, stored, 0, None)
        record.selection = Selection("validation", 9, "accuracy", score)
        record.search = Searched("optuna", "trial", 7, {}, study="77aa", pruned=index == 3)
        if index == 3:
            record.selection, record.status = None, "interrupted"
        records.append(record)
    beaten = {f"run{index}" for index in range(4) if index not in kept}
    assert keep_records.find_beaten(records) == beaten
    for role in ("final", "trial"):  # the run of a point with another seed, while the point is chosen and later
        confirmed = copy.deepcopy(records[2])
        confirmed.run, confirmed.seed, confirmed.search.role = "confirmed", 8, role
        assert keep_records.find_beaten([*records, confirmed]) == beaten | ({"confirmed"} if role == "trial" else set())
    one, target = records[2], tmp_path / "kept"
    one.overrides = ["output_dir=/nowhere"]
    keep_records.keep(one, target, {})
    assert (target / FILE).is_file() and (target / "config.yaml").is_file()
    keep_records.keep(one, target, {}, alone=True)  # now that another trial is better
    assert [file.name for file in target.iterdir()] == ["record.json"]
    kept_alone = find_record(target)
    assert kept_alone is not None
    kept_alone.overrides = one.overrides
    keep_records.keep(kept_alone, tmp_path / "again", {})  # on a machine that does not know the better one
    assert [file.name for file in (tmp_path / "again").iterdir()] == ["record.json"]


def test_predictions_that_are_not_those_of_the_score_are_not_kept(keep_records: ModuleType, tmp_path: Path) -> None:
    folder = trained(tmp_path, 80)
    record = find_record(folder)
    assert record is not None
    record.overrides = [f"output_dir={tmp_path}"]
    write_predictions(folder, [{"prediction": "yes", "reference": "yes"}] * 100)
    with pytest.raises(ValueError, match=r"the predictions have 100\.0, not 80\.0"):
        keep_records.keep(record, tmp_path / "kept", {})


@pytest.mark.parametrize(
    ("metric", "pairs", "labels"),
    [
        ("bleu", [("a cat sat on a mat", ["the cat sat on a mat", "a cat sat"]), ("no", ["no dog"])], ()),
        ("macro_f1", [("x", "x"), ("y", "x"), ("z", "z")], ("x", "y", "z")),
        ("pearson", [("1.5", "2"), ("3", "2.5"), ("-4", "1")], ()),
    ],
)
def test_a_score_of_rows_that_were_kept(
    metric: str, pairs: list[tuple[str, str]], labels: tuple[str, ...], tmp_path: Path
) -> None:
    folder = trained(tmp_path, 80)
    record = find_record(folder)
    assert record is not None
    record.metric, record.data["labels"] = metric, list(labels)
    record.scores["report"].examples = len(pairs)
    write_predictions(folder, [{"prediction": ours, "reference": right} for ours, right in pairs])
    before = read_examples(record)[metric]
    write_examples(before.rows, folder)
    (folder / "predictions.jsonl").unlink()
    (after,) = read_examples(record).values()
    assert np.array_equal(after.rows, before.rows)
    draws = np.stack([before.rows.sum(axis=0), 2 * before.rows[0] + before.rows[1:].sum(axis=0)])
    assert np.array_equal(after.score(draws, len(pairs)), before.score(draws, len(pairs)))


@pytest.mark.slow
def test_a_search_step_is_methods_and_a_study_alike(shared: Path) -> None:
    """All have seeds that no choice depends on; the study has as many learning rates as the methods."""
    words = arguments(shared, "minilm-l6/sst2", "search_0.5%", "search_2%", "search.trials=9", "trainer.max_steps=4")
    points = compose_points(words, multirun=True)
    check_searches(points)
    studies = group_studies([point for point in points if is_study(point[1])])
    assert [run.budget for (_, run), _ in studies] == ["0.5%", "2%"] and len(points) == 2 * (4 + 1) * 3
    for (_, run), seeds in studies:
        assert (run.seed, run.method, seeds) == (42, "mam", [1, 2, 3]) and run.search is not None
        assert (run.search.trials, run.search.extend) == (9, 0)
        assert len(run.search.keys) == 7 and run.trainer.max_steps == 4
        rates = run.search.keys["trainer.learning_rate"].times
        named = [one for _, one in points if not is_study(one) and one.budget == run.budget]
        assert {one.method for one in named} == {"mam", "lora", "scaled_parallel_adapter", "prefix"}
        for one in named:
            assert one.search is not None and one.search.keys["trainer.learning_rate"].times == rates
            assert one.search.extend == 2 and one.search.seed == 42 and one.seed in seeds and one.task == run.task
            assert replace(one.trainer, learning_rate=run.trainer.learning_rate) == run.trainer
