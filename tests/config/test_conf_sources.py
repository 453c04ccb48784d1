"""What a run is composed from: quick readings that come to what Hydra and OmegaConf read."""

from __future__ import annotations

import pickle
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import peftbench.config.compose
from peftbench.config.compose import compose_run
from peftbench.config.conf_sources import CONFIG_NAME, _read, compose_alone, open_hydra
from peftbench.config.identity import to_plain
from peftbench.config.rows import GROUP, read_rows
from peftbench.config.schema import find_conf_dir
from peftbench.config.yaml_files import format_config, parse_config
from peftbench.utils.errors import UserError

CONF = find_conf_dir()
CHOICES = [
    ("method=unipelt", "task=xsum"),
    ("task=sst2", "trainer=paper", "method=full", "functional_form=relu", "mix=[prefix,ia3_ffn]"),
    ("row=mam_30_512", "experiment=paper/table5", "search=lr3", "fidelity=released_code", "debug=smoke"),
]
ALL = [
    *(
        (f"{group}=[{name}]" if group == "mix" else f"{group}={name}",)
        for group, name in sorted((file.parent.name, file.stem) for file in CONF.glob("[!h]*/*.yaml"))
    ),
    *((f"{GROUP}={row}",) for row in read_rows()),
    *((f"experiment=paper/{file.stem}",) for file in sorted(CONF.glob("experiment/paper/*.yaml"))),
]
# Groups that set no keys of each other's files, so that a composition has the whole of a choice of each.
TOGETHER = [
    ("method", "task", "search", "debug", "fidelity"),
    (GROUP, "model", "trainer"),
    ("modified_representation", "functional_form", "insertion_form", "composition_function", "mix", "experiment"),
]


def combine(groups: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every choice of the groups at least once, one of each group in a composition."""
    choices = [[one for (one,) in ALL if one.startswith(f"{group}=")] for group in groups]
    return [tuple(filter(None, taken)) for taken in zip_longest(*choices)]


def describe(node: Any) -> Any:
    """Everything of a node: its type, flags and value, and all nodes below it in their order."""
    facts = {key: fact for key, fact in vars(node._metadata).items() if key != "resolver_cache"}
    value = node._value()
    if isinstance(value, dict):
        value = [(key, describe(below)) for key, below in value.items()]
    elif isinstance(value, list):
        value = [describe(below) for below in value]
    return type(node), facts, value


@pytest.mark.parametrize(
    "groups",
    [*CHOICES, *(pytest.param(one, marks=pytest.mark.slow) for groups in TOGETHER for one in combine(groups))],
    ids=" ".join,
)
def test_without_hydras_own_config_the_rest_is_the_same(groups: tuple[str, ...]) -> None:
    with open_hydra(None):
        assert describe(compose_alone(groups)) == describe(compose(CONFIG_NAME, overrides=list(groups)))


def test_every_choice_is_among_them() -> None:
    assert {one for groups in TOGETHER for taken in combine(groups) for one in taken} == {one for (one,) in ALL}


def test_runs_are_composed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those for which something configures Hydra; and what is refused is refused in Hydra's words."""
    composed: list[list[str]] = []

    def counted(*arguments: Any, overrides: list[str]) -> Any:
        composed.append(overrides)
        return compose(*arguments, overrides=overrides)

    monkeypatch.setattr("peftbench.config.compose.compose", counted)
    peftbench.config.compose._compose_packaged.cache_clear()
    run = compose_run(["method=lora", "task=sst2"], reads_data=False)
    assert run.task.name == "sst2" and not composed
    assert compose_run(["method=lora", "task=sst2", "hydra.job.chdir=true"], reads_data=False) == run
    assert composed == [["method=lora", "task=sst2", "hydra.job.chdir=true"]]
    with pytest.raises(UserError, match=r"trainer=paper: this task has no settings in the paper"):
        compose_run(["task=docsum", "trainer=paper"], reads_data=False)
    with pytest.raises(UserError, match=r"^Could not delete 'search=lr3'"):
        compose_run(["~search=lr3"])
    assert len(composed) == 2


def test_files_are_read_as_omegaconf_reads_them() -> None:
    """Numbers such as 1e-4 among them, which YAML 1.1 takes for texts."""
    files = [file.relative_to(CONF) for file in sorted(CONF.rglob("*.yaml"))]
    assert len(files) > 100
    for file in files:
        read = pickle.loads(_read("main", str(CONF), str(file.with_suffix(""))))
        assert describe(read.config) == describe(OmegaConf.load(CONF / file)), file
        first = (CONF / file).read_text(encoding="utf-8").splitlines()[0]
        assert read.header["package"] == (first.removeprefix("# @package ") if "@package" in first else None)


@pytest.mark.parametrize("text", ["", "# nothing", "word", "'a: 1'", "a: 1e-4\nb: 2026-01-01", "- [1, ~, yes]", "é: ü"])
def test_a_text_is_read_as_omegaconf_reads_it(text: str) -> None:
    assert describe(parse_config(text)) == describe(OmegaConf.create(text))


@pytest.mark.parametrize("text", ["3", "a: 1\na: 2", "a: {b: 1, b: 1}", "a: [", "a: !!python/object:os.system x", "\t"])
def test_a_text_that_omegaconf_refuses_is_refused(text: str) -> None:
    for read in (OmegaConf.create, parse_config):
        with pytest.raises((YAMLError, AssertionError, OmegaConfBaseException)):
            read(text)


RUNS: list[tuple[str, ...]] = [
    ("method=unipelt", "task=xsum", "trainer.learning_rate=1", "task.prompt='é: {source}'", "trainer.max_steps=5"),
    ("method=peft", "peft.type=BOFT", "task=sst2", "search=lr3", "task.metric=accuracy", "model.revision='1_0'"),
]
WHOLE = [one for one in ALL if one[0].startswith(("method=", "row=", "model=", "mix=")) and one != ("method=peft",)]


@pytest.mark.parametrize("words", [*RUNS, *(pytest.param(one, marks=pytest.mark.slow) for one in WHOLE)], ids=" ".join)
def test_a_run_is_written_as_omegaconf_writes_it(words: tuple[str, ...]) -> None:
    run = compose_run(words, reads_data=False)
    assert format_config(to_plain(run)) == OmegaConf.to_yaml(OmegaConf.structured(run))


def test_columns_of_ones_own(tmp_path: Path) -> None:
    """A file may have its own column of sizes, or change a size of one that there is; the shared columns stay."""
    task = tmp_path / "task" / "own.yaml"
    task.parent.mkdir()
    head = "# @package _global_\ndefaults: [doctopic]\ntask: {name: own}\n"
    task.write_text(head + "sizes: {mini: {mam: {r: 9}}}\n")
    run = compose_run(["task=own"], config_dir=str(tmp_path))
    assert (run.bottleneck, run.composition_function.scale, run.size["of"]) == (9, 4, ["mini"])
    task.write_text(head + "model: {sizes: own}\nsizes: {own: {mam: {r: 8, s: 2, lr: 1e-3}, mix: {prefix: 4}}}\n")
    run = compose_run(["task=own"], config_dir=str(tmp_path))
    assert (run.bottleneck, run.mix["attention"].bottleneck, run.trainer.learning_rate) == (8, 4, 1e-3)
    assert compose_run(["sizes.mini.mam.r=7"]).bottleneck == 7
    assert compose_run([]).bottleneck == 96


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("model.sizes=own", r"model\.sizes=own: conf/sizes\.yaml has generation, glue, mini, decoder\.$"),
        ("sizes.mini.mam.q=7", r"^sizes\.mini\.mam\.q is not a key of the config \(in sizes\.mini\.mam\)"),
        ("+size.mam.r=7", r"or change one with sizes\.COLUMN\.mam\.r=\.$"),
        ("sizes=own", r"sizes=own is not a mapping"),
    ],
)
def test_columns_that_there_are_not(word: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        compose_run([word])
    assert compose_run([]).bottleneck == 96
