"""A run's hash changes with what can change its result, and with nothing else."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from timeit import repeat

import pytest
from omegaconf import OmegaConf

from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run, to_plain
from peftbench.config.schema import (
    Composition,
    CompositionFunction,
    Device,
    Generation,
    Model,
    Modification,
    Run,
    Search,
    Sharding,
    Task,
    TaskKind,
    Trainer,
    Variation,
)
from peftbench.config.stamps import stamp_content
from peftbench.records.location import locate_run
from peftbench.utils.errors import UserError


def run(**changes: object) -> Run:
    config = Run(
        method="lora",
        bottleneck=16,
        model=Model(name="mini", hub_id="some/model"),
        task=Task(name="doctopic", kind=TaskKind.classification, metric="accuracy"),
        trainer=Trainer(learning_rate=1e-3),
    )
    for key, value in changes.items():
        *groups, leaf = key.split("__")
        node: object = config
        for group in groups:
            node = getattr(node, group)
        assert hasattr(node, leaf)
        setattr(node, leaf, value)
    return config


def test_the_folder_is_named_by_the_hash() -> None:
    assert re.fullmatch("[0-9a-f]{8}", hash_run(run()))
    assert locate_run(run(output_dir="runs")) == Path("runs/doctopic/mini/lora") / hash_run(run())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bottleneck", 8),
        ("seed", 43),
        ("composition_function", CompositionFunction(name=Composition.scaled, scale=4)),
        ("model__revision", "main"),
        ("task__max_train", 100),
        ("task__column_names", ["text", "label"]),
        ("task__delimiter", ";"),
        ("trainer__learning_rate", 2e-3),
        ("trainer__early_stopping", 3),
        ("trainer__class_weights", [1.0, 2.0]),
        ("debug", "smoke"),
    ],
)
def test_what_can_change_a_result_changes_the_hash(key: str, value: object) -> None:
    assert hash_run(run(**{key: value})) != hash_run(run())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", "/elsewhere"),
        ("rerun", True),
        ("mps", True),
        ("allow_unused", True),
        ("budget", "5%"),  # by then it has become bottlenecks
        ("budget_split", [9.0, 1.0]),
        ("sizes", {"a": 1}),
        ("size", {"mam": 2}),
        ("task__paper", {"epochs": 10}),
        ("model__architecture", {"model_type": "bart"}),
        ("trainer__device", Device.cpu),
        ("trainer__devices", "4"),
        ("trainer__sharding", Sharding.full),
        ("trainer__eval_batch_size", 1),
        ("task__generation", Generation()),  # a default that is spelled out
        ("trainer__epochs", 3),  # a whole number where the schema has 3.0
    ],
)
def test_what_cannot_change_a_result_keeps_the_hash(key: str, value: object) -> None:
    assert hash_run(run(**{key: value})) == hash_run(run())


def test_order_of_keys_is_no_matter() -> None:
    parts = {"a": run(), "b": run(bottleneck=3)}
    assert hash_run(run(mix=parts)) == hash_run(run(mix=dict(reversed(parts.items()))))


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("{mask}\n\n{source}", "43258bc0"),
        ("summarize: {source}", "6a512fb2"),
        ("a < b > c [x y] {source}", "97dca9d1"),
        ("<|im_start|>{source}", "1dbf402f"),
        ("{source}</s>", "4b070e51"),
        ("[SEP]{source}", "e6ad0fcc"),
    ],
)
def test_a_prompt_with_special_tokens_has_another_name_than_when_they_were_characters(prompt: str, before: str) -> None:
    special = any(token in prompt for token in ("<|im_start|>", "</s>", "[SEP]"))
    assert (hash_run(run(task__prompt=prompt)) != before) is special


def test_files_count_by_content(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.csv").write_text("a,b\n")
    one, two = (run(task__data_dir=str(tmp_path / name)) for name in ("one", "two"))
    before = hash_run(one)
    assert before == hash_run(two) == hash_run(run(task__data_dir=str(tmp_path / "one"), task__hub_id="overruled"))
    (tmp_path / "one" / "train.csv").write_text("a,c\n")
    assert hash_run(one) != before
    assert hash_run(run(task__data_files={"train": str(tmp_path / "one" / "train.csv")})) != hash_run(one)

    first, second = (run(model__path=str(tmp_path / name)) for name in ("one", "two"))
    assert len({hash_run(first), hash_run(second), hash_run(run())}) == 3


def test_several_files_of_a_split_count_in_their_order(tmp_path: Path) -> None:
    first, second = (str(tmp_path / name) for name in ("a.en", "a.de"))
    for file in (first, second):
        Path(file).write_text("the same\n")
    orders: list[object] = [first, [first, second], [second, first]]
    names = {hash_run(run(task__train_file=files)) for files in orders}
    assert len(names) == 3
    assert hash_run(run(task__train_file=[first])) == hash_run(run(task__train_file=first))


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a")
    before = stamp_content(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("x")
    assert stamp_content(tmp_path) == before


def test_runs_below_the_data_do_not_count(tmp_path: Path) -> None:
    """Otherwise the same line would name another run each time, and none would be gone on with."""
    (tmp_path / "train.csv").write_text("a,b\n")
    here = run(task__data_dir=str(tmp_path), output_dir=str(tmp_path / "outputs"))
    before = hash_run(here)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "record.json").write_text("{}")
    assert hash_run(here) == before
    there = run(task__data_dir=str(tmp_path), output_dir=str(tmp_path))
    others = hash_run(there)
    (tmp_path / "validation.csv").write_text("a,b\n")
    assert hash_run(here) != before and hash_run(there) != others


def test_a_missing_path_is_named() -> None:
    with pytest.raises(UserError, match="/nowhere does not exist"):
        hash_run(run(model__path="/nowhere"))


def nodes(config: object) -> object:
    """What OmegaConf makes of a config."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)


def test_a_run_in_plain_values_is_what_omegaconf_makes_of_it() -> None:
    """Enum members by their names, whole numbers where the schema has floats as floats, free keys as they are."""
    words = ["task=xsum", "method=mam", "search=lr3", "budget=5%", "budget_split=[9,1]", "debug=smoke"]
    composed = compose_run(words)
    whole = run(
        trainer__betas=[0, 1],
        trainer__epochs=3,
        dropout=1,
        budget_split=[9, 1],
        allow_unused=True,
        sizes={"a": [1, 2.0, None, {"b": True}]},
        search=Search("own", {"dropout": Variation(times=[1, 2]), "init": Variation(values=["bert", 0, 0.5])}),
        mix={"a": run(bottleneck=3), "b": Modification(composition_function=CompositionFunction(scale=4))},
    )
    for config in (composed, *composed.mix.values(), composed.trainer, whole, run()):
        assert json.dumps(to_plain(config)) == json.dumps(nodes(config))
    assert to_plain(run())["task"]["kind"] == "classification"


def test_a_run_is_named_quickly() -> None:
    """A sweep names each of its runs before the first one starts, and each run names itself in its record."""
    config = run(sizes={"a": 1})
    to_plain(config)
    slow, quick = (min(repeat(partial(function, config), number=1, repeat=3)) for function in (nodes, hash_run))
    assert quick < slow / 5
