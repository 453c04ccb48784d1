"""The order of a sweep's runs side by side: no worker waits while anything can be trained.

The workers are fakes whose runs take the times that a test gives them, on a clock that only they move.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftbench.cli.main import main
from peftbench.config.schema import Run
from peftbench.config.search import is_unreported
from peftbench.records.choice import settle_search, try_settle
from peftbench.records.location import locate_run
from peftbench.records.record import Record, find_record, load_records
from peftbench.sweeps.jobs import Ended, Job
from peftbench.sweeps.plan import FOLDER
from tests.sweeps.fake_trainings import HIGHER, INSIDE, WORDS, Trainings, finals, train

Took = Callable[[str], float]  # how long a run takes, by its method, seed and learning rate


class Machine:
    """Takes the place of the processes of `Workers`. `begun` and `ended` have the time of each run."""

    def __init__(self, trainings: Trainings, took: Took) -> None:
        self.trainings, self.took, self.now = trainings, took, 0.0
        self.at_work: dict[Connection, tuple[float, int, str, Job]] = {}
        self.begun: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.order: list[str] = []
        self.busy: set[str] = set()  # runs that another process is at, until they are waited for
        self.waited: list[str] = []
        self.number = itertools.count()

    def begin(self, pipe: Connection, job: Job) -> None:
        name = _name(job.run)
        assert job.folder not in [other.folder for _, _, _, other in self.at_work.values()], "two are at one run"
        plan = json.loads(next((Path(job.run.output_dir) / FOLDER).glob("*.json")).read_text())
        assert str(job.folder.relative_to(job.run.output_dir)) in [point["folder"] for point in plan["points"]]
        self.order.append(name)
        self.begun.setdefault(name, self.now)
        self.at_work[pipe] = (self.now + self.took(name), next(self.number), name, job)

    def attempt(self, run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        """Train a run as `Trainings` does; a trial has no reported score, until it is chosen."""
        number = len(self.trainings.done)
        ended = self.trainings.attempt(run, overrides)
        record = find_record(locate_run(try_settle(run)))
        if record is None or record.selection is None or record.selection.value is None:
            return ended
        if not is_unreported(run):
            replace(record, status="done", unreported=False, score=90.0 - record.selection.value).save()
        elif len(self.trainings.done) > number:
            replace(record, status="trained", unreported=True, score=None, scores={}).save()
        return ended

    def wait(self, pipes: Sequence[Connection]) -> list[Connection]:
        pipe = min(pipes, key=lambda one: self.at_work[one][:2])
        self.now = self.at_work[pipe][0]
        return [pipe]

    def end(self, pipe: Connection) -> Ended:
        _, _, name, job = self.at_work.pop(pipe)
        if job.wait:
            self.waited.append(name)
        elif name in self.busy:
            return Ended(faults=("another process is at it",), busy=True)
        self.ended[name] = self.now
        return self.attempt(job.run, job.overrides)


class Worker:
    """One fake process."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.process = machine, None
        self.pipe, self.theirs = Pipe()

    def start(self) -> None: ...

    def admit(self, works: bool) -> None: ...

    def give(self, job: Job) -> None:
        self.machine.begin(self.pipe, job)

    def take(self) -> Ended:
        return self.machine.end(self.pipe)


def _name(run: Run) -> str:
    final, search = settle_search(run)
    trial = "" if search is None or search.role == "final" else " trial"
    return f"{final.method} {final.seed} {final.trainer.learning_rate:g}{trial}"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Every run takes 1, unless the test says otherwise; lora's search goes up as often as it may."""
    trainings = Trainings({"lora": HIGHER, "head": INSIDE})
    made = Machine(trainings, lambda name: 1)
    monkeypatch.setattr("peftbench.sweeps.sweeper.train_attempt", made.attempt)
    monkeypatch.setattr("peftbench.sweeps.workers._Worker", lambda *_: Worker(made))
    monkeypatch.setattr("peftbench.sweeps.workers.connection", SimpleNamespace(wait=made.wait))
    return made


def by_times(times: dict[str, float]) -> Took:
    return lambda name: next((took for start, took in times.items() if name.startswith(start)), 1)


def by_letters(name: str) -> float:
    return 1 + sum(map(ord, name)) % 7


def test_a_run_starts_while_a_trial_of_another_row_is_trained(tmp_path: Path, machine: Machine) -> None:
    machine.took = by_times({"lora 2 0.001 trial": 10})
    assert train(tmp_path, "method=lora,head", "jobs=2") == 0
    assert [machine.begun[f"head {seed} 0.001"] for seed in (2, 1)] == [5, 6]
    assert machine.ended["lora 2 0.001 trial"] == 10
    assert machine.order[:6] == [
        *("lora 2 0.001 trial", "lora 2 0.0003 trial", "lora 2 0.003 trial"),
        *("head 2 0.001 trial", "head 2 0.0003 trial", "head 2 0.003 trial"),
    ]
    assert machine.begun["lora 1 0.003"] == machine.begun["lora 2 0.003"] == 10  # both workers were asked again


def test_further_trials_go_before_runs(tmp_path: Path, machine: Machine) -> None:
    """Both can start when lora's last trial ends, while head's runs have begun."""
    machine.took = by_times({"lora 2 0.003 trial": 2.5})
    assert train(tmp_path, "method=head,lora", "seed=2,1,3,4,5", "search.extend=2", "jobs=2") == 0
    started = machine.order.index("lora 2 0.01 trial")
    assert machine.order[started - 1].startswith("head") and machine.order[started - 1].endswith("0.001")
    assert machine.begun["lora 2 0.01 trial"] == machine.ended["lora 2 0.003 trial"]  # before head's other seeds
    assert machine.begun["head 5 0.001"] > machine.begun["lora 2 0.01 trial"]
    assert finals(tmp_path)["lora"] == [f"0.03 {seed}" for seed in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("words", [[], ["rerun=true"]])
def test_no_search_is_settled_before_its_trials_have_ended(words: list[str], tmp_path: Path, machine: Machine) -> None:
    """Also where all records are there already and are out of date."""
    if words:
        assert train(tmp_path, "method=lora,head", "search.extend=2") == 0
        machine.trainings.done.clear()
        machine.trainings.scores["lora"] = {**HIGHER, 1e-2: 0.5}
    machine.took = by_letters
    assert train(tmp_path, "method=lora,head", "search.extend=2", "jobs=3", *words) == 0
    for method in ("lora", "head"):
        trials = [end for name, end in machine.ended.items() if name.startswith(method) and name.endswith("trial")]
        own = [at for name, at in machine.begun.items() if name.startswith(method) and not name.endswith("trial")]
        assert own and max(trials) <= min(own)
    assert finals(tmp_path)["lora"] == [f"{0.003 if words else 0.03} {seed}" for seed in (1, 2)]
    trained = machine.trainings.done
    assert len(trained) == len(set(trained)) == 2 * (3 + 1) + (1 if words else 2)


def test_runs_side_by_side_leave_the_records_of_one_after_another(tmp_path: Path, machine: Machine) -> None:
    machine.took = by_letters
    words = ["method=lora,head", "search.extend=2"]
    assert train(tmp_path / "beside", *words, "jobs=3") == 0
    beside = machine.trainings.done
    machine.trainings.done = []
    assert train(tmp_path / "alone", *words) == 0
    assert sorted(beside) == sorted(machine.trainings.done)
    assert _outline(tmp_path / "beside") == _outline(tmp_path / "alone")


def _outline(folder: Path) -> dict[str, Any]:
    return {one.run: (one.search, one.status, one.score) for one in load_records(folder)[0]}


def test_the_counter_goes_up_to_what_is_known(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "method=lora", "search.extend=1", "jobs=2") == 0
    printed = capsys.readouterr().out
    assert "5 runs, 2 at once; what they print is in " in printed
    lines = re.findall(r"^(\d+ of \d+): (.*): accuracy", printed, flags=re.MULTILINE)
    assert lines == [
        ("1 of 5", "seed=2 search.trial=0"),
        ("2 of 5", "seed=2 search.trial=1"),
        ("3 of 6", "seed=2 search.trial=2"),  # after which a further trial is due
        ("4 of 6", "seed=2 search.trial=3"),
        ("5 of 6", "seed=2"),
        ("6 of 6", "seed=1"),
    ]


def test_runs_of_another_process_come_last_and_hold_up_nothing_else(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.busy = {"lora 2 0.001 trial", "head 1 0.001"}
    assert train(tmp_path, "method=lora,head", "jobs=2") == 0
    assert machine.waited == ["lora 2 0.001 trial", "head 1 0.001"]
    others = [name for name in machine.order if name.startswith(("head", "lora 2 0.0003", "lora 2 0.003 trial"))]
    waited = machine.order.index("lora 2 0.001 trial", 1)
    assert waited == len(set(others)) + 1 and set(machine.order[waited + 2 :]) == {"lora 1 0.003", "lora 2 0.003"}
    printed = capsys.readouterr().out
    assert printed.count("waiting for the other process: ") == 2
    lines = [tuple(map(int, pair)) for pair in re.findall(r"^(\d+) of (\d+): ", printed, flags=re.MULTILINE)]
    assert lines == [(number, 10) for number in range(1, 11)]


def test_two_trials_with_one_folder_are_never_trained_at_once(tmp_path: Path, machine: Machine) -> None:
    """Which the fake workers check."""
    machine.trainings.scores["lora"] |= {1e-4: 0.0}
    words = [*WORDS, f"output_dir={tmp_path}", "method=lora", "jobs=4", "and", "search=lr5"]
    assert main(["train", "-m", *words]) == 0
    trained = machine.trainings.done
    assert len(trained) == len(set(trained)) == 5 + 2
    assert len(machine.order) == 3 + 5 + 2 * 2


def test_where_all_trials_failed_a_sentence_says_so_and_the_others_go_on(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.trainings.scores["lora"] = {1e-3: "MemoryError", 3e-4: None, 3e-3: "MemoryError"}
    assert train(tmp_path, "method=lora,head", "jobs=2") == 1
    printed = capsys.readouterr()
    assert printed.err.count("all 3 trials of method=lora on task=doctopic failed or diverged") == 2  # for each seed
    assert finals(tmp_path) == {"head": ["0.001 1", "0.001 2"]}
    assert re.findall(r"^(\d+ of \d+): ", printed.out, flags=re.MULTILINE)[-1] == "8 of 8"


@pytest.mark.parametrize("number", (0, 4, 7, 8))
def test_a_sweep_that_was_stopped_trains_nothing_twice(
    number: int, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(worker: Worker) -> Ended:
        if len(machine.ended) == number:
            raise KeyboardInterrupt
        return machine.end(worker.pipe)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "take", take)
        assert train(tmp_path, "method=lora,head", "search.extend=1", "jobs=3") == 130
    machine.at_work.clear()
    assert train(tmp_path, "method=lora,head", "search.extend=1", "jobs=3") == 0
    trained = machine.trainings.done
    assert len(trained) == len(set(trained)) == 3 + 4 + 2
    assert finals(tmp_path) == {"lora": ["0.01 1", "0.01 2"], "head": ["0.001 1", "0.001 2"]}


def test_where_a_trial_is_tried_again_the_table_has_the_new_choice(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.trainings.scores["lora"] = {**HIGHER, 3e-3: "MemoryError"}
    assert train(tmp_path, "method=lora", "jobs=2") == 0
    machine.trainings.scores["lora"] = HIGHER
    for _ in range(2):
        capsys.readouterr()
        assert train(tmp_path, "method=lora", "jobs=2", "retry=true") == 0
        printed = " ".join(capsys.readouterr().out.split())
        # The reported score of a rate of 0.003 is 88, that of 0.001 89.
        assert printed.count(" 88.00 ") == 2 and " 89.00 " not in printed


def test_what_is_read_grows_with_the_runs_and_not_faster(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def find(folder: Path) -> Record | None:
        read.append(folder)
        return find_record(folder)

    for module in ("records.choice", "sweeps.left", "sweeps.superseded", "sweeps.sweeper"):
        monkeypatch.setattr(f"peftbench.{module}.find_record", find)
    numbers = []
    for rows in (4, 8):
        folder, steps = tmp_path / str(rows), ",".join(map(str, range(1, rows + 1)))
        read.clear()
        assert train(folder, "method=head", f"trainer.max_steps={steps}", "jobs=2") == 0
        numbers.append(len(read))
        assert len(load_records(folder)[0]) == 4 * rows
    assert numbers[1] <= 2.1 * numbers[0], numbers
