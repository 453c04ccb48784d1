"""Several grids are one sweep: `peftbench train -m method=full and method=lora,prefix budget=3%`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

import peftbench.config.compose
import peftbench.sweeps.sweeper
from peftbench.cli.main import main
from peftbench.config.compose import _split_grids, compose_points, compose_run
from peftbench.config.conf_sources import compose_alone
from peftbench.config.schema import Run
from peftbench.config.search import check_searches
from peftbench.sweeps.workers import Ended
from peftbench.utils.differences import find_distinctive
from peftbench.utils.errors import UserError
from tests.cli.test_train import records, sentiment, smoke

__all__ = ["sentiment", "smoke"]  # fixtures


def test_each_grid_is_the_first_one_with_other_words() -> None:
    words = ["seed=1,2", "method=full", "and", "method=lora", "budget=3%"]
    found = compose_points(words, multirun=True)
    assert [overrides for overrides, _ in found] == [
        ["seed=1", "method=full"],
        ["seed=2", "method=full"],
        ["seed=1", "method=lora", "budget=3%"],
        ["seed=2", "method=lora", "budget=3%"],
    ]
    runs = [(run.seed, run.method, run.budget) for _, run in found]
    assert runs == [(1, "full", None), (2, "full", None), (1, "lora", "3%"), (2, "lora", "3%")]


def test_a_word_takes_the_place_of_that_of_the_same_key() -> None:
    words = ["seed=1,2", "+task.data_files.train=a", "bottleneck=4", "and", "task.data_files.train=b", "seed=3"]
    grids = _split_grids(words)
    assert grids == [words[:3], ["bottleneck=4", *words[4:]]]
    assert _split_grids(["seed=1", "and", "seed=2", "and", "method=full"]) == [
        ["seed=1"],
        ["seed=2"],
        ["seed=1", "method=full"],
    ]
    assert _split_grids([]) == [[]]


def test_the_number_of_runs_at_once_is_that_of_the_whole_sweep() -> None:
    expected = [["seed=1", "jobs=2"], ["seed=2", "jobs=2"]]
    assert _split_grids(["seed=1", "and", "seed=2", "jobs=2"]) == expected
    assert _split_grids(["seed=1", "jobs=2", "and", "seed=2", "jobs=2"]) == expected
    with pytest.raises(UserError, match=r"^jobs=2, jobs=3: a sweep has one value of jobs"):
        _split_grids(["seed=1", "jobs=2", "and", "seed=2", "jobs=3"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=full", "and", "method=lora"], "and joins grids into a sweep; add -m to run it."),
        (
            ["-m", "method=full", "and"],
            "and must be between two grids, as in -m method=full and method=lora,mam budget=1%.",
        ),
        (["-m", "and", "method=full"], "and must be between two grids"),
        (["-m", "method=full", "and", "and", "method=lora"], "and must be between two grids"),
        (["-m", "method=full", "and", "method=lroa"], "method=lroa is unknown; did you mean lora?"),
        (["-m", "seed=1", "and", "seed=2", "hydra/sweeper=basic"], "hydra/sweeper= takes one grid and not several"),
    ],
)
def test_what_is_refused(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_all_grids_are_trained_as_one_sweep(
    smoke: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run after the other, with one plan and one table; whoever trains them."""
    trained: list[tuple[str, str | None]] = []

    def attempt(run: Run, overrides: Sequence[str], **_: Any) -> Ended:
        trained.append((run.method, run.budget))
        return Ended()

    monkeypatch.setattr(peftbench.sweeps.sweeper, "train_attempt", attempt)
    assert main(["train", "-m", *smoke, "method=full", "and", "method=prefix,lora", "budget=3%"]) == 1
    assert trained == [("full", None), ("prefix", "3%"), ("lora", "3%")]
    assert "0 of 3 runs are done. 3 unfinished" in capsys.readouterr().out
    assert len(list((tmp_path / "outputs").rglob("*.sweep.json"))) == 1


@pytest.mark.parametrize("several", [True, False])
def test_grids_on_several_tasks_are_named_before_they_are_trained(
    several: bool, smoke: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task behind `and` may have been meant for all grids."""
    monkeypatch.setattr(peftbench.sweeps.sweeper, "train_attempt", lambda *_, **__: Ended())
    grids = ["method=full", "and", "method=lora,prefix"]
    main(["train", "-m", *smoke, *grids, *(["task=docsum"] if several else [])])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("This sweep goes over")]
    expected = (
        'This sweep goes over sst2 with mini (1 run), docsum with mini (2 runs). What follows "and" belongs to that '
        "grid; what all share comes first."
    )
    assert told == ([expected] if several else [])


def test_grids_in_several_folders_are_named_before_they_are_trained(
    smoke: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first grid's runs would be in outputs, where nobody looks for them."""
    monkeypatch.setattr(peftbench.sweeps.sweeper, "train_attempt", lambda *_, **__: Ended())
    one, other = tmp_path / "one", tmp_path / "other"
    main(["train", "-m", *smoke, f"output_dir={one}", "method=full", "and", "method=lora", f"output_dir={other}"])
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("This sweep goes over")]
    assert told.startswith(f"This sweep goes over sst2 with mini in {one} (1 run), sst2 with mini in {other} (1 run). ")


def test_each_grid_may_have_a_value_of_its_own_around_which_is_searched() -> None:
    """That is no sweep over what the search chooses, which stays refused."""
    rates = ["trainer.learning_rate=1e-4", "and", "method=lora", "trainer.learning_rate=1e-3"]
    points = compose_points(["search=lr3", "method=full", *rates], multirun=True)
    check_searches(points)
    assert [run.trainer.learning_rate for _, run in points] == [1e-4, 1e-3]
    rates[-1] += ",1e-2"
    points = compose_points(["search=lr3", "method=full", *rates], multirun=True)
    with pytest.raises(UserError, match=r"trainer\.learning_rate is swept and is chosen by search=lr3"):
        check_searches(points)


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["task=rte task.data_dir=a seed=1", "task=mnli task.data_dir=null task.train_file=b seed=2"],
         ["task", "seed"]),
        (["task=rte task.data_dir=a", "task=rte task.data_dir=b"], ["task.data_dir"]),
        (["task=rte task.data_dir=a", "task=mnli task.data_dir=b", "task=mnli task.data_dir=c"],
         ["task", "task.data_dir"]),
        (["search.trial=0 method=lora", "search.trial=1 method=mam"], ["search.trial", "method"]),
        (["method=full", "method=mam budget=6%"], ["method", "budget"]),
        (["seed=1"], []),
    ],
)  # fmt: skip
def test_what_goes_with_the_task_tells_no_runs_apart(words: list[str], keys: list[str]) -> None:
    """The columns of `peftbench status`: paths that each task has one of would fill it."""
    assert find_distinctive([dict(word.split("=") for word in line.split()) for line in words]) == keys


@pytest.mark.slow
def test_grids_side_by_side_with_a_search(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run has its own size, and each method its own trials."""
    words = [*smoke, "jobs=2", "search=lr3", "method=head", "and", "method=lora", "budget=1%"]
    assert main(["train", "-m", *words]) == 0
    assert "2 of 2 runs are done" in capsys.readouterr().out
    found = records(tmp_path / "outputs")
    assert sorted((record["method"], record["budget"]) for record in found) == 3 * [("head", None)] + 3 * [
        ("lora", "1%")
    ]


@pytest.mark.slow
def test_the_same_choices_are_composed_once_and_leave_nothing_to_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[Sequence[str]] = []

    def counted(groups: Sequence[str]) -> DictConfig:
        composed.append(groups)
        return compose_alone(groups)

    monkeypatch.setattr("peftbench.config.compose.compose_alone", counted)
    peftbench.config.compose._compose_packaged.cache_clear()
    words = ["method=lora,mam", "seed=1,2", "modified_representation.layers=[0],[1,2]", "task.baselines=[],[majority]"]
    points = compose_points(words, multirun=True)
    assert len(points) == 16 and len(composed) == 2
    assert all(compose_run(typed) == run for typed, run in points)
