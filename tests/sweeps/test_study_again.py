"""What a line trains again in a study: failed trials with `retry=true`, and what else the study lacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import peftbench.sweeps.executors
from peftbench.cli.main import main
from peftbench.config.compose import compose_points
from peftbench.config.schema import Run
from peftbench.records.choice import settle_search
from peftbench.records.location import locate_run
from peftbench.records.record import Divergence, Failure, Record, find_record, load_records
from peftbench.records.recording import start_record
from peftbench.sweeps.jobs import Ended
from peftbench.sweeps.optuna_study import list_by_state
from peftbench.sweeps.resolve import resolve_points
from peftbench.sweeps.study import Study
from peftbench.sweeps.study_trials import choose_trials
from peftbench.tables.searches import find_studies
from tests.own_parts import importable
from tests.sweeps.test_study import WORDS, Killed, Trainings, line

Train = Callable[..., int]


class Failing(Trainings):
    """Trainings of which some fail, or are killed; a failed one is refused unless `retry=true`, as `train` does."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.failing: set[int] = set()

    def __call__(self, run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        before = find_record(locate_run(settle_search(run)[0]))
        if before is not None and before.status == "failed" and not run.retry:
            return Ended(faults=("This run failed before; retry=true trains it again.",))
        ended = super().__call__(run, overrides, **others)
        if len(self.words) in self.failing:
            self._fail(run, overrides)
        return ended

    def _fail(self, run: Run, overrides: Sequence[str]) -> None:
        final, search = settle_search(run)
        record = start_record(final, locate_run(final), overrides)
        record.search, record.status, record.error = search, "failed", Failure("OutOfMemoryError", "CUDA out of memory")
        record.save()


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[list[str]]]]:
    """Type the line of a study of three trials; return its exit code and what was trained."""

    def type_line(folder: Path, *words: str, failing: Sequence[int] = (), killed_at: int = 0) -> Any:
        trainings = Failing(killed_at=killed_at)
        trainings.failing = set(failing)
        monkeypatch.setattr(peftbench.sweeps.executors, "train_attempt", trainings)
        try:
            code = main(line(folder, "search.trials=3", *words))
        except Killed:
            code = -1
        kept = re.compile(r"(?!output_dir|retry|rerun|search)")
        return code, [[word for word in trained if kept.match(word)] for trained in trainings.words]

    return type_line


def open_again(folder: Path, *words: str) -> Study:
    typed = [*WORDS, "search.trials=3", *words, f"output_dir={folder}"]
    (point,) = resolve_points(compose_points(typed), {})
    return Study(point, [])


@pytest.mark.parametrize("budget", [["budget=2%"], []])
def test_failed_trials_are_trained_again(
    budget: list[str], tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes of it is as if they had not failed, and further trials are too."""
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    assert train(whole, *budget)[0] == 0
    code, first = train(failed, *budget, failing=[2, 3])
    assert code == 1
    printed = capsys.readouterr().out
    assert "1 done, 2 failed;" in printed and "\nretry=true trains the failed ones again.\n" in printed
    assert train(failed, *budget) == (1, [])
    assert main(["status", str(failed)]) == 1
    capsys.readouterr()
    assert train(failed, *budget, "retry=true") == (0, first[1:])
    printed = capsys.readouterr().out
    assert "3 done;" in printed and "failed" not in printed
    assert re.findall(r"^(\d of 3): functional", printed, re.M) == ["3 of 3", "3 of 3"]
    assert main(["status", str(failed)]) == 0
    assert "3 runs (debug=smoke): 3 done" in capsys.readouterr().out
    assert train(failed, *budget, "retry=true") == (0, [])

    study = open_again(failed, *budget)
    assert len(list_by_state(study.optuna, "COMPLETE")) == 3 and study.count() == {"done": 3}
    further = [train(folder, *budget, "search.trials=5")[1] for folder in (whole, failed)]
    assert further[0] == further[1] and len(further[0]) == 2
    assert summarise(whole) == summarise(failed)


def summarise(folder: Path) -> list[Any]:
    """What the records of a study's trials say, its front, and what `peftbench claims --searches` counts."""
    records = load_records(folder)[0]
    said = sorted((one.run, one.status, one.search.role if one.search else "", str(one.selection)) for one in records)
    (found,) = find_studies(records, 10)
    return [said, len(found.trials), found.wanted, [one.first.run for one in found.leaders]]


def test_a_trial_that_fails_again_is_left(tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "budget=2%", failing=[1])[0] == 1
    for _ in range(2):
        capsys.readouterr()
        code, trained = train(tmp_path, "budget=2%", "retry=true", failing=[1])
        assert code == 1 and len(trained) == 1 and "2 done, 1 failed;" in capsys.readouterr().out
    # A trial of a killed line that fails is not tried again by the same line.
    assert train(tmp_path, "budget=2%", "search.trials=4", killed_at=1)[0] == -1
    code, trained = train(tmp_path, "budget=2%", "search.trials=4", "retry=true", failing=[1, 2])
    assert code == 1 and len(trained) == 2


@pytest.mark.parametrize("words", [[], ["retry=true"]])
def test_a_study_that_was_killed_while_it_retried_goes_on(words: list[str], tmp_path: Path, train: Any) -> None:
    """The trial that was begun is finished also without `retry=true`; the other one is not begun without it."""
    _, first = train(tmp_path, "budget=2%", failing=[1, 2])
    assert train(tmp_path, "budget=2%", "retry=true", killed_at=1) == (-1, first[:1])
    code, trained = train(tmp_path, "budget=2%", *words)
    assert (code, trained) == ((0, first[:2]) if words else (1, first[:1]))
    assert open_again(tmp_path, "budget=2%").count() == ({"done": 3} if words else {"done": 2, "failed": 1})


def test_a_process_that_died_before_a_retry_began_leaves_a_failed_trial(tmp_path: Path, train: Any) -> None:
    _, first = train(tmp_path, "budget=2%", failing=[1])
    next(choose_trials(open_again(tmp_path, "budget=2%", "retry=true")))
    assert train(tmp_path, "budget=2%") == (1, [])
    assert open_again(tmp_path, "budget=2%").count() == {"done": 2, "failed": 1}
    assert train(tmp_path, "budget=2%", "retry=true") == (0, first[:1])


def test_two_processes_try_a_trial_again_once(tmp_path: Path, train: Any) -> None:
    train(tmp_path, "budget=2%", failing=[1, 2])
    one, other = (choose_trials(open_again(tmp_path, "budget=2%", "retry=true")) for _ in range(2))
    numbers = [next(one).number, next(other).number, next(one).number]
    assert numbers == [4, 4, 5] and not list(other)


def test_a_diverged_trial_is_not_trained_again(tmp_path: Path, train: Any) -> None:
    train(tmp_path, "budget=2%", failing=[1])
    (failed,) = (one for one in load_records(tmp_path)[0] if one.status == "failed")
    failed.error = None
    failed.diverge(Divergence("loss", 3))
    failed.finish()  # earlier versions told Optuna of a failure
    assert train(tmp_path, "budget=2%", "retry=true") == (0, [])


def test_no_retry_begins_when_the_time_is_up(tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "budget=2%", failing=[1])
    monkeypatch.setattr(Study, "is_time_up", True)
    assert train(tmp_path, "budget=2%", "retry=true", "search.minutes=1") == (1, [])


PASSING = """
from pathlib import Path
from transformers import TrainerCallback

class Crowded(TrainerCallback):
    def on_train_begin(self, args, state, control, **others):
        if Path(r"{}").exists():
            raise MemoryError
"""


@pytest.mark.parametrize("words", [[], pytest.param(["jobs=2"], marks=pytest.mark.slow)])
def test_trainings_that_failed_for_a_passing_reason_are_done(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    crowd, outputs = tmp_path / "crowd", tmp_path / "outputs"
    (tmp_path / "passing.py").write_text(PASSING.format(crowd))
    more = ["search.trials=2", "budget=2%", "callbacks=[passing.Crowded]", "task.baselines=[]", *words]
    with importable(monkeypatch, tmp_path):
        crowd.touch()
        assert main(line(outputs, *more)) == 1
        assert "2 failed; the best under the budget is 0 of them." in " ".join(capsys.readouterr().out.split())
        crowd.unlink()
        assert main(line(outputs, *more)) == 1
        assert main(line(outputs, *more, "retry=true")) == 0
    ended = sorted((one.status, len(one.attempts)) for one in load_records(outputs)[0])
    assert ended == [("done", 3), ("trained", 2)]


def read_by_run(folder: Path) -> dict[str, Record]:
    return {one.run: one for one in load_records(folder)[0]}


def test_a_finished_study_is_scored_and_measured_as_it_is_typed_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No trial is trained again for `search.report=trials` or `speed=true`."""
    words = ["search.trials=2", "budget=2%", "task.baselines=[]"]
    assert main(line(tmp_path, *words)) == 0
    before = read_by_run(tmp_path)
    assert sorted(one.status for one in before.values()) == ["done", "trained"]
    for more in (["search.report=trials"], ["search.report=trials", "speed=true"]):
        assert main(line(tmp_path, *words, *more)) == 0
        assert main(["status", str(tmp_path)]) == 0
        assert "2 runs (debug=smoke): 2 done" in capsys.readouterr().out
    after = read_by_run(tmp_path)
    best = next(run for run, one in before.items() if one.status == "done")
    assert {one.status for one in after.values()} == {"done"}
    assert [run for run, one in after.items() if one.speed is not None] == [best]
    assert {run: (one.adapter_stamp, one.selection) for run, one in after.items()} == {
        run: (one.adapter_stamp, one.selection) for run, one in before.items()
    }


def test_rerun_says_how_trials_are_trained_again(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, first = train(tmp_path, "rerun=true")
    assert code == 0 and len(first) == 3 and "does not train again" not in capsys.readouterr().out
    assert train(tmp_path, "rerun=true") == (0, [])
    (journal,) = tmp_path.rglob("*.study.jsonl")
    said = f"rerun=true does not train again what the study has; delete {journal}, and it begins anew."
    assert said in capsys.readouterr().out.splitlines()
    journal.unlink()
    assert train(tmp_path, "rerun=true") == (0, first)
