"""conf/rows.yaml: what it says is there, and its rows are options of a group like those that are files."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.rows import read_rows, read_scores
from peftbench.config.schema import Run, find_conf_dir
from peftbench.tables.paper import SETTINGS
from peftbench.utils.errors import UserError

FILE: Any = OmegaConf.to_container(
    OmegaConf.load(find_conf_dir() / "rows.yaml")
)  # which refuses a name that comes twice
TABLES = {file.stem for file in (find_conf_dir() / "experiment" / "paper").glob("table*.yaml")}


def test_rows_are_read_as_they_are_written() -> None:
    """Numbers too: YAML has two ways to read 1e-4."""
    assert {name: {"help": row.help, **row.settings, "paper": row.paper} for name, row in read_rows().items()} == FILE[
        "rows"
    ]
    assert {name: read_scores(None, name) for name in FILE["methods"]} == FILE["methods"]
    assert list(read_rows()) == sorted(read_rows()) and len(read_rows()) == 30


@pytest.mark.parametrize("name", read_rows())
def test_a_row_chooses_options_that_exist_and_sets_keys_that_exist(name: str) -> None:
    row = read_rows()[name]
    assert "method" in row.choices
    assert all((find_conf_dir() / group / f"{choice}.yaml").is_file() for group, choice in row.choices.items())
    assert set(row.settings) <= {item.name for item in fields(Run)}


@pytest.mark.parametrize("of", [*FILE["rows"].items(), *FILE["methods"].items()], ids=lambda of: str(of[0]))
def test_scores_are_numbers_of_tables_and_tasks_that_exist(of: tuple[str, Any]) -> None:
    name, printed = of
    if name in FILE["rows"] and printed is FILE["rows"][name]:
        printed, tables = printed["paper"], set(re.findall(r"\d+", re.split("tables? ", printed["help"])[1]))
        assert {table.removeprefix("table") for table in printed} <= tables  # those that its help names
    else:
        assert (find_conf_dir() / "method" / f"{name}.yaml").is_file() and set(printed) == {"table2"}
    assert printed and set(printed) <= TABLES
    assert all(int(a[5:]) < int(b[5:]) for a, b in pairwise(printed))  # without a table the first one counts
    for tasks in printed.values():
        assert tasks and set(tasks) <= {*SETTINGS, "rouge"}
        assert all(isinstance(score, float) for task, score in tasks.items() if task != "rouge")
        assert all(isinstance(score, float) for score in tasks.get("rouge", []))


def test_a_row_is_typed_like_an_option_that_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    run = compose_run(["task=xsum", "row=mam_30_512"])
    sizes = (run.bottleneck, *(one.bottleneck for one in run.mix.values()))
    assert (run.method, sizes, run.composition_function.scale) == ("mam", (512, 30), 4.0)
    assert compose_run(["row=sa_ffn_200"]).modified_representation.name.name == "ffn"
    assert compose_run(["row=scaled_pa_ffn_512_trained"]).composition_function.learned
    assert compose_run(["row=mam_30_512", "bottleneck=8"]).bottleneck == 8
    with pytest.raises(UserError, match="row=mam_30_51 is unknown; did you mean mam_30_512"):
        compose_run(["row=mam_30_51"])
    with pytest.raises(UserError, match=r"\+row=full: row is already in the config; leave out the \+"):
        compose_run(["+row=full"])
    assert main(["ls", "row"]) == 0
    assert re.search(r"\nmam_30_512 +MAM adapter, l = 30, r = 512, s = 4: table 6", capsys.readouterr().out)


def test_hydra_copies_what_it_loads_and_not_the_whole_store() -> None:
    """With a copy of the store for each group, `train --help` took twice as long."""
    store = ConfigStore.instance()
    assert deepcopy(store).repo is store.repo
    before = deepcopy(dict(store.repo))
    run = compose_run(["row=mam_30_512", "mix.attention.bottleneck=3", "trainer.betas=[0.5,0.5]"])
    run.mix["attention"].bottleneck = 5
    assert store.repo == before
    again = compose_run(["row=mam_30_512"])
    assert (again.mix["attention"].bottleneck, again.trainer.betas) == (30, [0.9, 0.999])


def test_tab_completes_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COMP_LINE", "peftbench train row=pa_ffn_5")
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["row=pa_ffn_512"]


def write_row(folder: Path, name: str) -> None:
    (folder / "row").mkdir()
    text = "# @package _global_\n# My own.\ndefaults:\n  - override /method: lora\n\nbottleneck: 7\n"
    (folder / "row" / f"{name}.yaml").write_text(text)


def test_a_users_own_row_joins_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_row(tmp_path, "mine")
    for name, bottleneck in (("mine", 7), ("pa_ffn_30", 30)):
        assert compose_run([f"row={name}"], config_dir=str(tmp_path)).bottleneck == bottleneck
    with pytest.raises(UserError, match="row=mien is unknown; did you mean mine"):
        compose_run(["row=mien"], config_dir=str(tmp_path))
    assert main(["ls", "row", "--config-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"mine +My own\.", printed) and "bitfit" in printed


def test_a_users_own_file_with_the_name_of_one_of_ours_is_refused(tmp_path: Path) -> None:
    """Hydra would read ours and say nothing, or of a row something about schemas."""
    write_row(tmp_path, "mam_30_512")
    for overrides in (["row=mam_30_512"], ["method=lora"]):
        with pytest.raises(UserError, match=r": row/mam_30_512.yaml would not be read, because peftbench"):
            compose_run(overrides, config_dir=str(tmp_path))
    assert main(["ls", "row", "--config-dir", str(tmp_path)]) == 2
    (tmp_path / "row" / "mam_30_512.yaml").unlink()
    (tmp_path / "sizes.yaml").write_bytes((find_conf_dir() / "sizes.yaml").read_bytes())
    assert compose_run(["row=mam_30_512"], config_dir=str(tmp_path)).bottleneck == 512  # a copy does no harm
    (tmp_path / "sizes.yaml").write_text("generation: {full: {lr: 1}}\n")
    with pytest.raises(UserError, match=r": sizes.yaml would not be read"):
        compose_run(["row=mam_30_512"], config_dir=str(tmp_path))
