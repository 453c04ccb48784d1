"""A search from the command line: resumed, re-used, and with trials that fail or diverge."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import peftbench.train
from peftbench.cli.main import main
from peftbench.evaluation.evaluator import Evaluator
from peftbench.modification.state import list_trained
from peftbench.training.fit import Fitted
from tests.cli.test_train import SUBPROCESS, records, sentiment, smoke
from tests.sweeps.test_sweeper import SHORT, killed_until_done, outcome, replaced, trained

__all__ = ["sentiment", "smoke"]  # fixtures

SEARCH = ["search=lr3", "method=head", "task.baselines=[]"]
OTHER_SPLIT = "task.selection_split=train"  # the fixture has train and dev files only


def by_role(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"trial": [], "final": [], "plain": []}
    for record in records(folder):
        found[record["search"]["role"] if record["search"] else "plain"].append(record)
    return found


@pytest.mark.slow
def test_a_search_trains_its_trials_once_and_takes_the_best(
    smoke: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three trials and a second seed are four trainings; one trial's weights turn to NaN, as after a divergence."""
    really = peftbench.train._fit_model
    rates: list[float] = []

    def fit(run: Any, backbone: Any, *rest: Any) -> Fitted:
        fitted = really(run, backbone, *rest)
        rates.append(run.trainer.learning_rate)
        if run.trainer.learning_rate == 3e-3:
            with torch.no_grad():
                next(iter(list_trained(backbone.model).values())).fill_(torch.nan)
        return fitted

    monkeypatch.setattr(peftbench.train, "_fit_model", fit)
    monkeypatch.setattr(Evaluator, "selection", lambda self: {"accuracy": {1e-3: 61.0, 3e-4: 62.0}[rates[-1]]})
    arguments = ["train", "-m", *smoke, *SEARCH, "trainer=quick", "trainer.keep=last", OTHER_SPLIT, "seed=2,1"]
    assert main(arguments) == 0
    assert rates == [1e-3, 3e-4, 3e-3, 3e-4]
    found = by_role(tmp_path / "outputs")
    assert len(found["trial"]) == 2 and not found["plain"]
    assert sorted(record["seed"] for record in found["final"]) == [1, 2]
    for record in found["final"]:
        assert record["trainer"]["learning_rate"] == 3e-4
        search = record["search"]
        assert (search["name"], search["seed"], search["reported"]) == ("lr3", 2, False)
        assert (search["selection"]["split"], search["selection"]["examples"]) == ("train", 16)
        assert [trial["value"] for trial in search["trials"]] == [61.0, 62.0, None]
        assert search["trials"][2]["status"] == "diverged"
    captured = " ".join(capsys.readouterr().out.split())
    assert (
        "takes trainer.learning_rate=0.0003; trainer.learning_rate 0.001: 61.00, 0.0003: 62.00, 0.003: div" in captured
    )
    assert captured.endswith("2 of 2 runs are done.")

    assert main(arguments) == 0 and len(rates) == 4  # all of it is done
    assert " ".join(capsys.readouterr().out.split()).endswith("2 of 2 runs are done, 2 of them before.")


@pytest.mark.slow
def test_one_run_with_a_search_re_uses_what_was_trained_without(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plain run has no score on the selection split: it is scored from its adapter, not trained again."""
    arguments = [*smoke, "method=lora", "trainer=quick", "trainer.keep=last", OTHER_SPLIT]
    assert main(["train", *arguments]) == 0
    (plain,) = records(tmp_path / "outputs")
    assert plain["selection"] is None
    assert main(["train", *arguments, "search=lr3"]) == 0
    again = next(record for record in records(tmp_path / "outputs") if record["run"] == plain["run"])
    assert again["created"] == plain["created"] and again["selection"]["value"] is not None
    found = by_role(tmp_path / "outputs")
    (final,) = found["final"]
    assert len(found["trial"] + found["plain"]) == 2
    values = {trial["run"]: trial["value"] for trial in final["search"]["trials"]}
    assert values[final["run"]] == max(values.values()) and values[plain["run"]] == again["selection"]["value"]
    # The same score as a trial that notes it while it trains.
    assert main(["train", *replaced(arguments, tmp_path / "fresh"), "search=lr3", "search.trial=0"]) == 0
    (fresh,) = records(tmp_path / "fresh")
    assert fresh["selection"] == again["selection"] and fresh["search"]["role"] == "trial"
    # A trial that is asked for by itself is one no longer.
    assert main(["train", *replaced(arguments, tmp_path / "fresh")]) == 0
    (asked,) = records(tmp_path / "fresh")
    assert asked["search"] is None and asked["attempts"][0]["started"] == fresh["created"]
    assert asked["selection"] == fresh["selection"] and asked["scores"] == plain["scores"]


@pytest.mark.slow
def test_a_search_by_the_loss(smoke: list[str], tmp_path: Path) -> None:
    """Lower is better, and a text task that selects by its loss generates nothing for it."""
    arguments = ["task=docsum", "debug=smoke", "method=lora", "task.baselines=[]", "task.selection_metric=loss"]
    assert main(["train", *arguments, "search=lr3", f"output_dir={tmp_path}"]) == 0
    (final,) = by_role(tmp_path)["final"]
    values = [trial["value"] for trial in final["search"]["trials"]]
    assert final["search"]["selection"]["value"] == min(values) < max(values)
    assert final["search"]["selection"]["metric"] == "loss" and "selection" not in final["scores"]


@pytest.mark.slow
def test_a_search_on_the_split_that_is_reported_says_so(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *smoke, *SEARCH]) == 0
    (final,) = by_role(tmp_path / "outputs")["final"]
    assert final["search"]["reported"] and final["search"]["selection"]["value"] == final["score"]
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("chosen on the split that is reported on") == 1


@pytest.mark.slow
def test_a_search_whose_trials_all_fail_ends_in_a_sentence(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *smoke, "search=lr3", "method=lora", "modified_representation.layers=[99]"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "all 3 trials of method=lora on task=sst2 failed or diverged: trainer.learning_rate" in captured.err
    assert "Traceback" not in captured.err and "0 of 1 runs are done. 1 cannot run" in captured.out


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(smoke: list[str], tmp_path: Path) -> None:
    settings = ["trainer.keep=best", "trainer.checkpoint_minutes=0", "trainer.evaluate_every=2", OTHER_SPLIT]
    words = [word for word in smoke if not word.startswith("trainer.max_steps")]
    words += [*settings, "trainer.max_steps=6", "search=lr3", "method=lora", "task.baselines=[]", "seed=1,2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", "-m", *replaced(words, whole)]) == 0
    expected = outcome(whole)
    assert len(expected) == 4
    log = tmp_path / "log"
    killed_until_done(replaced(words, parts), log, kills=2, seed=5, runs=4)
    assert outcome(parts) == expected
    assert 4 <= trained(log.read_text()) <= 6
    searched = [[r["search"] for r in sorted(records(one), key=lambda r: str(r["run"]))] for one in (whole, parts)]
    assert searched[0] == searched[1]


@pytest.mark.slow
def test_two_processes_share_a_search(smoke: list[str], tmp_path: Path) -> None:
    arguments = [*SUBPROCESS, "train", "-m", *smoke, *SEARCH, "seed=1,2"]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sum(trained(out) for out, _ in printed) == 4
    for out, _ in printed:
        assert "2 of 2 runs are done" in out.splitlines()[-1]


@pytest.mark.slow
def test_a_search_side_by_side_is_one_after_another(
    smoke: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In two workers: the same trials, choice and scores, also where a trial is a run that is done."""
    words = [word for word in smoke if not word.startswith("trainer.max_steps")]
    words += [*SHORT[:-1], OTHER_SPLIT]  # without its seeds
    search = [*words, "search=lr3", "seed=1,2,3"]
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    assert main(["train", "-m", *replaced(search, alone)]) == 0
    assert main(["train", *replaced([*words, "seed=1"], beside)]) == 0
    (plain,) = records(beside)
    capfd.readouterr()
    assert main(["train", "-m", *replaced(search, beside), "jobs=2"]) == 0
    printed = capfd.readouterr()
    found = [outcome(folder) for folder in (beside, alone)]
    ways = [one.pop(plain["run"]) for one in found]  # trained by itself, it has a score
    assert found[0] == found[1] and len(found[1]) == 4 and ways[0][-1] == ways[1][-1]
    both = [{record["run"]: record["search"] for record in records(folder)} for folder in (alone, beside)]
    assert both[1].pop(plain["run"]) is None  # it was trained by itself, and is a trial beside
    assert both[0].pop(plain["run"])["role"] == "trial" and both[0] == both[1]
    again = next(record for record in records(beside) if record["run"] == plain["run"])
    assert again["created"] == plain["created"] and again["selection"]["value"] is not None
    assert (
        "6 runs, 2 at once" in printed.out
        and "\n6 of 6: " in printed.out
        and "3 of 3 runs are done" in " ".join(printed.out.split())
    )
    assert "takes trainer.learning_rate=" in printed.out
    logs = [log.read_text(encoding="utf-8") for log in (beside / ".sweeps").rglob("worker-*.log")]
    assert [log.count("ready for runs after ") for log in logs] == [1, 1]  # for trials and runs
    assert main(["train", "-m", *replaced(search, beside), "jobs=2"]) == 0
    assert "3 of 3 runs are done, 3 of them before." in " ".join(capfd.readouterr().out.split())
