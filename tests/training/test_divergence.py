"""A training that leaves the finite numbers: stopped, said, counted, and never a score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

import peftbench.train
from peftbench.cli.main import main
from peftbench.config.schema import Keep
from peftbench.modification.state import list_trained
from peftbench.records.record import Divergence
from peftbench.training.divergence import StopWhereDiverged
from peftbench.training.fit import Fitted
from tests.cli.test_train import records, sentiment, smoke
from tests.fitting import Targets, fitted, model_of, one_step

__all__ = ["sentiment", "smoke"]  # fixtures

TOO_LARGE = "trainer.learning_rate=1e30"


def strictly(text: str) -> Any:
    """The value of JSON that any program reads: without NaN."""
    return json.loads(text, parse_constant=pytest.fail)


@pytest.mark.slow
def test_a_sweep_with_a_run_that_diverges(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stops at the step at which it is seen; the other run is done, and it alone is shown as anything good."""
    folder = tmp_path / "outputs"
    settings = [*smoke, "trainer.max_steps=6", "method=lora", "trainer.warmup=0", "task.baselines=[]"]
    line = ["train", "-m", *settings, "trainer.learning_rate=1e30,1e-3", "seed=1,2"]
    assert main(line) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 of 4 runs are done. 2 diverged and have no score; rerun=true trains again" in told
    ended = {file: strictly(file.read_text()) for file in folder.rglob("record.json")}
    bad = {file: record for file, record in ended.items() if record["status"] == "diverged"}
    assert sorted(record["status"] for record in ended.values()) == ["diverged", "diverged", "done", "done"]
    for file, record in bad.items():
        assert record["trainer"]["learning_rate"] == 1e30
        assert record["diverged"] == {"what": "loss", "step": 2} and record["steps"] == 2
        assert record["score"] is None and record["scores"] == {} and record["selection"] is None
        assert sorted(path.name for path in file.parent.glob("[!.]*")) == [
            "config.yaml",
            "metrics.jsonl",
            "record.json",
        ]
        assert [strictly(row)["step"] for row in (file.parent / "metrics.jsonl").read_text().splitlines()] == [1, 2]

    assert main(line) == 0  # nothing of it is trained again
    assert " ".join(capsys.readouterr().out.split()).endswith(
        "2 diverged and have no score; rerun=true trains again what is done or diverged."
    )
    assert {file: strictly(file.read_text()) for file in ended} == ended
    file = next(iter(bad))
    assert main(["train", *settings, TOO_LARGE, f"seed={bad[file]['seed']}"]) == 0
    assert "This run diverged: the loss was not finite at step 2." in capsys.readouterr().out
    assert strictly(file.read_text())["created"] == bad[file]["created"]

    assert main(["status", str(folder)]) == 0
    assert "4 runs (debug=smoke): 2 done, 2 diverged" in capsys.readouterr().out
    for command in ("evaluate", "rescore"):
        assert main([command, str(file.parent)]) == 2
        assert "has a run that diverged (the loss was not finite at step 2)" in capsys.readouterr().err


def test_the_head_alone_makes_no_number_where_it_diverges(
    smoke: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really = peftbench.train._fit_model

    def fit(run: Any, backbone: Any, *rest: Any) -> Fitted:
        found = really(run, backbone, *rest)
        if "train the head alone" in rest:
            with torch.no_grad():
                next(iter(list_trained(backbone.model).values())).fill_(torch.inf)
        return found

    monkeypatch.setattr(peftbench.train, "_fit_model", fit)
    assert main(["train", *smoke, "method=lora", "task.baselines=[majority,head]"]) == 0
    (record,) = records(tmp_path / "outputs")
    assert record["status"] == "done" and set(record["baselines"]) == {"majority"} and "head" not in record["scores"]
    sentence = "The head alone diverged (the weights were not finite at step 2): there is no baseline of it."
    assert record["data"]["notes"][-1] == sentence and sentence in " ".join(capsys.readouterr().out.split())


class Poison(TrainerCallback):
    """Makes a weight NaN after a step, as an overflow in the optimiser would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(iter(list_trained(kwargs["model"]).values())).fill_(torch.nan)


def test_no_look_is_taken_at_weights_that_are_not_finite(tmp_path: Path) -> None:
    """The loss is logged at every fourth step; the look after the third finds it, and what was best before is none."""
    looks: list[float] = []

    def look() -> dict[str, float]:
        looks.append(1.0)
        return {"accuracy": 1.0}

    settings = one_step(max_steps=800, learning_rate=1e-3, keep=Keep.best, evaluate_every=1)
    found = fitted(
        model_of("roberta", "lora"),
        Targets("roberta"),
        settings,
        tmp_path,
        evaluate=look,
        metric="accuracy",
        callbacks=[Poison(3)],
    )
    assert found.diverged == Divergence("weights", 3) and found.steps == 3 and len(looks) == 2


def test_what_is_between_two_logged_steps_is_seen_at_the_next(tmp_path: Path) -> None:
    settings = one_step(max_steps=800, learning_rate=1e-3)
    found = fitted(model_of("bart", "lora"), Targets("bart"), settings, tmp_path, callbacks=[Poison(5)])
    assert found.diverged == Divergence("loss", 8) and found.steps == 8


def test_a_training_that_stays_finite_goes_on(tmp_path: Path) -> None:
    """Also with batches that have no target, whose loss would be 0 / 0."""
    for smoothing in (0.0, 0.1):
        settings = one_step(max_steps=6, learning_rate=1e-3, batch_size=2, label_smoothing=smoothing)
        found = fitted(model_of("bart", "lora"), Targets("bart", with_targets=2), settings, tmp_path)
        assert found.diverged is None and found.steps == 6


@pytest.mark.parametrize(
    ("logs", "scale", "stops"),
    [
        ({"loss": 1.0, "grad_norm": math.inf}, 65536.0, False),  # the step was skipped, and the scale is halved
        ({"loss": 1.0, "grad_norm": math.nan}, 2.0, False),
        ({"loss": 1.0, "grad_norm": math.inf}, 1.0, True),  # no scale helps
        ({"loss": math.nan, "grad_norm": math.nan}, 65536.0, True),  # the forward pass is not scaled
        ({"loss": 1.0, "grad_norm": 3.0}, 1.0, False),
    ],
)
def test_a_gradient_that_overflows_while_the_loss_scale_is_sought(
    logs: dict[str, float], scale: float, stops: bool
) -> None:
    watch, control = StopWhereDiverged(lambda: scale), TrainerControl()
    watch.on_log(None, TrainerState(global_step=7), control, logs)
    assert control.should_training_stop is stops
    assert (watch.found is not None) is stops
