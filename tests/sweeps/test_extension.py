"""A search that goes on beyond its outermost value: which trials are trained when, and what its runs become."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.main import main
from peftbench.cli.results import main as results
from peftbench.cli.status import main as status
from peftbench.config.compose import compose_points
from peftbench.config.schema import LOSS, Run
from peftbench.config.search import build_trials, split_trials
from peftbench.records.choice import describe_search_choice, list_edges, settle_search
from peftbench.records.location import locate_run
from peftbench.records.record import find_finished, load_records
from peftbench.sweeps.jobs import Ended
from peftbench.sweeps.plan import FOLDER, Sweep
from peftbench.utils.errors import UserError
from tests.config.test_search import searching
from tests.sweeps.fake_trainings import HIGHER, INSIDE, LOWER, WORDS, Scores, Trainings, finals, train, write
from tests.sweeps.test_sweeper import killed_until_done, outcome, trained


def extended(folder: Path, number: int, metric: str | None = None) -> Run:
    run = searching(folder)
    assert run.search is not None
    task = replace(run.task, selection_metric=metric)
    return replace(run, task=task, search=replace(run.search, extend=number))


def settle(run: Run, scores: Scores) -> tuple[list[float], Run, Any]:
    """Train what a search asks for until it is settled; return the further rates, and what the run becomes."""
    for trial in build_trials(run):
        write(trial, scores[trial.trainer.learning_rate])
    asked: list[float] = []
    while True:
        try:
            return asked, *settle_search(run)
        except UserError as error:
            assert str(error).startswith(f"search=lr3: 1 of {4 + len(asked)} trials of ")
        assert run.search is not None
        rates = [rate for rate in scores if rate not in (1e-3, 3e-4, 3e-3)]
        asked.append(rates[len(asked)])
        plain = replace(run, search=None)
        write(replace(plain, trainer=replace(plain.trainer, learning_rate=asked[-1])), scores[asked[-1]])


@pytest.mark.parametrize(
    ("scores", "number", "asked", "chosen", "at_edge"),
    [
        (HIGHER, 0, [], 3e-3, True),
        (HIGHER, 1, [1e-2], 1e-2, True),
        (HIGHER, 3, [1e-2, 3e-2, 0.1], 0.1, True),
        (LOWER, 1, [1e-4], 1e-4, True),
        (LOWER, 3, [1e-4, 3e-5], 1e-4, False),
        (INSIDE, 2, [], 1e-3, False),
        ({**INSIDE, 1e-3: 1.0, 3e-4: 1.0}, 2, [], 1e-3, False),  # of equal ones the first, which is inside
        ({**HIGHER, 1e-2: 2.0}, 2, [1e-2], 3e-3, False),  # no better is not best
        ({**HIGHER, 1e-2: None}, 2, [1e-2], 3e-3, False),
        ({**HIGHER, 1e-2: "OutOfMemoryError"}, 2, [1e-2], 3e-3, False),
        ({**HIGHER, 3e-3: None}, 2, [], 1e-3, False),  # what lies beyond has diverged
        ({1e-3: None, 3e-4: 0.1, 3e-3: "MemoryError", 1e-4: 0.0}, 2, [1e-4], 3e-4, False),
    ],
)
def test_a_search_goes_on_while_the_outermost_is_best(
    scores: Scores, number: int, asked: list[float], chosen: float, at_edge: bool, tmp_path: Path
) -> None:
    found, run, note = settle(extended(tmp_path, number), scores)
    assert found == asked and run.trainer.learning_rate == chosen and run.search is None
    assert note.keys == {"trainer.learning_rate": [1e-3, 3e-4, 3e-3, *asked]}
    assert [trial.settings["trainer.learning_rate"] for trial in note.trials] == [1e-3, 3e-4, 3e-3, *asked]
    known = [None if isinstance(score, str) else score for score in scores.values()]
    assert [trial.value for trial in note.trials] == known[: 3 + len(asked)]
    assert note.chosen == {"trainer.learning_rate": chosen} and note.selection.value == scores[chosen]
    assert list_edges(note) == (["trainer.learning_rate"] if at_edge else [])


def test_of_a_loss_the_lowest_goes_on(tmp_path: Path) -> None:
    scores: Scores = {1e-3: 3.0, 3e-4: 4.0, 3e-3: 2.0, 1e-2: 1.0, 3e-2: 1.5}
    found, run, _ = settle(extended(tmp_path, 2, LOSS), scores)
    assert found == [1e-2, 3e-2] and run.trainer.learning_rate == 1e-2


def test_where_all_trials_failed_nothing_more_is_tried(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        settle(extended(tmp_path, 2), {1e-3: None, 3e-4: "MemoryError", 3e-3: None})
    with pytest.raises(UserError, match="all 3 trials of method=mam on task=doctopic failed or diverged"):
        settle_search(extended(tmp_path, 2))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    found = Trainings({"lora": HIGHER, "head": INSIDE, "bitfit": LOWER})
    monkeypatch.setattr("peftbench.sweeps.sweeper.train_attempt", found.attempt)
    monkeypatch.setattr("peftbench.sweeps.sweeper.Workers", None)
    return found


def test_trials_come_first_then_those_of_further_values_then_the_runs(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "method=lora,head,bitfit", "search.extend=2") == 0
    rates = ("0.001", "0.0003", "0.003")
    assert trainings.done == [
        *(f"{method} 2 {rate}" for method in ("lora", "head", "bitfit") for rate in rates),
        *("lora 2 0.01", "bitfit 2 0.0001", "lora 2 0.03", "bitfit 2 3e-05"),
        *("lora 1 0.03", "head 1 0.001", "bitfit 1 0.0001"),
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("the outermost trainer.learning_rate that was tried: the best may lie beyond it") == 1
    assert "0.01: 3.00, 0.03: 4.00; the outermost" in printed and "0.0001: 3.00, 3e-05: 2.50." in printed
    assert printed.endswith("6 of 6 runs are done.")
    assert "run 17: search=lr3 seed=1 trainer.learning_rate=0.001 method=lora" in printed
    assert finals(tmp_path) == {
        "lora": ["0.03 1", "0.03 2"],
        "head": ["0.001 1", "0.001 2"],
        "bitfit": ["0.0001 1", "0.0001 2"],
    }
    trial = next(one for one in load_records(tmp_path)[0] if one.trainer["learning_rate"] == 1e-2)
    assert trial.search is not None and (trial.search.role, trial.search.seed) == ("trial", 2)
    assert trial.search.keys == {"trainer.learning_rate": [1e-3, 3e-4, 3e-3, 1e-2]}
    assert results([str(tmp_path), "method=lora", "--show", "learning_rate,seed", "--csv"]) == 0
    assert "10 trials of searches are left out" in capsys.readouterr().err
    assert results([str(tmp_path), "method=lora", "trials=true", "--show", "learning_rate,seed", "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_a_finished_sweep_trains_nothing_and_starts_no_worker(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "method=lora,bitfit", "search.extend=2") == 0
    number = len(trainings.done)
    capsys.readouterr()
    for words in ([], ["jobs=2"]):  # there are no workers here
        assert train(tmp_path, "method=lora,bitfit", "search.extend=2", *words) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.endswith("4 of 4 runs are done, 4 of them before.") and len(trainings.done) == number
    assert status([str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)  # one plan
    assert found["counts"]["done"] == len(found["runs"]) == number
    keys = ("method", "search", "trainer.learning_rate")
    assert [[run["settings"][key] for key in keys] for run in found["runs"]][6:] == [
        ["lora", "lr3 trial", "0.01"],
        ["lora", "lr3", "0.03"],
        ["bitfit", "lr3", "0.0001"],
        ["bitfit", "lr3 trial", "3e-05"],
        ["lora", "lr3", "0.03"],
        ["bitfit", "lr3", "0.0001"],
    ]


def test_further_trials_that_were_done_before_are_known(tmp_path: Path, trainings: Trainings) -> None:
    words = [*WORDS, "method=lora", "search.extend=2", f"output_dir={tmp_path}"]
    assert main(["train", "-m", *words]) == 0
    trials, final = split_trials(compose_points(words, multirun=True))
    sweep = Sweep(final, words, trials)
    assert len(sweep.further) == 2 and all(sweep.was_done_before(trial.folder) for trial in sweep.further)


@pytest.mark.parametrize("number", range(1, 8))
def test_a_sweep_that_was_stopped_trains_nothing_twice(
    number: int, tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        if len(trainings.done) == number:
            raise KeyboardInterrupt
        return trainings.attempt(run, overrides, **others)

    with monkeypatch.context() as patched:
        patched.setattr("peftbench.sweeps.sweeper.train_attempt", attempt)
        assert train(tmp_path, "method=lora", "search.extend=2") == (130 if number < 6 else 0)
    assert train(tmp_path, "method=lora", "search.extend=2") == 0
    assert trainings.done == [f"lora {end}" for end in ("2 0.001", "2 0.0003", "2 0.003", "2 0.01", "2 0.03", "1 0.03")]


def test_a_larger_number_goes_on_and_leaves_one_choice(tmp_path: Path, trainings: Trainings) -> None:
    assert train(tmp_path, "method=lora") == 0
    assert finals(tmp_path) == {"lora": ["0.003 1", "0.003 2"]}
    assert train(tmp_path, "method=lora", "search.extend=1") == 0
    assert trainings.done[4:] == ["lora 2 0.01", "lora 1 0.01"]
    assert finals(tmp_path) == {"lora": ["0.01 1", "0.01 2"]}
    assert train(tmp_path, "method=lora", "search.extend=3", "seed=2,3", "search.seed=2") == 0
    assert trainings.done[6:] == ["lora 2 0.03", "lora 2 0.1", "lora 3 0.1"]
    assert finals(tmp_path) == {"lora": ["0.1 2", "0.1 3"]}  # seed 1 too is of another choice
    assert train(tmp_path, "method=lora", "search.extend=1") == 0
    assert len(trainings.done) == 9 and finals(tmp_path) == {"lora": ["0.01 1", "0.01 2"]}


def test_of_further_trials_too_that_lost_the_record_alone_is_kept(
    tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    find_losers = __import__("keep_records").find_losers
    assert train(tmp_path, "method=lora,bitfit", "search.extend=1") == 0
    assert train(tmp_path, "method=lora,bitfit", "search.extend=2") == 0
    records = load_records(tmp_path)[0]
    lost = {one.run: f"{one.method} {one.seed} {one.trainer['learning_rate']:g}" for one in records}
    assert sorted(lost[run] for run in find_losers(records)) == [
        *(f"bitfit 2 {rate}" for rate in ("0.0003", "0.001", "0.003", "3e-05")),
        *(f"lora 2 {rate}" for rate in ("0.0003", "0.001", "0.003", "0.01")),  # 0.01 was chosen before
    ]


def test_a_choice_of_another_search_stays(tmp_path: Path, trainings: Trainings) -> None:
    assert train(tmp_path, "method=lora") == 0
    trainings.scores["lora"] |= {1e-4: 0.0}
    assert train(tmp_path, "method=lora", "search=lr5") == 0
    assert finals(tmp_path)["lora"] == ["0.003 1", "0.003 2", "0.01 1", "0.01 2"]
    assert train(tmp_path, "method=lora", "search.seed=1") == 0
    assert finals(tmp_path)["lora"] == ["0.003 1", "0.003 2", "0.01 1", "0.01 2"]


def test_a_failed_further_trial_is_tried_again_with_retry(tmp_path: Path, trainings: Trainings) -> None:
    trainings.scores["lora"] = {**HIGHER, 1e-2: "MemoryError"}
    assert train(tmp_path, "method=lora", "search.extend=2") == 0
    assert finals(tmp_path) == {"lora": ["0.003 1", "0.003 2"]}
    assert train(tmp_path, "method=lora", "search.extend=2") == 0 and len(trainings.done) == 5
    trainings.scores["lora"] = HIGHER
    assert train(tmp_path, "method=lora", "search.extend=2", "retry=true") == 0
    assert trainings.done[5:] == ["lora 2 0.01", "lora 2 0.03", "lora 1 0.03"]
    assert finals(tmp_path) == {"lora": ["0.03 1", "0.03 2"]}


def test_a_rerun_decides_anew_how_far_it_goes(tmp_path: Path, trainings: Trainings) -> None:
    assert train(tmp_path, "method=lora", "search.extend=2") == 0
    del trainings.done[:]
    trainings.scores["lora"] = {**HIGHER, 1e-2: 0.5}
    assert train(tmp_path, "method=lora", "search.extend=2", "rerun=true") == 0
    assert trainings.done == [f"lora {end}" for end in ("2 0.001", "2 0.0003", "2 0.003", "2 0.01", "1 0.003")]
    assert finals(tmp_path) == {"lora": ["0.003 1", "0.003 2"]}


def test_a_further_value_that_was_trained_before_counts(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    (trial,) = [one for one in build_trials(extended(tmp_path, 0)) if one.trainer.learning_rate == 3e-3]
    rates = [replace(trial, trainer=replace(trial.trainer, learning_rate=rate)) for rate in (1e-2, 3e-2)]
    for run in rates:
        write(run, HIGHER[run.trainer.learning_rate])
    _, run, note = settle(extended(tmp_path, 2), {**HIGHER, 1e-2: "never asked for", 3e-2: "never asked for"})
    assert run.trainer.learning_rate == 3e-2 and [trial.value for trial in note.trials] == [1.0, 0.0, 2.0, 3.0, 4.0]
    record = find_finished(locate_run(rates[1]))
    assert record is not None
    line = describe_search_choice(replace(record, search=note))
    assert line.endswith(
        "0.01: 3.00, 0.03: 4.00; the outermost trainer.learning_rate that was tried: the best may lie beyond it."
    )


def test_one_run_has_its_further_trials_first(tmp_path: Path, trainings: Trainings) -> None:
    words = ["search=lr3", "search.extend=1", "method=lora", "trainer.learning_rate=0.001", "seed=5"]
    assert main(["train", *words, f"output_dir={tmp_path}"]) == 0
    assert [word.split()[-1] for word in trainings.done] == ["0.001", "0.0003", "0.003", "0.01"]
    assert finals(tmp_path) == {"lora": ["0.01 5"]}


# On the mini backbone the loss is least at a learning rate of 0.003: lora goes on once, bitfit as often as it may.
REAL = [
    "task=docsum",
    "debug=smoke",
    "task.baselines=[]",
    "task.selection_metric=loss",
    "search=lr3",
    "search.extend=2",
]
BOTH = [*REAL, "seed=1,2", "trainer.learning_rate=3e-4", "method=lora"]
BOTH += ["and", "method=bitfit", "trainer.learning_rate=1e-5"]


@pytest.mark.slow
def test_a_search_goes_on_alike_wherever_it_is_trained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One after another, side by side and through a launcher of Hydra's; then nothing is left to do for any of them."""
    found = []
    for name, words in {"alone": [], "beside": ["jobs=2"], "launched": ["hydra/launcher=basic"]}.items():
        line = ["train", "-m", *words, f"output_dir={tmp_path / name}", *BOTH]
        assert main(line) == 0
        records = {one.run: one for one in load_records(tmp_path / name)[0]}
        found.append([outcome(tmp_path / name), {run: one.search for run, one in records.items()}])
        capfd.readouterr()
        assert main(line) == 0
        assert "4 of 4 runs are done, 4 of them before." in " ".join(capfd.readouterr().out.split())
    assert found[0] == found[1] == found[2]
    logs = [log.read_text(encoding="utf-8") for log in (tmp_path / "beside" / FOLDER).rglob("worker-*.log")]
    assert [log.count("ready for runs after ") for log in logs] == [1, 1]  # for all runs of the first line
    chosen = {one.method: one.search for one in records.values() if one.search and one.search.role == "final"}
    lora, bitfit = chosen["lora"], chosen["bitfit"]
    assert lora.keys["trainer.learning_rate"] == [3e-4, 9e-5, 9e-4, 3e-3, 9e-3]
    assert lora.chosen["trainer.learning_rate"] == 3e-3 and not list_edges(lora)
    assert bitfit.keys["trainer.learning_rate"] == [1e-5, 3e-6, 3e-5, 1e-4, 3e-4]
    assert bitfit.chosen["trainer.learning_rate"] == 3e-4 and list_edges(bitfit)
    assert len(records) == 2 * (5 + 1)


@pytest.mark.slow
def test_a_search_that_goes_on_and_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Side by side, as one after another without a kill."""
    words = [*REAL, "seed=1,2", "trainer.learning_rate=3e-4", "method=lora", "trainer.max_steps=6"]
    words += ["trainer.keep=best", "trainer.evaluate_every=2", "trainer.checkpoint_minutes=0"]
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    assert main(["train", "-m", *words, f"output_dir={whole}"]) == 0
    killed_until_done([*words, "jobs=2", f"output_dir={parts}"], log, kills=3, seed=11, runs=6)
    finished = sum(trained(printed.read_text()) for printed in (parts / FOLDER).rglob("worker-*.log"))
    assert outcome(parts) == outcome(whole) and 6 <= finished <= 9
    both = [{one.run: one.search for one in load_records(folder)[0]} for folder in (whole, parts)]
    assert both[0] == both[1] and len(both[0]) == 6
