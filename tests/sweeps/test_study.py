"""Studies: runs that Optuna chooses one after another. A record of a made-up score takes the place of a training."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import Trial, TrialState

import peftbench.counts.resolve
import peftbench.records.record
import peftbench.sweeps.executors
import peftbench.sweeps.study_training
import peftbench.sweeps.sweeper
from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.config.schema import Run, Sampler
from peftbench.config.search import find_search_faults
from peftbench.config.studies import TrialOf
from peftbench.counts.solve import describe_counted
from peftbench.records.choice import settle_search
from peftbench.records.location import locate_run
from peftbench.records.record import (
    Divergence,
    Record,
    RecordedCounts,
    Score,
    Searched,
    Selection,
    find_record,
    load_records,
)
from peftbench.records.recording import start_record
from peftbench.sweeps.executors import InProcess
from peftbench.sweeps.jobs import Ended, Job, take_ready
from peftbench.sweeps.optuna_study import JudgedTrial, list_by_state, make_sampler, open_study, tell_diverged
from peftbench.sweeps.study import Study
from peftbench.sweeps.study_training import take_turns
from peftbench.tables.searches import find_studies
from peftbench.utils.errors import UserError

WORDS = ["task=doctopic", "debug=smoke", "search=optuna", "search.sampler=random"]


class Killed(BaseException):
    """Ends a study as SIGKILL does: nothing is noted."""


class Sealed(Record):
    """A record whose report must not be read."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("score", "scores", "baselines"):
            raise AssertionError(f"{name} was read before the end")
        return super().__getattribute__(name)


class Trainings:
    """Writes the record of each run: a selection score of its bottleneck, and a report score that says the opposite."""

    def __init__(self, sign: float = -1.0, killed_at: int | None = None, full_from: int = 99) -> None:
        self.sign, self.killed_at, self.full_from = sign, killed_at, full_from
        self.words: list[tuple[str, ...]] = []

    def __call__(self, run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        self.words.append(tuple(overrides))
        final, search = settle_search(run)
        record = start_record(final, locate_run(final), overrides)
        if len(self.words) == self.killed_at:
            raise Killed
        if len(self.words) >= self.full_from:
            record.interrupt()
            return Ended(faults=("No space left on device.",))
        size = final.bottleneck or 0
        value = 100.0 - abs(40 - size)
        record.search, record.counts = search, RecordedCounts(1000, size, size, 0, None)
        record.selection = Selection("validation", 16, "accuracy", value)
        record.score = self.sign * value
        record.scores["report"] = Score("test", 16, {"accuracy": record.score})
        record.finish()
        return Ended()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def begin(**settings: Any) -> Trainings:
        trainings = Trainings(**settings)
        monkeypatch.setattr(peftbench.sweeps.executors, "train_attempt", trainings)
        return trainings

    yield begin


def line(folder: Path, *more: str) -> list[str]:
    return ["train", "-m", *WORDS, *more, f"output_dir={folder}"]


@pytest.mark.parametrize("number", [2, pytest.param(14, marks=pytest.mark.slow)])  # the first 10 are random
def test_the_report_is_not_read_before_the_end(
    number: int, tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its score is in no decision: with other ones, the same runs are chosen. Then it is shown for the front."""
    really, mark = peftbench.records.record._read_record, peftbench.sweeps.study_training.mark_front

    def sealed(file: Path) -> Record:
        record = really(file)
        record.__class__ = Sealed
        return record

    def end(study: Study) -> list[Record]:
        monkeypatch.setattr(peftbench.records.record, "_read_record", really)
        return mark(study)

    found = []
    for sign in (-1.0, 2.0):
        monkeypatch.setattr(peftbench.records.record, "_read_record", sealed)
        monkeypatch.setattr(peftbench.sweeps.study_training, "mark_front", end)
        trainings = trained(sign=sign)
        assert main(line(tmp_path / str(sign), f"search.trials={number}", "search.sampler=tpe")) == 0
        found.append([[word for word in words if not word.startswith("output_dir")] for words in trainings.words])
        assert f"{number} of {number}: functional_form=" in capsys.readouterr().out
    assert found[0] == found[1] and len(found[0]) == number


def test_a_study_goes_on_as_if_it_had_not_been_killed(tmp_path: Path, trained: Any) -> None:
    """The trial in which it was killed is trained again, as the same run; no other is; more trials are more of it."""

    def strip(trainings: Trainings) -> list[list[str]]:
        return [[word for word in words if not word.startswith("output_dir")] for words in trainings.words]

    whole = trained()
    assert main(line(tmp_path / "whole", "search.trials=5")) == 0
    first = trained(killed_at=3)
    with pytest.raises(Killed):
        main(line(tmp_path / "parts", "search.trials=4"))
    second = trained()
    assert main(line(tmp_path / "parts", "search.trials=4")) == 0
    assert strip(first)[:2] + strip(second) == [
        [word.replace("trials=5", "trials=4") for word in words] for words in strip(whole)[:4]
    ]
    assert strip(first)[2] == strip(second)[0]
    third = trained()
    assert main(line(tmp_path / "parts", "search.trials=5")) == 0
    assert [words[-1] for words in strip(third)] == [strip(whole)[4][-1]]
    fourth = trained()
    assert main(line(tmp_path / "parts", "search.trials=5")) == 0 and not fourth.words
    assert len(load_records(tmp_path / "parts")[0]) == 5


def test_refused_points_cost_no_training_and_the_front_is_marked(
    tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings, gated = trained(), "composition_function=gated"  # which no sequential form can have
    assert main(line(tmp_path, "search.trials=4", gated)) == 0
    assert len(trainings.words) == 4
    words = [*WORDS, gated, f"output_dir={tmp_path}"]
    study = Study((words, compose_run(words)), [])
    refused = [trial for trial in list_by_state(study.optuna, "FAIL") if "reason" in trial.user_attrs]
    assert refused and study.count()["done"] == 4
    records = load_records(tmp_path)[0]
    assert len(records) == 4
    front = {
        record.run
        for record in records
        if record.selection is not None
        and record.counts is not None
        and not any(
            other.selection is not None
            and other.counts is not None
            and (other.selection.value, -other.counts.stored) > (record.selection.value, -record.counts.stored)
            and (other.selection.value or 0) >= (record.selection.value or 0)
            and other.counts.stored <= record.counts.stored
            for other in records
        )
    }
    assert {record.run for record in records if record.search is not None and record.search.role == "final"} == front
    assert main(["results", str(tmp_path), "--show", "method,searched"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("chosen: functional_form=") == len(front) and "trial: " not in printed
    assert any(row.rstrip().endswith(" reported") for row in printed.splitlines())  # the last column fits
    assert all(run in printed for run in front) and "4 done" in printed
    assert main(["status", str(tmp_path)]) == 0
    assert "4 runs (debug=smoke): 4 done" in capsys.readouterr().out


def test_with_a_budget_the_score_alone_counts_and_what_is_typed_is_given(tmp_path: Path, trained: Any) -> None:
    trainings = trained()
    assert main(line(tmp_path, "search.trials=3", "budget=2%", "insertion_form=parallel", "mix=[]")) == 0
    assert len(trainings.words) == 3
    for words in trainings.words:
        assert "insertion_form=parallel" in words and not any(word.startswith("bottleneck=") for word in words)
    (final,) = [one for one in load_records(tmp_path)[0] if one.search is not None and one.search.role == "final"]
    assert final.selection is not None
    assert final.selection.value == max(one.selection.value or 0 for one in load_records(tmp_path)[0] if one.selection)


def test_a_trial_that_is_worse_than_the_median_is_pruned(tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    study = open_study(file, "name", 1)
    for number in range(6):
        trial = study.ask()
        trial.report(50.0 + number, 10)
        study.tell(trial, 50.0 + number)
    good, bad = study.ask(), study.ask()
    assert not JudgedTrial(TrialOf(str(file), "name", good.number)).judge(10, 60.0)
    worse = JudgedTrial(TrialOf(str(file), "name", bad.number))
    assert not worse.judge(5, 1.0)  # no other has been looked at there
    assert worse.judge(10, 51.0)
    worse.prune()
    assert [trial.number for trial in list_by_state(study, "PRUNED")] == [bad.number]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["search.trials=0"], "search.trials=0: a study needs at least one trial."),
        (["search.minutes=0"], "search.minutes=0: give a number above 0, or null for no limit."),
        (["search.minutes=inf"], "search.minutes=inf: give a number above 0, or null for no limit."),
        (["search.keys.bottleneck.high=1"], "search=optuna: bottleneck: low must be less than high."),
        (["+search.keys={seed: {values: [1, 2]}}"], "search=optuna: seed cannot be searched over"),
        (["search.trials=null"], "search=optuna: functional_form"),
    ],
)
def test_what_is_refused(words: list[str], sentence: str) -> None:
    run = compose_run([*WORDS[:3], *words])
    assert any(fault.startswith(sentence) for fault in find_search_faults(run)), find_search_faults(run)


def test_the_names_of_other_searches_are_as_before() -> None:
    """The keys of studies are no part of the name of a run that waits for its trials."""
    assert hash_run(compose_run(["method=lora", "search=lr3", "seed=1"])) == "f5d8e4c6"


def test_a_half_written_line_of_a_journal_is_deleted(tmp_path: Path) -> None:
    """Optuna would append to it, and then read nothing any more."""
    file = tmp_path / "study.jsonl"
    study = open_study(file, "name", 1)
    study.tell(study.ask(), 1.0)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code": 4, "wor')
    study = open_study(file, "name", 1)
    study.tell(study.ask(), 2.0)
    assert file.read_bytes().startswith(whole) and len(open_study(file, "name", 1).trials) == 2


@pytest.mark.parametrize("harm", ["null", "{}", "x", '{"op_code": 99, "worker_id": "a"}', "[" * 10_000])
def test_a_damaged_journal_is_named(harm: str, tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    study = open_study(file, "name", 1)
    study.tell(study.ask(), 1.0)
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([first, harm, *others, ""]))
    with pytest.raises(UserError, match=r"study\.jsonl is damaged .* the study then begins anew"):
        open_study(file, "name", 1)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_process_that_dies_while_it_chooses_changes_nothing(
    at: int, tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after each attribute of a trial by which another process goes on with it."""

    def strip(trainings: Trainings) -> list[str]:
        return [" ".join(word for word in words if word.startswith(CHOSEN)) for words in trainings.words]

    whole = trained()
    assert main(line(tmp_path / "whole", "search.trials=3", "search.sampler=random")) == 0
    really, calls = Trial.set_user_attr, list[str]()

    def die(trial: Trial, key: str, value: Any) -> None:
        calls.append(key)
        if len(calls) == at:
            raise Killed
        really(trial, key, value)

    monkeypatch.setattr(Trial, "set_user_attr", die)
    first, second = trained(), trained()
    with pytest.raises(Killed):
        main(line(tmp_path / "parts", "search.trials=3", "search.sampler=random"))
    assert main(line(tmp_path / "parts", "search.trials=3", "search.sampler=random")) == 0
    assert strip(first) + strip(second) == strip(whole)
    assert len(load_records(tmp_path / "parts")[0]) == 3


def test_a_study_on_a_full_disk_goes_on_with_space(tmp_path: Path, trained: Any) -> None:
    full = trained(full_from=2)
    assert main(line(tmp_path, "search.trials=3")) == 1 and len(full.words) == 3
    again = trained()
    assert main(line(tmp_path, "search.trials=3")) == 0
    assert again.words == full.words[1:]


def test_a_trial_whose_record_is_lost_is_trained_again(tmp_path: Path, trained: Any) -> None:
    """The front would lack it without a word."""
    whole = trained()
    assert main(line(tmp_path, "search.trials=3")) == 0
    lost = sorted(tmp_path.rglob("record.json"))[1]
    before = lost.read_text()
    lost.write_text(before[:100])
    again = trained()
    assert main(line(tmp_path, "search.trials=3")) == 0
    assert len(again.words) == 1 and again.words[0] in whole.words and len(load_records(tmp_path)[0]) == 3


def test_half_files_that_killed_processes_have_left_are_deleted(tmp_path: Path, trained: Any) -> None:
    """In the folders of trials, also of those that are done, and beside the plan, which `status` reads."""
    trained()
    assert main(line(tmp_path, "search.trials=2")) == 0
    (plan,) = tmp_path.rglob("*.sweep.json")
    left = [file.with_name(f"{file.name}.0badcafe.tmp") for file in (*tmp_path.rglob("record.json"), plan)]
    assert len(left) == 3
    for file in left:
        file.write_text("{")
    again = trained()
    assert main(line(tmp_path, "search.trials=3")) == 0
    assert len(again.words) == 1 and not list(tmp_path.rglob("*.tmp"))


def test_a_lock_that_a_killed_process_has_left_is_no_obstacle(
    tmp_path: Path, trained: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Optuna's own waits for half a minute, and says so in its words."""
    trained()
    assert main(line(tmp_path, "search.trials=2")) == 0
    (journal,) = tmp_path.rglob("*.study.jsonl")
    Path(f"{journal}.lock").write_text("")
    again = trained()
    assert main(line(tmp_path, "search.trials=3")) == 0
    assert len(again.words) == 1 and "lock" not in capfd.readouterr().err


def test_a_record_that_cannot_be_written_again_is_told(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    assert main(line(tmp_path, "search.trials=3")) == 0
    lost = sorted(tmp_path.rglob("record.json"))[1]
    lost.unlink()
    lost.mkdir()
    failed = Ended(faults=(f"{lost}: Is a directory.",))
    monkeypatch.setattr(peftbench.sweeps.executors, "train_attempt", lambda *args, **others: failed)
    capsys.readouterr()
    assert main(line(tmp_path, "search.trials=3")) == 1
    printed = capsys.readouterr()
    assert "2 done, 1 unfinished" in printed.out and str(lost) in printed.err


def test_other_seeds_train_what_was_chosen(
    tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials have one seed; the best one's point has the others, and no other point has. Each point's budget is
    solved once, beside that of the line."""
    words = ["search.trials=3", "budget=2%", "seed=1,2,3", "search.seed=7"]
    trainings, solved, solve = trained(), Counter[str](), peftbench.counts.resolve.solve_budget

    def count(run: Run, **others: Any) -> Run:
        solved[describe_counted(run)] += 1
        return solve(run, **others)

    with monkeypatch.context() as patched:
        patched.setattr("peftbench.counts.resolve.solve_budget", count)
        assert main(line(tmp_path, *words)) == 0
    assert 0 < solved.total() <= 3 + 1
    assert len(trainings.words) == 6 and [word[-1] for word in trainings.words[3:]] == ["seed=1", "seed=2", "seed=3"]
    records = load_records(tmp_path)[0]
    final = [record for record in records if record.search is not None and record.search.role == "final"]
    trials = [record for record in records if record.seed == 7]
    assert sorted(record.seed for record in final) == [1, 2, 3, 7] and len({record.point for record in final}) == 1
    best = max(trials, key=lambda record: record.selection.value if record.selection else 0.0)
    for record in final:
        assert record.search is not None and record.search.seed == 7 and record.search.selection == best.selection
    assert len({record.search.study for record in records if record.search is not None}) == 1
    assert f"{best.run} with the seeds 1, 2, 3: accuracy" in capsys.readouterr().out
    assert main(["status", str(tmp_path)]) == 0
    assert "6 runs (debug=smoke): 6 done" in capsys.readouterr().out
    again = trained()
    assert main(line(tmp_path, *words)) == 0 and not again.words
    assert main(line(tmp_path, *words[1:], "search.trials=9")) == 0
    (point,) = {one.point for one in load_records(tmp_path)[0] if one.search and one.search.role == "final"}
    if point != best.point:  # the runs of the point that was the best of three are those of a trial now
        assert len(again.words) == 6 + 3
    assert len([one for one in load_records(tmp_path)[0] if one.search and one.search.role == "final"]) == 4


def test_no_trial_begins_when_the_time_is_up(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each training takes a minute of a made-up clock; the same line has as much time again."""
    trainings = trained()
    monkeypatch.setattr("peftbench.sweeps.study.monotonic", lambda: 60.0 * len(trainings.words))
    words = ["budget=2%", "search.trials=8", "search.seed=7", "seed=1,2"]
    for minutes, trials in (("2.5", 3), ("2", 5), ("100", 8)):
        assert main(line(tmp_path, *words, f"search.minutes={minutes}")) == 0
        ended = f"search.minutes={minutes} ended it after {trials} of 8 trials; the same line goes on."
        assert (ended in capsys.readouterr().out) == (trials < 8)
        records = [one for one in load_records(tmp_path)[0] if one.search is not None]
        assert sum(one.seed == 7 for one in records) == trials
        final = [one for one in records if one.search is not None and one.search.role == "final"]
        assert {one.seed for one in final} == {1, 2, 7} and len({one.point for one in final}) == 1
    assert len(list((tmp_path / ".sweeps").glob("*.study.jsonl"))) == 1


def test_points_that_differ_in_more_than_the_seed_are_studies_of_their_own(tmp_path: Path, trained: Any) -> None:
    trainings = trained()
    assert main(line(tmp_path, "search.trials=2", "budget=0.5%,2%", "seed=1,2")) == 0
    budgets = [next(word for word in words if word.startswith("budget=")) for words in trainings.words]
    assert budgets == ["budget=0.5%"] * 3 + ["budget=2%"] * 3
    assert len({one.search.study for one in load_records(tmp_path)[0] if one.search is not None}) == 2


def test_another_machine_goes_on_with_journal_and_records(tmp_path: Path, trained: Any) -> None:
    """Its paths are others. No trial is lost, and none is trained twice."""
    text = ["task=text_classification", "task.text_columns=[text]", "task.labels=[a,b]", "search.trials=5", "budget=2%"]
    for machine in ("one", "other"):
        (tmp_path / machine).mkdir()
        rows = "".join(f"word {index},{'ab'[index % 2]}\n" for index in range(40))
        (tmp_path / machine / "train.csv").write_text(f"text,label\n{rows}")

    def type_line(machine: str) -> list[str]:
        file = tmp_path / machine / "train.csv"
        more = [*text, f"task.train_file={file}", "seed=42,1"]
        return [word for word in line(tmp_path / machine / "runs", *more) if word != "task=doctopic"]

    first = trained(killed_at=4)
    with pytest.raises(Killed):
        main(type_line("one"))
    journal = next((tmp_path / "one").rglob("*.study.jsonl"))
    assert str(tmp_path) not in journal.read_text()
    for file in [journal, *(tmp_path / "one").rglob("record.json")]:
        if file.name != "record.json" or '"done"' in file.read_text():
            target = tmp_path / "other" / file.relative_to(tmp_path / "one")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    second = trained()
    assert main(type_line("other")) == 0
    chosen = [[word for word in words if str(tmp_path) not in word] for words in first.words + second.words]
    assert chosen[3] == chosen[4] and len(second.words) == 3 and second.words[-1][-1] == "seed=1"
    assert all(str(tmp_path / "one") not in word for words in second.words for word in words)
    assert len(load_records(tmp_path / "other")[0]) == 6


def test_a_run_that_another_search_has_stays_what_it_is(tmp_path: Path, trained: Any) -> None:
    """A run of lr3's choice that is also a trial of a study was marked as one, and no table had it any more."""
    trained()
    assert main(line(tmp_path, "search.trials=3", "budget=2%")) == 0
    records = load_records(tmp_path)[0]
    loser = next(one for one in records if one.search is not None and one.search.role == "trial")
    best = next(one for one in records if one.search is not None and one.search.role == "final")
    loser.search = Searched("lr3", "final", 42, {})
    loser.save()
    best.search = Searched("lr3", "trial", 42, {})
    best.save()
    assert main(line(tmp_path, "search.trials=3", "budget=2%")) == 0
    records = load_records(tmp_path)[0]
    by_run = {one.run: one.search for one in records}
    assert by_run[loser.run] == loser.search
    assert [len(one.trials) for one in find_studies(records, 10)] == [3]  # it was 2, and so never all
    found = by_run[best.run]
    assert found is not None and (found.name, found.role) == ("optuna", "final") and "functional_form" in found.chosen


def test_trials_are_counted_as_they_end(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two at once, the first to end was called the second."""

    class TwoAtOnce(InProcess):
        def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Ended]]:
            coming = iter(jobs)
            begun = list(islice(coming, 2))
            while begun:
                yield from super().run([begun.pop(0)])
                begun += islice(coming, 1)

    trained()
    monkeypatch.setattr(peftbench.sweeps.study_training, "InProcess", TwoAtOnce)
    assert main(line(tmp_path, "search.trials=3", "budget=2%")) == 0
    assert re.findall(r"^(\d of 3): functional", capsys.readouterr().out, re.M) == ["1 of 3", "2 of 3", "3 of 3"]


class AtOnce(InProcess):
    """Trains as many runs at once as there are places: the one that began first is the first to end."""

    def __init__(self, places: int) -> None:
        self.places, self.begun, self.at_work = places, list[Job](), list[int]()

    def run(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, Ended]]:
        coming, busy = iter(jobs), deque[Job]()
        while True:
            for job in take_ready(coming, self.places - len(busy)):
                busy.append(job)
                self.begun.append(job)
            if not busy:
                return
            self.at_work.append(len(busy))
            yield from super().run([busy.popleft()])


def test_studies_of_a_line_are_trained_side_by_side(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each was trained to its end before the next one began, and the places of its last trials were idle."""
    trained()
    executor = AtOnce(2)
    monkeypatch.setattr(peftbench.sweeps.study_training, "_start_executor", lambda *_: nullcontext(executor))
    small, large = ["budget=0.5%", "search.trials=2", "seed=1,2"], ["and", "budget=2%", "search.trials=4", "seed=1"]
    assert main(["train", "-m", "jobs=2", *WORDS, f"output_dir={tmp_path}", *small, *large]) == 0
    order = [("small" if job.run.budget == "0.5%" else "large") + str(job.run.seed) for job in executor.begun]
    # The small one's chosen run with seed 2 follows its second trial, between trials of the large one.
    assert order == ["small1", "large1", "small1", "large1", "small2", "large1", "large1"]
    assert executor.at_work == [2] * 6 + [1]
    printed = capsys.readouterr().out
    labels = "budget=0.5% search.trials=2", "budget=2% search.trials=4"
    lines = re.findall(rf"^({'|'.join(map(re.escape, labels))}), (\d of \d(?: chosen)?): ", printed, re.M)
    assert [count for label, count in lines if label == labels[0]] == ["1 of 2", "2 of 2", "1 of 1 chosen"]
    assert [count for label, count in lines if label == labels[1]] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    tables = printed[printed.index(f"\n{labels[0]}\n") :]
    assert tables.count("search=optuna: ") == 2 and f"\n{labels[1]}\n" in tables
    assert main(["train", "-m", "jobs=2", *WORDS, f"output_dir={tmp_path}", *small, *large]) == 0
    assert len(executor.begun) == len(order)


def test_studies_are_told_apart_by_what_was_typed_for_each(
    tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where they are trained one after the other. The first has no word of its own."""
    trained()
    words = ["search.trials=1", "budget=2%", f"output_dir={tmp_path}", "and", "trainer.warmup=0.1"]
    assert main(["train", "-m", *WORDS, *words]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(.*)1 of 1: functional", printed, re.M) == ["", "trainer.warmup=0.1, "]
    assert "\ntrainer.warmup=0.1\n" in printed


def test_streams_take_turns() -> None:
    """Where one has nothing now the next one is asked; None comes where all that are left have nothing."""
    one, other = [1, None, None, 2], ["a", "b", None, "c"]
    assert list(take_turns([iter(one), iter(other), iter([])])) == [1, "a", "b", None, 2, "c"]
    assert list(take_turns([iter([None, 1])])) == [None, 1] and not list(take_turns([]))


def test_a_trial_that_another_study_has_trained_again_is_one_of_both(tmp_path: Path, trained: Any) -> None:
    trained()
    for sampler in (1, 2):
        assert main(line(tmp_path, "search.trials=3", "budget=2%", f"search.sampler_seed={sampler}")) == 0
    first, second = (one for one in {one.search.study for one in load_records(tmp_path)[0] if one.search} if one)
    record = next(one for one in load_records(tmp_path)[0] if one.search is not None and one.search.study == first)
    assert record.search is not None
    record.search.pruned, record.status = True, "interrupted"
    record.save()
    final, _ = settle_search(compose_run(record.overrides))
    again = start_record(final, record.folder, record.overrides)
    again.search = replace(record.search, study=second)
    again.save()
    counts = {one.name: len(one.trials) for one in find_studies(load_records(tmp_path)[0], 10)}
    assert counts == {first: 3, second: 4}


def test_grids_without_a_study_are_a_sweep_before_it(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = trained()
    monkeypatch.setattr(peftbench.sweeps.sweeper, "train_attempt", trainings)
    words = ["train", "-m", "task=doctopic", "debug=smoke", f"output_dir={tmp_path}", "method=lora,prefix", "seed=1"]
    assert main([*words, "and", "method=mam", "search=optuna", "search.trials=2", "budget=2%"]) == 0
    assert len(trainings.words) == 4
    assert ["method=lora" in words for words in trainings.words] == [True, False, False, False]
    assert "2 of 2 runs are done" in capsys.readouterr().out


@pytest.mark.parametrize("budget", [["budget=2%"], []])
def test_a_trial_that_diverged_is_a_bad_one_and_no_failure(
    budget: list[str], tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Optuna is given no score for it, so that none can be shown, and it is never the best."""
    trainings = trained()

    def diverge(run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        ended = trainings(run, overrides, **others)
        record = find_record(locate_run(settle_search(run)[0]))
        assert record is not None
        if len(trainings.words) == 2:
            record.diverge(Divergence("loss", 3))
            record.finish()
        return ended

    monkeypatch.setattr(peftbench.sweeps.executors, "train_attempt", diverge)
    assert main(line(tmp_path, "search.trials=3", *budget)) == 0
    printed = capsys.readouterr().out
    assert "2 done, 1 diverged" in printed and "2 of 3: " in printed and ": diverged: step 3" in printed
    (journal,) = tmp_path.rglob("*.study.jsonl")
    study = open_study(journal, journal.name.partition(".")[0], 1 if budget else 2)
    (bad,) = list_by_state(study, "PRUNED")  # of which TPE learns; it ignores what failed
    assert bad.values is None and not [one for one in list_by_state(study, "FAIL") if "folder" in one.user_attrs]
    (record,) = [one for one in load_records(tmp_path)[0] if one.status == "diverged"]
    assert record.search is not None and (record.search.role, record.search.pruned) == ("trial", False)
    again = trained()
    assert main(line(tmp_path, "search.trials=3", *budget)) == 0 and not again.words
    assert "2 done, 1 diverged" in capsys.readouterr().out


@pytest.mark.parametrize("budget", [["budget=2%"], []])
def test_a_score_on_the_report_split_that_is_not_finite_decides_nothing(
    budget: list[str], tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = []
    for place, diverging in (("finite", False), ("not", True)):
        trainings = trained()

        def diverge(
            run: Run, overrides: Sequence[str], trainings: Any = trainings, diverging: bool = diverging, **others: Any
        ) -> Ended:
            ended = trainings(run, overrides, **others)
            record = find_record(locate_run(settle_search(run)[0]))
            assert record is not None
            if diverging:
                record.diverge(Divergence("score", 4))
                record.finish()
            return ended

        monkeypatch.setattr(peftbench.sweeps.executors, "train_attempt", diverge)
        assert main(line(tmp_path / place, "search.trials=3", *budget)) == 0
        assert "3 done; " in capsys.readouterr().out
        records = load_records(tmp_path / place)[0]
        assert {one.status for one in records} == {"diverged" if diverging else "done"}
        final = [one for one in records if one.search is not None and one.search.role == "final"]
        chosen.append({one.run: one.search and one.search.selection for one in final})
    assert chosen[0] == chosen[1] and len(chosen[0]) > 0


SPACE = {"rate": FloatDistribution(1e-5, 1e-1, log=True)}


def propose(objectives: int, edge: float, tell: Callable[[Any, int], None], folder: Path) -> tuple[float, list[Any]]:
    """Return the share of the last 20 of 40 trials that diverge, as all above a rate do; up to it, scores grow."""
    study, search = open_study(folder / "study.jsonl", "name", objectives), compose_run(WORDS).search
    assert search is not None
    search.sampler, samplers, diverged = Sampler.tpe, [], []
    for number in range(40):
        study.sampler = make_sampler(search, study, number, 0)
        samplers.append(study.sampler)
        trial = study.ask(SPACE)
        diverged.append(trial.params["rate"] > edge)
        if diverged[-1]:
            tell(study, trial.number)
        else:
            study.tell(trial, [math.log10(trial.params["rate"]), 1000.0][:objectives])
    return fmean(diverged[20:]), samplers


@pytest.mark.parametrize("objectives", [1, 2])
def test_tpe_leaves_the_region_in_which_trials_diverge(objectives: int, tmp_path: Path) -> None:
    def tell_failed(study: Any, number: int) -> None:
        study.tell(number, state=TrialState.FAIL)

    shares = []
    for name, tell in (("failed", tell_failed), ("diverged", tell_diverged)):
        (tmp_path / name).mkdir()
        shares.append(propose(objectives, 1e-3, tell, tmp_path / name)[0])
    assert shares[0] > 0.9 and shares[1] < 0.7


@pytest.mark.parametrize("objectives", [1, 2])
def test_where_nearly_all_trials_diverge_tpe_takes_none_of_them_for_good(objectives: int, tmp_path: Path) -> None:
    """To TPE the best tenth are good ones, whatever they are."""
    share, samplers = propose(objectives, 1e-9, tell_diverged, tmp_path)
    assert share == 1 and {type(one).__name__ for one in samplers[1:]} == {"RandomSampler"}


def test_tpe_goes_on_near_the_good_trials_where_it_repeats_itself(tmp_path: Path) -> None:
    """Two thirds of a study's trials were random: every other suggestion after one that the study had."""
    study, search = open_study(tmp_path / "study.jsonl", "name", 1), compose_run(WORDS).search
    assert search is not None
    search.sampler = Sampler.tpe
    space = {name: CategoricalDistribution([str(number) for number in range(5)]) for name in "abcd"}
    scores: dict[tuple[str, ...], float] = {}
    asked = in_vain = 0
    while len(scores) < 120:
        study.sampler = make_sampler(search, study, asked, in_vain)
        asked += 1
        trial = study.ask(space)
        point = tuple(trial.params.values())
        if point in scores:
            in_vain += 1
            study.tell(trial, state=TrialState.FAIL)
            continue
        in_vain, scores[point] = 0, float(sum(map(int, point)))
        study.tell(trial, scores[point])
    best = sum(score >= 14 for score in scores.values())  # of 625 points, 15 are; it found 4 to 7
    assert best >= 10, f"{best} of 15, {asked} asked"


@pytest.mark.parametrize(("sampler", "random"), [("tpe", [21, 23]), ("nsgaii", [1, 3, 19, 21, 23])])
def test_after_many_repeats_every_other_suggestion_is_random(sampler: str, random: list[int], tmp_path: Path) -> None:
    study, search = open_study(tmp_path / "study.jsonl", "name", 1), compose_run(WORDS).search
    assert search is not None
    search.sampler = Sampler[sampler]
    found = [count for count in (0, 1, 2, 3, 19, 20, 21, 23) if is_random(make_sampler(search, study, 50, count))]
    assert found == random


def is_random(sampler: Any) -> bool:
    return type(sampler).__name__ == "RandomSampler"


def test_a_pruned_trial_is_told_from_a_stopped_one(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = trained()

    def prune(run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        if len(trainings.words) != 1:
            return trainings(run, overrides, **others)
        trainings.words.append(tuple(overrides))
        final, search = settle_search(run)
        record = start_record(final, locate_run(final), overrides)
        record.search = search
        record.interrupt()
        assert others["trial"] is not None
        JudgedTrial(others["trial"]).prune()
        return Ended(pruned=True)

    monkeypatch.setattr(peftbench.sweeps.executors, "train_attempt", prune)
    assert main(line(tmp_path, "search.trials=3", "budget=2%")) == 0 and len(trainings.words) == 3
    pruned = [one for one in load_records(tmp_path)[0] if one.search is not None and one.search.pruned]
    assert [one.status for one in pruned] == ["interrupted"]


CHOSEN = ("functional_form=", "modified_representation=", "mix=", "bottleneck=", "trainer.learning_rate=")
