"""`peftbench claims --searches`: what a study has found beside named methods, from records that are made for it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.claims import main
from peftbench.records.record import load_records
from peftbench.tables.claims import judge_records
from peftbench.tables.searches import find_studies
from peftbench.utils.errors import UserError
from tests.tables.test_claims import make_row

SELECTION = {"split": "validation", "examples": 99, "metric": "accuracy", "value": 0.0}
AXES = {"functional_form": "gelu", "mix": "attention", "trainer.learning_rate": 0.001}
TYPED = ["functional_form=gelu", "mix=[prefix]", "trainer.learning_rate=0.001"]  # what made a trial
CHOSEN = f"method=mam {' '.join(TYPED)} budget=2%"


def search(role: str, value: float, study: str | None = "77aa", pruned: bool = False) -> dict[str, Any]:
    selection = {**SELECTION, "value": value} if role == "final" else None
    name = "lr5" if study is None else "optuna"
    chosen = {} if study is None else AXES
    return {
        "name": name,
        "role": role,
        "seed": 0,
        "keys": {key: [] for key in chosen},
        "chosen": chosen,
        "selection": selection,
    } | ({} if study is None else {"study": study, "pruned": pruned})


def make_trial(folder: Path, value: float, place: str, **changes: Any) -> None:
    """A trial of the study, with seed 0: a report score that says the opposite of its selection score."""
    settings = {"search": search("trial", value), "selection": {**SELECTION, "value": value}, "overrides": TYPED}
    settings |= changes
    make_row(folder / "trial", [100 - value], "mam", 1.9, budget="2%", representation=place, **settings)


def make_named(folder: Path, scores: list[float], method: str, **changes: Any) -> None:
    """Runs with the seeds 0, 1, ..., of which 0 is that of the trials."""
    settings = {"budget": "2%", "search": search("final", 80.0, None), **changes}
    make_row(folder / "named", scores, method, 1.95, **settings)


def make_point(folder: Path, scores: list[float], place: str = "output") -> None:
    """The point of a trial with the seeds 1, 2, ...."""
    settings = {"budget": "2%", "search": search("final", 85.0)}
    make_row(folder / "point", [50.0, *scores], "mam", 1.9, representation=place, **settings)
    (folder / "point" / f"mam-{place}-1.9-0" / "record.json").unlink()


@pytest.fixture
def found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def find(*words: str) -> dict[str, Any]:
        assert main([str(tmp_path), *words, "--searches", "--json", "--resamples", "500"]) == 0
        (study,) = json.loads(capsys.readouterr().out)
        return dict(study)

    return find


def make_all(folder: Path, best: list[float], mam: list[float], lora: list[float]) -> None:
    make_trial(folder, 85.0, "output")
    make_trial(folder, 84.0, "heads")
    make_point(folder, best)
    make_named(folder, [99.0, *mam], "mam")
    make_named(folder, [99.0, *lora], "lora")


def test_better_by_more_than_chance(tmp_path: Path, found: Callable[..., dict[str, Any]]) -> None:
    """By the seeds that all have but the trials': with theirs, MAM and LoRA would be better by far."""
    make_all(tmp_path, [90, 90.5, 91], [80, 80.5, 81], [70, 70.5, 71])
    study = found()
    assert study["better"] is True
    assert study["said"].startswith("The best point is better than MAM and LoRA by more than chance: +10.00 (")
    mam, lora = sorted(study["named"], key=lambda one: -one["score"])
    assert (mam["point"], mam["score"], list(mam["runs"])) == ("mam", 80.5, ["1", "2", "3"])
    assert lora["best_minus_it"]["difference"] == 20.0 and lora["best_minus_it"]["seeds"] == 3
    best, second = study["found"]
    assert " ".join(best["words"]) == CHOSEN and (best["score"], best["selection"]) == (90.5, 85.0)
    assert (second["score"], second["runs"]) == (None, {})


def test_one_rival_is_enough_not_to_be_better(tmp_path: Path, found: Callable[..., dict[str, Any]]) -> None:
    make_all(tmp_path, [80, 80.5, 81], [60, 60.5, 61], [80, 80.5, 81])
    study = found()
    assert study["better"] is False and study["said"].startswith("The best point is not better than MAM and LoRA")
    assert "+0.00 (+0.00 to +0.00) against LoRA" in study["said"]


@pytest.mark.parametrize(("stored", "told"), [(100, " LoRA is better than it by more than chance."), (200, "")])
def test_a_rival_that_beats_the_best_point_is_named(
    stored: int, told: str, tmp_path: Path, found: Callable[..., dict[str, Any]]
) -> None:
    """Unless it stores clearly more."""
    make_all(tmp_path, [70, 70.5, 71], [70, 70.5, 71], [80, 80.5, 81])
    for file in tmp_path.rglob("record.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        record["counts"]["stored"] = stored if record["method"] == "lora" else 100
        file.write_text(json.dumps(record), encoding="utf-8")
    said = found()["said"].split(" The best point is method=")[0]
    assert ", -10.00 (" in said and said.endswith(f") against LoRA.{told}")


@pytest.mark.parametrize("place", ["attention", "query"])  # before and after "output"
def test_of_equal_trials_the_one_with_other_seeds_was_chosen(
    place: str, tmp_path: Path, found: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_all(tmp_path, [80, 81], [60, 61], [70, 71])
    make_trial(tmp_path, 85.0, place)
    assert found()["better"] is True
    for file in tmp_path.rglob("record.json"):
        file.write_text(file.read_text(encoding="utf-8").replace('"debug": null', '"debug": "smoke"'), encoding="utf-8")
    assert main([str(tmp_path), "--searches"]) == 0
    assert "with bart-mini (debug=smoke) under budget=2%: 3 trials" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("best", "lora", "lacking"),
    [
        ([], [70, 71], "the best point has 0"),
        ([80, 81], [70], "LoRA has 1"),
        ([80], [], "the best point has 1 and LoRA has 0"),
    ],
)
def test_too_few_runs_say_nothing(
    best: list[float],
    lora: list[float],
    lacking: str,
    tmp_path: Path,
    found: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_all(tmp_path, best, [60, 61], lora)
    study = found()
    said = f"Not known yet: it takes 2 runs of each with other seeds than the trials', and {lacking}."
    assert study["better"] is None and study["said"] == said
    assert main([str(tmp_path), "--searches"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ("Reported: accuracy, with the seed 1, on which no choice depends." in told) == (len(best) == 1)


def test_runs_without_common_seeds_say_nothing(tmp_path: Path, found: Callable[..., dict[str, Any]]) -> None:
    make_all(tmp_path, [80, 81], [60, 61], [70, 71, 72, 73])
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "named" / f"lora-ffn-1.95-{seed}")
    assert found()["said"] == "Not known yet: the best point shares fewer than 2 seeds with LoRA."


def test_what_is_counted_and_what_is_compared(
    tmp_path: Path, found: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_all(tmp_path, [80, 81], [60, 61], [70, 71])
    make_trial(tmp_path, 0.0, "ffn", status="interrupted", search=search("trial", 0.0, pruned=True), selection=None)
    make_trial(tmp_path, 0.0, "query", status="diverged", selection=None, overrides=["search.trials=9"])
    make_trial(tmp_path, 0.0, "key", status="interrupted", selection=None)  # which goes on
    make_named(tmp_path, [99, 99, 99], "prefix", budget="0.5%")  # of another budget
    make_named(tmp_path, [99, 99, 99], "adapter", trainer={"max_steps": 7})  # trained otherwise
    study = found()
    assert study["trials"] == {"done": 2, "pruned": 1, "diverged": 1} and study["wanted"] == 9
    assert sorted(one["point"] for one in study["named"]) == ["lora", "mam"]
    assert main([str(tmp_path), "--searches"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "4 of 9 trials so far of search=optuna with seed 0 (2 done, 1 pruned, 1 diverged)" in told
    assert f"The best point is {CHOSEN}." in told and "the seeds 1, 2, on which no choice depends" in told
    assert main([str(tmp_path), "--searches", "--markdown"]) == 0
    assert "| gelu" not in (printed := capsys.readouterr().out) and printed.count("| mam |") == 1


def test_the_best_point_may_be_a_named_method(tmp_path: Path, found: Callable[..., dict[str, Any]]) -> None:
    """A search of learning rates has taken the trial and its runs, which are MAM's."""
    make_named(tmp_path, [99, 80, 81], "mam", search=search("final", 85.0, None))
    make_named(tmp_path, [99, 70, 71], "lora")
    make_trial(tmp_path, 84.0, "heads")
    file = tmp_path / "named" / "mam-ffn-1.95-0" / "record.json"
    record = json.loads(file.read_text())
    record |= {"search": search("trial", 85.0), "selection": {**SELECTION, "value": 85.0}}
    file.write_text(json.dumps(record))
    study = found()
    assert study["better"] is False and "MAM itself" in study["said"]


def test_a_study_is_no_test_of_a_claim(tmp_path: Path) -> None:
    """The method whose axes it varied is not what its points are."""
    make_all(tmp_path, [80, 81], [60, 61], [70, 71])
    records = load_records(tmp_path)[0]
    (cell,) = judge_records(records, 100)
    assert {run.search.name for row in cell.rows for run in row.records if run.search is not None} == {"lr5"}
    assert len(find_studies(records, 100)) == 1


def test_without_a_search_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    make_named(tmp_path, [80, 81], "mam")
    with pytest.raises(UserError, match=r"None of 2 records is a trial .* search_2%, or train with search=optuna"):
        main([str(tmp_path), "--searches"])


def test_the_tables_of_searches_fit_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_all(tmp_path, [80, 81], [60, 61], [70, 71])
    make_named(tmp_path, [99, 50, 51], "scaled_parallel_adapter")
    monkeypatch.setenv("COLUMNS", "80")
    assert main([str(tmp_path), "--searches"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    (row,) = (line for line in lines if line.startswith("scaled_parallel_adapter"))
    assert re.search(r"\+30\.00 +\+\d\d\.\d\d to \+\d\d\.\d\d$", row.rstrip())


def test_a_trial_that_another_search_has_counts(tmp_path: Path, found: Callable[..., dict[str, Any]]) -> None:
    """A study that had one said for ever that a trial was missing; the best one was then another point."""
    make_all(tmp_path, [80, 81], [60, 61], [70, 71])
    make_trial(tmp_path, 86.0, "query", search=search("trial", 86.0, None), studies=["77aa"])
    study = found()
    assert study["trials"] == {"done": 3} and study["found"][0]["point"] == "relu · query · sequential · add"
    assert {one["point"] for one in study["named"]} == {"mam", "lora"}


def test_methods_at_two_places_are_told_apart(tmp_path: Path, found: Callable[..., dict[str, Any]]) -> None:
    make_all(tmp_path, [80, 81], [60, 61], [70, 71])
    make_named(tmp_path, [50, 51, 52], "adapter", representation="attention")
    make_named(tmp_path, [50, 51, 52], "adapter")
    assert {one["point"] for one in found()["named"]} == {"mam", "lora", "adapter (ffn)", "adapter (attention)"}


def test_a_point_that_stores_clearly_more_is_not_better(tmp_path: Path, found: Callable[..., dict[str, Any]]) -> None:
    make_all(tmp_path, [90, 90.5, 91], [80, 80.5, 81], [70, 70.5, 71])
    for file in tmp_path.rglob("record.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["method"] == "lora":
            record["counts"]["stored"] = 16_000
            file.write_text(json.dumps(record), encoding="utf-8")
    study = found()
    assert study["better"] is False and study["said"].endswith("against LoRA, which stores less.")
