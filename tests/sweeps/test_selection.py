"""What chooses among states and runs never sees a score that is reported: keep=best, a search, a sweeper of Hydra's."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.main import main
from peftbench.records.choice import compute_objective
from peftbench.records.record import Selection
from peftbench.training.best import KeepBest
from tests.cli.test_train import SUBPROCESS, records

# A sweeper of Hydra's that writes what it is given of its runs to the file SPY.
SPY = """
import json, os
from pathlib import Path
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Spy(Sweeper):
    def __init__(self, direction):
        self.launcher = None

    def setup(self, *, hydra_context, task_function, config):
        plugins = Plugins.instance()
        self.launcher = plugins.instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        given = [self.launcher.launch([[*arguments, f"seed={seed}"]], initial_job_idx=seed) for seed in (1, 2)]
        Path(os.environ["SPY"]).write_text(json.dumps([run.return_value for (run,) in given]))

ConfigStore.instance().store(
    group="hydra/sweeper", name="spy", node={"_target_": "hydra_plugins.spy.Spy", "direction": "maximize"}
)
"""


@pytest.fixture
def sweeper(tmp_path: Path) -> dict[str, str]:
    """An environment in which Hydra has the sweeper `spy`."""
    folder = tmp_path / "plugins" / "hydra_plugins"
    folder.mkdir(parents=True)
    (folder / "spy.py").write_text(SPY)
    paths = [str(folder.parent), str(Path(__file__).parents[2])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SPY": str(tmp_path / "given.json")}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A short classification of sentences in files, of which `test.csv` is reported on."""
    for name, count in (("train", 24), ("validation", 16), ("test", 16)):
        labels = [int(i % 4 > 0 if name == "test" else i % 2) for i in range(count)]
        rows = [f"a {('dull', 'fine')[label]} film number {i} of {name},{label}" for i, label in enumerate(labels)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    files = [f"task.{name}_file={tmp_path / name}.csv" for name in ("train", "validation", "test")]
    steps = ["trainer.max_steps=3", "trainer.evaluate_every=1", "trainer.keep=best"]
    return ["task=text_classification", *files, "debug=smoke", "method=lora", *steps, f"output_dir={tmp_path / 'runs'}"]


def chosen(words: list[str], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """What a search and a sweeper come to, and the adapters of all runs."""
    words = [*words[:-1], f"output_dir={folder}"]
    assert main(["train", "search=lr3", "search.report=trials", "seed=1", *words]) == 0
    line = [*SUBPROCESS, "train", "-m", "hydra/sweeper=spy", *words]  # Hydra looks for plugins once in a process
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = records(folder)
    (final,) = (record for record in found if record["search"] and record["search"]["role"] == "final")
    trainings = {(r["trainer"]["learning_rate"], r["seed"]): r for r in found}
    return {
        "given": json.loads(Path(environment["SPY"]).read_text()),
        "said": done.stdout.count("The sweeper is given accuracy on validation, 16 examples: "),
        "search": [final["search"]["chosen"], final["search"]["selection"]],
        "trials": [trial["value"] for trial in final["search"]["trials"]],
        "selection": {str(key): record["selection"] for key, record in trainings.items()},
        "adapters": {
            (record["trainer"]["learning_rate"], record["seed"]): next(
                file.parent.joinpath("adapter").glob("*.safetensors")
            ).read_bytes()
            for file in folder.rglob("record.json")
            for record in [json.loads(file.read_text())]
        },
    }


@pytest.mark.slow
def test_no_choice_changes_with_what_is_reported(words: list[str], sweeper: dict[str, str], tmp_path: Path) -> None:
    """Where all labels of the report split are turned round, its scores are others, and nothing else is."""
    plain = chosen(words, sweeper, tmp_path / "plain")
    scores = {record["score"] for record in records(tmp_path / "plain")}
    file = tmp_path / "test.csv"
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *(f"{row[:-1]}{1 - int(row[-1])}" for row in rows)]) + "\n")
    poisoned = chosen(words, sweeper, tmp_path / "poisoned")
    assert {100 - record["score"] for record in records(tmp_path / "poisoned")} == scores and 50 not in scores
    assert poisoned == plain
    assert plain["said"] == 2 and all(0 <= value <= 100 for value in plain["given"])


def test_a_sweeper_that_would_look_for_the_worst_run_is_refused(
    words: list[str], sweeper: dict[str, str], tmp_path: Path
) -> None:
    line = [*SUBPROCESS, "train", "-m", "hydra/sweeper=spy", "hydra.sweeper.direction=minimize", *words]
    done = subprocess.run(line, env=sweeper, capture_output=True, text=True)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("peftbench: hydra.sweeper.direction=minimize: a sweeper is given the score on the selec")
    assert not list((tmp_path / "runs").rglob("record.json"))


@pytest.mark.parametrize(
    ("metric", "value", "given"), [("accuracy", 61.5, 61.5), ("loss", 0.25, -0.25), ("loss", None, -math.inf)]
)
def test_what_a_sweeper_is_given_is_better_when_higher(metric: str, value: float | None, given: float) -> None:
    """What failed or diverged is the worst, in a number: Optuna's sweeper ends where it is given NaN."""
    assert compute_objective(Selection("validation", 8, metric, value)) == given
    assert compute_objective(None) == -math.inf


def test_a_look_without_a_score_is_never_the_best() -> None:
    keeper = KeepBest("accuracy")

    class Model:
        def named_parameters(self) -> list[Any]:
            return []

        state_dict = named_parameters

    for step, value in enumerate((math.nan, 50.0, math.inf, 40.0)):
        state: Any = type("State", (), {"global_step": step})
        keeper.on_evaluate(None, state, None, {"eval_accuracy": value}, model=Model())  # type: ignore[arg-type]
    assert keeper.best == 50.0 and keeper.step == 3
