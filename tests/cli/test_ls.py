"""`peftbench ls`: groups, those of a user's own folder, and what each key means."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from peftbench.cli.main import main
from peftbench.config.keys import keys
from peftbench.config.schema import Run, Search
from peftbench.utils.differences import flatten


def test_every_key_of_the_schema_is_listed_once() -> None:
    names = [key.name for key in keys()]
    schema = OmegaConf.to_container(OmegaConf.structured(Run(search=Search())))
    assert isinstance(schema, dict)
    leaves = {name for name, _ in flatten(schema) if name not in ("size", "sizes")}
    assert len(names) == len(set(names)) and leaves <= set(names)


def test_meanings_stand_above_a_key_or_behind_it_and_belong_to_it_alone() -> None:
    meaning = {key.name: key.meaning for key in keys()}
    assert meaning["trainer.max_steps"] == "optimiser steps; wins over epochs"
    assert meaning["trainer.batching"].startswith("Which examples a batch holds")
    assert meaning["trainer.batching"].endswith("in random order.")
    assert meaning["trainer.schedule"] == ""
    assert meaning["bottleneck"].startswith("r, or the number l")  # of the class that Run extends


def test_choices_and_defaults_are_as_they_are_typed() -> None:
    found = {key.name: key for key in keys()}
    assert found["trainer.keep"].choices == ["best", "last"]
    assert found["modified_representation.stacks"].choices == ["encoder", "decoder"]
    assert found["bottleneck"].default == "null" and found["bias"].default == "false"
    assert found["trainer.betas"].default == "[0.9,0.999]"


def test_ls_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "keys", "trainer.keep"]) == 0
    assert "trainer.keep: best, last\n    which state is reported" in capsys.readouterr().out
    assert main(["ls", "keys", "trainr"]) == 2
    assert "No key begins with trainr; did you mean trainer?" in capsys.readouterr().err


def test_ls_shows_a_users_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "own.yaml").write_text("# Mine: h <- h.\nmethod: own\n")
    assert main(["ls", "method", "--config-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Mine: h <- h." in out and "lora" in out
    assert main(["ls", "method", "--config-dir", str(tmp_path / "nowhere")]) == 2
