"""A sweep with a search, of which all runs are done: nothing is trained, and no process is started for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.main import main
from peftbench.config.compose import compose_points
from peftbench.config.schema import Run
from peftbench.config.search import split_trials
from peftbench.config.stamps import stamp_content
from peftbench.records.choice import settle_search
from peftbench.records.location import locate_run
from peftbench.records.record import FILE, Record, find_record
from peftbench.records.run_files import CHECKPOINTS
from peftbench.sweeps.jobs import Ended
from peftbench.sweeps.plan import Sweep
from tests.config.test_search import ended

WORDS = ["method=lora,prefix", "search=lr3", "seed=1,2", "jobs=2"]


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """The words of a sweep of which every trial and every run is done, and noted."""
    words = [*WORDS, f"output_dir={tmp_path}"]
    trials, final = split_trials(compose_points(words, multirun=True))
    for _, run in trials:
        trial, search = settle_search(run)
        assert run.search is not None and run.search.trial is not None
        ended(trial, 50.0 + run.search.trial, search=search)
    for _, run in final:
        chosen, search = settle_search(run)
        if (record := find_record(locate_run(chosen))) is not None:
            replace(record, search=search).save()
        else:
            ended(chosen, 50.0, search=search)
    return words


@pytest.fixture
def attempted(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that this process is told to train; none is, and a worker is an error."""
    found: list[Run] = []

    def attempt(run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        found.append(run)
        return Ended()

    monkeypatch.setattr("peftbench.sweeps.sweeper.train_attempt", attempt)
    monkeypatch.setattr("peftbench.sweeps.sweeper.Workers", None)
    return found


def find_one(folder: Path, role: str, method: str = "prefix", seed: int = 2) -> Record:
    """Return the record of a run that has this role in the search."""
    found = (record for file in sorted(folder.rglob("record.json")) if (record := find_record(file.parent)) is not None)
    return next(r for r in found if r.search and (r.search.role, r.method, r.seed) == (role, method, seed))


def test_nothing_is_left_to_do(line: list[str], attempted: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", *line]) == 0
    assert not attempted
    assert "4 of 4 runs are done, 4 of them before." in " ".join(capsys.readouterr().out.split())


def test_only_a_choice_that_is_not_noted_is_noted_here(line: list[str], attempted: list[Run], tmp_path: Path) -> None:
    replace(find_one(tmp_path, "final"), search=None).save()  # as if it had been trained without the search
    assert main(["train", "-m", *line]) == 0
    assert [(run.method, run.seed) for run in attempted] == [("prefix", 2)]


@pytest.mark.parametrize("what", ["a checkpoint", "no record", "rerun", "no score", "speed"])
def test_a_run_with_something_to_compute_goes_to_a_worker(
    what: str, line: list[str], attempted: list[Run], tmp_path: Path
) -> None:
    trial = find_one(tmp_path, "trial", seed=1)
    if what == "a checkpoint":
        (trial.folder / CHECKPOINTS).mkdir()
    elif what == "no record":
        (trial.folder / FILE).unlink()
    elif what == "no score":
        replace(trial, selection=None).save()
    words = {"rerun": ["rerun=true"], "speed": ["speed=true"]}.get(what, [])
    with pytest.raises(TypeError, match="NoneType"):  # there are no workers here
        main(["train", "-m", *line, *words])
    assert not attempted


def test_a_trial_is_read_once_for_all_seeds(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def find(folder: Path) -> Record | None:
        read.append(folder)
        return find_record(folder)

    monkeypatch.setattr("peftbench.records.choice.find_record", find)
    trials, final = split_trials(compose_points(line, multirun=True))
    Sweep(final, line, trials)
    assert len(read) == len(set(read)) == len(trials) == 6


def test_what_a_trial_comes_to_later_is_read_later(line: list[str], tmp_path: Path) -> None:
    trials, final = split_trials(compose_points(line, multirun=True))
    trial = find_one(tmp_path, "trial", seed=1)
    (trial.folder / FILE).unlink()
    sweep = Sweep(final, line, trials)
    assert [member.comes_to.search is None for member in sweep.members] == [True, True, False, False]
    trial.save()
    sweep.settle()
    assert all(member.comes_to.search is None for member in sweep.members)


def test_a_file_is_hashed_once_for_all_names_of_a_look(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def stamp(path: str, *others: Any) -> str:
        hashed.append(path)
        return stamp_content(path, *others)

    monkeypatch.setattr("peftbench.records.choice.stamp_content", stamp)
    trials, final = split_trials(compose_points(line, multirun=True))
    sweep = Sweep(final, line, trials)
    assert len(hashed) == len(set(hashed)) == 1  # the folder of the backbone
    sweep.compared.look_anew()
    for member in sweep.members:
        sweep.compared.stamp(member.run.model.path)
    assert len(hashed) == 2
