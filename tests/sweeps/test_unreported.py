"""A trial of a search is scored on the selection split alone; what is chosen goes on from its adapter."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import peftbench.train
from peftbench.cli.evaluate import main as evaluate
from peftbench.cli.main import main
from peftbench.config.compose import compose_points, compose_run
from peftbench.config.identity import hash_run
from peftbench.config.schema import Reported, Run
from peftbench.config.search import build_trials, check_searches, is_unreported, split_trials
from peftbench.evaluation.evaluator import Evaluator
from peftbench.records.choice import settle_search
from peftbench.records.location import locate_run
from peftbench.records.noted import is_cleared, is_over, lacks_selection
from peftbench.records.record import Attempt, Divergence, Failure, Record, find_record, load_records
from peftbench.records.recording import start_record
from peftbench.records.run_files import clear_leftovers, has_leftovers
from peftbench.sweeps.plan import Member, Plan, PlannedRun, Sweep
from peftbench.sweeps.status import State, estimate_seconds_left, summarise_states
from peftbench.tables.claim_texts import describe_cost
from peftbench.utils.errors import UserError
from tests.config.test_search import ended, points, searching
from tests.sweeps.test_sweeper import outcome
from tests.tables.test_table import record

KEEP = Path(__file__).resolve().parents[2] / "scripts" / "keep_records.py"
WORDS = ["task=doctopic", "debug=smoke", "method=lora", "trainer.evaluate_every=2"]
SEARCH = [*WORDS, "search=lr3", "seed=1,2"]
STUDY = [*WORDS[:2], "task.baselines=[]", "search=optuna", "search.sampler=random", "search.trials=4"]


def read(folder: Path) -> dict[str, Record]:
    return {one.run: one for one in load_records(folder)[0]}


class Scorings:
    """The roles that were scored, each with the seed and the learning rate of the run; the next ones may raise."""

    def __init__(self, really: Callable[..., Any]) -> None:
        self.really, self.made, self.error = really, list[tuple[str, int, float]](), dict[str, BaseException]()

    def score(self, evaluator: Evaluator, role: str, *others: Any) -> Any:
        self.made.append((role, evaluator.run.seed, evaluator.run.trainer.learning_rate))
        if role in self.error:
            raise self.error.pop(role)
        return self.really(evaluator, role, *others)

    def list_reported(self) -> set[tuple[int, float]]:
        return {(seed, rate) for role, seed, rate in self.made if role == "report"}


@pytest.fixture
def scorings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scorings]:
    found = Scorings(Evaluator.score)
    monkeypatch.setattr(Evaluator, "score", lambda self, role, *others: found.score(self, role, *others))
    yield found


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The learning rates of the trainings so far."""
    really, rates = peftbench.train._fit_model, list[float]()

    def fit(run: Any, *others: Any) -> Any:
        rates.append(run.trainer.learning_rate)
        return really(run, *others)

    monkeypatch.setattr(peftbench.train, "_fit_model", fit)
    yield rates


def strip(one: Record) -> dict[str, Any]:
    """What a record says of a run, without times, and without what was typed."""
    times = ("created", "finished", "attempts", "timings", "tokens_per_s", "step_s", "tflops", "overrides")
    return {key: value for key, value in one.to_json().items() if key not in times}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "heads"),
    [
        (["task=doctopic", "task.baselines=[majority,head]", "trainer.keep=last"], 1),
        (["task=doctopic", "task.baselines=[majority,head]", "trainer.keep=best"], 1),
        (["task=docsum", "task.selection_metric=loss"], 0),
        (["task=docsum", "trainer.keep=best"], 0),
    ],
)
def test_the_chosen_run_is_as_if_it_had_been_trained_in_one_go(
    more: list[str], heads: int, tmp_path: Path, scorings: Scorings, trainings: list[float]
) -> None:
    """Of the others the report split is not read, and no baseline, of which a run of a task may train one."""
    line = ["train", "-m", *SEARCH[1:], *more]
    assert main([*line, f"output_dir={tmp_path / 'new'}"]) == 0
    new, (chosen,) = read(tmp_path / "new"), {rate for _, rate in scorings.list_reported()}
    assert scorings.list_reported() == {(1, chosen), (2, chosen)}
    assert len(trainings) == 4 + 2 * heads  # with the heads alone of the two that were chosen
    assert main([*line, "search.report=trials", f"output_dir={tmp_path / 'old'}"]) == 0
    old = read(tmp_path / "old")
    assert len(trainings) == 8 + 6 * heads and len(old) == 4 and {one.status for one in old.values()} == {"done"}
    results = [outcome(tmp_path / name) for name in ("new", "old")]
    for run, one in new.items():
        assert one.selection == old[run].selection
        if one.trainer["learning_rate"] == chosen:
            assert strip(one) == strip(old[run]) and results[0][run] == results[1][run]
            assert one.status == "done" and ("head" in one.baselines) is bool(heads)
        else:
            assert (one.status, one.score, one.baselines) == ("trained", None, {}) and one.unreported
            assert results[0][run][2:] != results[1][run][2:] and results[0][run][4] == results[1][run][4]
    (again,) = [one for one in new.values() if one.seed == 1 and one.status == "done"]
    assert len(again.attempts) == 2 and again.attempts[0].ended is not None
    assert again.timings["total_s"] >= again.timings["train_s"] + again.timings["evaluate_s"]

    scorings.made.clear()
    count = len(trainings)
    assert main([*line, f"output_dir={tmp_path / 'new'}"]) == 0 and len(trainings) == count and not scorings.made
    assert main([*line, "search.report=trials", f"output_dir={tmp_path / 'new'}"]) == 0
    assert len(trainings) == count + 2 * heads  # the heads alone: both trials go on from their adapters
    assert {run: strip(one) for run, one in read(tmp_path / "new").items()} == {
        run: strip(one) for run, one in old.items()
    }


@pytest.mark.slow
def test_what_was_chosen_stays_chosen_if_its_score_is_stopped_or_fails(
    tmp_path: Path, scorings: Scorings, trainings: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "-m", *WORDS, "task.baselines=[]", "search=lr3", "seed=1", f"output_dir={tmp_path}"]
    scorings.error["report"] = KeyboardInterrupt()
    assert main(line) == 130
    (stopped,) = [one for one in read(tmp_path).values() if one.status == "interrupted"]
    assert stopped.compared is not None and stopped.search is not None and stopped.search.role == "final"
    for _ in range(2):  # the second one is refused: it failed before
        scorings.error["report"] = RuntimeError("no memory")
        assert main(line) == 1
        failed = read(tmp_path)[stopped.run]
        assert failed.status == "failed" and failed.compared == stopped.compared
        assert "1 failed; retry=true trains failed ones again." in " ".join(capsys.readouterr().out.split())
    scorings.error.clear()
    assert main([*line, "retry=true"]) == 0
    assert len(trainings) == 3 and len(read(tmp_path)) == 3
    done = read(tmp_path)[stopped.run]
    assert done.status == "done" and done.score is not None and not done.unreported
    assert len(scorings.list_reported()) == 1


@pytest.mark.slow
def test_what_is_counted_of_a_run_does_not_depend_on_where_its_scoring_was_stopped(
    tmp_path: Path, scorings: Scorings, trainings: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["train", "-m", *WORDS, "task.baselines=[head]", "search=lr3", "seed=1", f"output_dir={tmp_path}"]
    really = peftbench.train._score_head_alone

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(peftbench.train, "_score_head_alone", stop)
    found = []
    for code in (130, 130, 0):
        if code == 0:
            monkeypatch.setattr(peftbench.train, "_score_head_alone", really)
        assert main(line) == code
        found += [one for one in read(tmp_path).values() if one.status in ("interrupted", "done")]
    assert len(found) == 3 and len({one.run for one in found}) == 1 and len(trainings) == 3 + 1
    first, second, done = (one.timings for one in found)
    assert first["select_s"] == second["select_s"] == done["select_s"] < first["evaluate_s"]
    assert first["earlier_s"] == second["earlier_s"]
    assert done["earlier_s"] == pytest.approx(first["earlier_s"], abs=0.002)  # which the head has no part in


@pytest.mark.slow
def test_a_trial_has_no_score_until_it_is_a_run_by_itself(
    tmp_path: Path, scorings: Scorings, trainings: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*WORDS, "task.baselines=[]", "seed=1", f"output_dir={tmp_path}"]
    assert main(["train", *line, "search=lr3", "search.trial=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "This trial is trained, with accuracy on validation " in said
    (trial,) = read(tmp_path).values()
    assert (trial.status, trial.score) == ("trained", None) and not scorings.list_reported()
    with pytest.raises(UserError, match="has a trial of a search, which is trained and has no score on the report sp"):
        evaluate([str(trial.folder)])
    assert main(["results", str(tmp_path), "trials=true"]) == 0
    assert f"{trial.selection.value:.2f}" in capsys.readouterr().out if trial.selection else False
    checkpoints = trial.folder / "checkpoints"
    (checkpoints / "train lora").mkdir()  # the process was killed before it deleted this
    assert main(["train", *line, "search=lr3", "search.trial=1"]) == 0 and len(trainings) == 1
    assert "This trial is trained already" in capsys.readouterr().out
    assert [file.name for file in checkpoints.iterdir()] == ["ended.json"]
    assert main(["train", *line, f"trainer.learning_rate={trial.trainer['learning_rate']}"]) == 0
    assert len(trainings) == 1
    (plain,) = read(tmp_path).values()
    assert plain.run == trial.run and plain.status == "done" and plain.search is None
    assert plain.selection == trial.selection and plain.score is not None  # it stays comparable as a trial


@pytest.mark.slow
def test_two_at_once_score_the_chosen_run_beside_the_other_seeds(tmp_path: Path) -> None:
    line = ["train", "-m", *SEARCH, "task.baselines=[]", "seed=1,2,3"]
    assert main([*line, "jobs=2", f"output_dir={tmp_path / 'beside'}"]) == 0
    assert main([*line, f"output_dir={tmp_path / 'alone'}"]) == 0
    assert outcome(tmp_path / "beside") == outcome(tmp_path / "alone")


@pytest.mark.slow
def test_records_go_on_elsewhere_and_the_chosen_run_alone_is_trained_again(
    tmp_path: Path, trainings: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "-m", *WORDS, "task.baselines=[]", "search=lr3"]
    first, kept, other = (tmp_path / name for name in ("first", "kept", "other"))
    for trial in range(3):
        assert main(["train", *line[2:], f"search.trial={trial}", "seed=1", f"output_dir={first}"]) == 0
    subprocess.run([sys.executable, KEEP, first, kept, "--shared", "/nowhere"], check=True)
    shutil.copytree(kept, other)
    assert {one.status for one in read(other).values()} == {"trained"} and len(read(other)) == 3
    capsys.readouterr()
    assert main([*line, "seed=1,2", f"output_dir={other}"]) == 0
    assert "it is trained again" in capsys.readouterr().out
    assert len(trainings) == 3 + 2 and trainings[3] == trainings[4]
    best = next(one for one in read(first).values() if one.trainer["learning_rate"] == trainings[3])
    assert best.selection is not None and best.selection.value is not None
    best.adapter_stamp, best.selection.value = (
        "another",
        best.selection.value + 1,
    )  # trained again by one that was killed
    best.save()
    assert main([*line, "seed=1,2", f"output_dir={first}"]) == 0 and len(trainings) == 5 + 1
    found = [
        {run: (one.status, one.scores, one.selection) for run, one in read(place).items()} for place in (first, other)
    ]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [["budget=2%"], []])
def test_a_study_scores_its_front_alone(
    budget: list[str], tmp_path: Path, scorings: Scorings, trainings: list[float]
) -> None:
    pytest.importorskip("optuna")
    line = ["train", "-m", *STUDY, *budget, "trainer.keep=last", "search.seed=42", "seed=42,1"]
    assert main([*line, f"output_dir={tmp_path / 'new'}"]) == 0
    new, count = read(tmp_path / "new"), len(trainings)
    reported = {seed for seed, _ in scorings.list_reported()}
    final = [one for one in new.values() if one.search is not None and one.search.role == "final"]
    trials = [one for one in new.values() if one.seed == 42]
    assert reported == {42, 1} and len(trials) == 4
    assert {one.status for one in final} == {"done"} and len([one for one in final if one.seed == 42]) < 4
    assert {one.status for one in trials if one not in final} == {"trained"}
    assert sum(role == "report" for role, *_ in scorings.made) == len(final)
    assert main([*line, f"output_dir={tmp_path / 'new'}"]) == 0 and len(trainings) == count
    assert main(["status", str(tmp_path / "new")]) == 0

    assert main([*line, "search.report=trials", f"output_dir={tmp_path / 'old'}"]) == 0
    old = read(tmp_path / "old")
    assert new.keys() == old.keys() and {one.status for one in old.values()} == {"done"}
    for one in final:
        # The study and what is typed are others, since `output_dir` is a part of neither.
        assert (one.scores, one.selection, one.search) == (
            old[one.run].scores,
            old[one.run].selection,
            old[one.run].search,
        )


def make_trials(run: Run, values: list[float], **changes: Any) -> list[Record]:
    """Write the records of trials that are trained and not scored."""
    found = []
    for trial, value in zip(build_trials(run), values, strict=True):
        ended(trial, value, status="trained", unreported=True)
        made = find_record(locate_run(trial))
        assert made is not None
        made.score, made.scores = None, {}
        made.save()
        found.append(made)
    return found


@pytest.mark.parametrize("status", ["trained", "running", "interrupted", "failed", "diverged"])
def test_a_choice_holds_whatever_becomes_of_the_chosen_run_later(status: Any, tmp_path: Path) -> None:
    run = searching(tmp_path)
    best = make_trials(run, [1.0, 3.0, 2.0])[1]
    best.status, best.error = status, Failure("OutOfMemoryError", "") if status == "failed" else None
    if status == "diverged":  # its score on the report split was not finite
        best.diverge(Divergence("score"))
    best.save()
    final, note = settle_search(run)
    assert final.trainer.learning_rate == 3e-4 and note is not None and note.selection is not None
    assert note.selection.value == 3.0 and not note.reported
    assert [(trial.value, trial.status) for trial in note.trials] == [(1.0, "done"), (3.0, "done"), (2.0, "done")]


def test_what_was_trained_by_itself_to_a_score_that_is_not_finite_is_compared_once_it_can_be(tmp_path: Path) -> None:
    run = searching(tmp_path)
    best = make_trials(run, [1.0, 3.0, 2.0])[1]
    best.status, best.selection = "diverged", None
    best.diverge(Divergence("score"))
    best.save()
    assert lacks_selection(best, True) and not lacks_selection(best, False)
    with pytest.raises(UserError, match="1 of 3 trials of method=mam on task=doctopic is not done"):
        settle_search(run)
    best.diverge(Divergence("weights", 4))
    best.save()
    assert not lacks_selection(best, True) and settle_search(run)[0].trainer.learning_rate == 3e-3


def test_a_trial_that_failed_before_it_was_trained_is_the_worst(tmp_path: Path) -> None:
    """Also if it has a selection score, as one whose baseline failed when trials were scored on the report split."""
    run = searching(tmp_path)
    best = make_trials(run, [1.0, 3.0, 2.0])[1]
    best.status, best.unreported, best.error = "failed", False, Failure("RuntimeError", "")
    best.save()
    assert settle_search(run)[0].trainer.learning_rate == 3e-3


def test_how_far_a_trial_goes_is_no_part_of_its_name() -> None:
    run = searching()
    assert run.search is not None
    other = replace(run, search=replace(run.search, report=Reported.trials))
    assert hash_run(run) == hash_run(other)
    trial = replace(run, search=replace(run.search, trial=0))
    assert is_unreported(trial) and not is_unreported(run) and trial.search is not None
    assert not is_unreported(replace(trial, search=replace(trial.search, report=Reported.trials)))
    study = replace(run, search=replace(run.search, trial=0, trials=4, seed=1))
    assert is_unreported(study) and not is_unreported(replace(study, seed=2))  # the point of a trial, with another seed
    with pytest.raises(UserError, match=r"search\.report=chosen,trials: a search has one choice"):
        check_searches(points("method=lora", "search=lr3", "search.report=chosen,trials"))


def test_a_trained_trial_is_over_as_a_trial_only(tmp_path: Path) -> None:
    """A task of Slurm that has trained a trial has ended; one that scores the same run has not."""
    run = searching(tmp_path)
    made = make_trials(run, [1.0, 3.0, 2.0])[0]
    assert run.search is not None
    trial = replace(run, search=replace(run.search, trial=0))
    assert is_over(trial, made) and not is_over(run, made) and not is_over(build_trials(run)[0], made)
    made.status = "failed"
    assert is_over(trial, made)


def test_a_trained_trial_keeps_what_it_goes_on_with_and_no_checkpoint(tmp_path: Path) -> None:
    made = make_trials(searching(tmp_path), [1.0, 3.0, 2.0])[0]
    checkpoints = made.folder / "checkpoints"
    for name in ("train mam", "report.partial"):
        (checkpoints / name).mkdir(parents=True)
    for name in ("ended.json", "trackers.json"):  # its training, and its runs in trackers
        (checkpoints / name).write_text("{}")
    assert not is_cleared(made) and has_leftovers(made.folder)
    made.status = "interrupted"
    assert is_cleared(made)  # when it was scored: it goes on from these
    made.status = "trained"
    clear_leftovers(made.folder, trained=True)
    assert is_cleared(made) and {file.name for file in checkpoints.iterdir()} == {"ended.json", "trackers.json"}
    clear_leftovers(made.folder)
    assert not has_leftovers(made.folder)


def test_a_trained_trial_is_counted_as_one_and_a_chosen_one_as_unscored() -> None:
    def make(status: Any, unreported: bool, seconds: float = 60.0, point: bool = True) -> State:
        made = record(None, status=status, unreported=unreported, timings={"total_s": seconds})
        return State(PlannedRun("lora", "lora", {}, unreported=point), made)

    trials = [make("trained", True), make("interrupted", True), make("failed", True)]
    assert [one.status for one in trials] == ["trained"] * 3 == [one.outcome for one in trials]
    assert summarise_states(trials) == "3 runs: 3 trained"
    chosen = make("trained", True, point=False)
    done = make("done", False, seconds=100.0, point=False)
    assert (chosen.status, chosen.outcome) == ("unscored", "unscored")
    assert estimate_seconds_left([*trials, chosen, done]) == pytest.approx(40)  # what the scoring of the other took
    missing = State(PlannedRun("lora", "lora", {}, unreported=True), None)
    assert estimate_seconds_left([*trials, missing, done]) == pytest.approx(60)
    assert State(PlannedRun("lora", "lora", {}), record(None, status="interrupted")).status == "interrupted"

    follows = State(PlannedRun("lora", "lora", {}, follows_trial=True), None)
    assert estimate_seconds_left([*trials, follows, done]) == pytest.approx(40)
    assert estimate_seconds_left([*trials, follows]) == 0  # how long the scoring takes is not known


def test_a_plan_knows_which_run_goes_on_from_a_trial_that_is_yet_to_be_chosen(tmp_path: Path) -> None:
    words = ["method=lora", "search=lr3", "seed=1,2", f"output_dir={tmp_path}"]
    trials, final = split_trials(compose_points(words, multirun=True))
    plan = Plan.of([Member(*point) for point in (*trials, *final)], words)
    assert [point.follows_trial for point in plan.points] == [False, False, False, True, False]


def test_a_sweep_of_trials_ends_once_they_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = searching(tmp_path)
    _, second, third = make_trials(run, [1.0, 3.0, 2.0])
    second.status = "failed"  # when it was to be scored
    second.save()
    assert run.search is not None
    trials = [replace(run, search=replace(run.search, trial=number)) for number in range(3)]
    sweep = Sweep([([f"search.trial={number}"], trial) for number, trial in enumerate(trials)], [])

    def show() -> tuple[int, str]:
        return sweep.show(), " ".join(capsys.readouterr().out.split())

    code, said = show()
    assert code == 0 and said.endswith(
        "0 of 3 runs are done. 3 are trained trials, without a score on the report split."
    )
    (third.folder / "record.json").unlink()
    code, said = show()
    assert code == 1 and "2 are trained trials, without a score on the report split. 1 unfinished; the same" in said
    sweep = Sweep([(["method=mam"], build_trials(run)[0])], [])  # what was trained as a trial is to be scored
    code, said = show()
    assert code == 1 and said.endswith("0 of 1 runs are done. 1 unfinished; the same line goes on with them.")
    assert "unscored" in said and "trained" not in said


def test_the_time_of_a_trial_is_counted_once_however_often_its_score_is_begun(tmp_path: Path) -> None:
    run = searching(tmp_path)
    trial = make_trials(run, [1.0, 3.0, 2.0])[0]
    trial.timings = {"evaluate_s": 2.0}
    trial.finish(reported=False)
    for _ in range(2):
        going_on = start_record(build_trials(run)[0], trial.folder, [])
        assert going_on.timings == {"select_s": 2.0}
        going_on.timings["evaluate_s"] = 2.0 + 5.0  # and is stopped while a baseline is trained
        going_on.interrupt()


def test_hours_count_the_training_of_a_trial_that_went_on() -> None:
    day = "2025-01-01T{}:00:00.000+00:00"
    first = Attempt(day.format("00"), "host", gpu="A", ended=day.format("02"))
    made = record(
        50.0,
        created=day.format("05"),
        finished=day.format("06"),
        device="H200",
        attempts=[first, Attempt(day.format("05"), "host", gpu="A")],
    )
    assert "3.0 h of H200" in describe_cost([made])
    killed = replace(first, ended=None)
    assert "1.0 h of H200" in describe_cost([replace(made, attempts=[killed, made.attempts[1]])])


def test_what_is_typed_says_of_which_runs_the_report_split_is_scored() -> None:
    run = compose_run(["task=doctopic", "search=lr3"])
    assert run.search is not None and run.search.report is Reported.chosen
