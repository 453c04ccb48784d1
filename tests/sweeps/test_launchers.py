"""Sweeps through any launcher of Hydra: the order of a search and several grids are peftbench's."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import peftbench.sweeps.hydra_launcher
from peftbench.cli.main import main
from peftbench.config.compose import compose_points
from peftbench.config.launchers import Ray, Slurm, read_launcher
from peftbench.config.schema import Run
from peftbench.sweeps.jobs import Ended
from tests.cli.test_train import records
from tests.project.test_readme import commands_of

SMOKE = ["task=doctopic", "debug=smoke", "trainer.max_steps=1", "task.max_train=8", "task.max_eval=8"]


def test_a_launcher_is_given_the_trials_first_and_all_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, int | None]] = []

    def attempt(run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        given.append((run.method, None if run.search is None else run.search.trial))
        return Ended()

    monkeypatch.setattr(peftbench.sweeps.hydra_launcher, "train_attempt", attempt)
    line = [
        "-m",
        *SMOKE,
        "seed=1,2",
        "method=head",
        "search=lr3",
        "and",
        "seed=3",
        "method=bitfit",
        "hydra/launcher=basic",
    ]
    assert main(["train", *line, f"output_dir={tmp_path}"]) == 1  # nothing was trained
    trials = [(method, trial) for method in ("head", "bitfit") for trial in (0, 1, 2)]
    assert given == [*trials, ("head", None), ("head", None), ("bitfit", None)]


@pytest.mark.parametrize("command", commands_of("docs/cluster.md"))
def test_the_commands_of_the_page_name_launchers_and_runs(command: str) -> None:
    words, launcher = read_launcher(shlex.split(command)[3:])
    assert isinstance(launcher, Slurm | Ray) and not [word for word in words if word.startswith("hydra")]
    assert compose_points(words, multirun=True)


@pytest.mark.slow
def test_a_search_through_a_launcher_is_the_search_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same runs with the same choice; the same line again trains nothing."""
    line = ["-m", *SMOKE, "method=bitfit,head", "search=lr3", "seed=1"]
    assert main(["train", *line, f"output_dir={tmp_path / 'plain'}"]) == 0
    through = ["train", *line, "hydra/launcher=basic", f"output_dir={tmp_path / 'launched'}"]
    assert main(through) == 0

    def found(name: str) -> dict[str, Any]:
        kept = ("status", "score", "search", "selection")
        return {record["run"]: [record[key] for key in kept] for record in records(tmp_path / name)}

    assert found("plain") == found("launched") and len(found("plain")) == 6
    capsys.readouterr()
    assert main(through) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 runs are done, 2 of them before." in printed and "train bitfit" not in printed
