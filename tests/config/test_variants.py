"""Points that differ only in seeds, budgets and the trainer: composed once, and the same as by themselves."""

from __future__ import annotations

from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import peftbench.config.compose
from peftbench.config.compose import compose_points, compose_run
from peftbench.config.schema import Run, Trainer
from peftbench.utils.errors import UserError


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that OmegaConf makes of a whole config."""
    found: list[Run] = []

    def resolve(*arguments: Any) -> Run:
        found.append(really(*arguments))
        return found[-1]

    really = peftbench.config.compose.resolve_run
    monkeypatch.setattr("peftbench.config.compose.resolve_run", resolve)
    return found


def test_seeds_budgets_and_learning_rates_are_composed_once(resolved: list[Run]) -> None:
    words = ["method=lora,prefix", "budget=1%,5000", "trainer.learning_rate=1e-3,1", "trainer.schedule=cosine"]
    points = compose_points([*words, "trainer.graphs=auto,false", "seed=1,2,3"], multirun=True)
    assert len(points) == 48 and len(resolved) == 2
    assert [(run.seed, type(run.trainer.learning_rate)) for _, run in points[:2]] == [(1, float), (2, float)]
    assert all(compose_run(typed) == run for typed, run in points)


SETTINGS = {  # two values of each key of the trainer, neither of which is its default
    "learning_rate": "1,2e-3",
    "epochs": "1,2.5",
    "max_steps": "10,null",
    "batch_size": "4,8",
    "batch_tokens": "2048,4096",
    "accumulation": "2,4",
    "batching": "bucketed,random",
    "padding_free": "true,false",
    "micro_batch": "auto,4",
    "eval_batch_size": "8,16",
    "eval_batch_tokens": "2048,4096",
    "schedule": "cosine,constant",
    "warmup": "0,0.1",
    "weight_decay": "1,0.1",
    "max_grad_norm": "0,2",
    "label_smoothing": "0,0.1",
    "optimizer": "adafactor,sgd",
    "lora_plus": "4,2.5",
    "betas": "[0.9,0.99],[0.8,0.9]",
    "epsilon": "1e-6,1e-7",
    "keep": "best,last",
    "evaluate_every": "5,10",
    "early_stopping": "3,null",
    "class_weights": "balanced,null",
    "precision": "fp32,bf16",
    "gradient_checkpointing": "true,false",
    "compile": "layers,none",
    "graphs": "false,auto",
    "fused_loss": "false,true",
    "checkpoint_minutes": "1,2.5",
    "device": "cpu,auto",
    "sharding": "none,none",
    "devices": "auto,1",
}


def test_each_setting_of_the_trainer_is_read_as_in_a_whole_config(
    monkeypatch: pytest.MonkeyPatch, resolved: list[Run]
) -> None:
    assert set(SETTINGS) == {field.name for field in fields(Trainer)}
    words = ["method=lora", "task=rte"]  # whose steps are counted by epochs
    for key, values in SETTINGS.items():
        words += ["and", "trainer.keep=best", f"trainer.{key}={values}"]
    varied = compose_points(words, multirun=True)
    assert len(varied) == 1 + 2 * len(SETTINGS) and len(resolved) == 1 + len(SETTINGS) + 1  # lists are not varied
    monkeypatch.setattr("peftbench.config.compose.vary", lambda *arguments: None)
    assert [repr(run) for _, run in compose_points(words, multirun=True)] == [repr(run) for _, run in varied]
    assert len(resolved) == (2 + len(SETTINGS)) + len(varied)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output_dir: runs_${seed}", ["runs_1", "runs_2"]),
        ("output_dir: runs_${oc.select:seed,0}", ["runs_1", "runs_2"]),
        ("debug: seed\noutput_dir: runs_${${debug}}", ["runs_1", "runs_2"]),
        ("output_dir: runs_${oc.select:${oc.env:NOWHERE,seed}}", ["runs_1", "runs_2"]),
        ("trainer:\n  max_steps: ${..seed}\noutput_dir: runs_${trainer.max_steps}", ["runs_1", "runs_2"]),
        ("trainer:\n  max_steps: ${seed}\n  evaluate_every: ${.max_steps}", ["outputs", "outputs"]),
    ],
)
def test_what_a_file_makes_of_the_seed_is_made_for_each(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    points = compose_points(["experiment=mine", "seed=1,2"], multirun=True, config_dir=str(tmp_path))
    assert [run.output_dir for _, run in points] == expected
    if "max_steps" in text:
        assert [run.trainer.max_steps for _, run in points] == [1, 2]
        assert [run.trainer.evaluate_every for _, run in points] in ([1, 2], [points[0][1].trainer.evaluate_every] * 2)


def test_what_a_file_makes_of_a_setting_of_the_trainer_is_made_for_each(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text("defaults: [quick]\nevaluate_every: ${.max_steps}\n")
    words = ["trainer=mine", "trainer.max_steps=10,20", "trainer.keep=best"]
    points = compose_points(words, multirun=True, config_dir=str(tmp_path))
    assert [run.trainer.evaluate_every for _, run in points] == [10, 20]


def test_a_group_of_the_users_own_by_the_name_of_a_key_is_a_group(tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    for name, seed in (("one", 7), ("two", 8)):
        (tmp_path / "seed" / f"{name}.yaml").write_text(f"# @package _global_\nseed: 1{seed}\n")
    points = compose_points(["+seed=one,two"], multirun=True, config_dir=str(tmp_path))
    assert [run.seed for _, run in points] == [17, 18]


def test_all_faults_are_named_in_the_order_of_the_words() -> None:
    shared = ["method=lora", "trainer.max_steps=null", "budget=1%"]
    words = [*shared, "seed=1,x,-1", "trainer.epochs=1,0", "bottleneck=null,8"]
    with pytest.raises(UserError) as refused:
        compose_points(words, multirun=True)
    alone: dict[str, None] = {}
    for seed, epochs, size in product(("1", "x", "-1"), ("1", "0"), ("null", "8")):
        with pytest.raises(UserError) as one:
            compose_run([*shared, f"seed={seed}", f"trainer.epochs={epochs}", f"bottleneck={size}"])
        alone |= dict.fromkeys(one.value.faults)
    assert list(refused.value.faults) == list(alone) and len(alone) >= 5


def test_runs_share_nothing_that_a_sweep_changes() -> None:
    (_, one), (_, other) = compose_points(["seed=1,2"], multirun=True)
    one.trackers_group = "mine"
    assert other.trackers_group is None
