"""`peftbench ls`: groups, those of a user's own folder, and what each key means."""

from __future__ import annotations

import re
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from omegaconf import OmegaConf

from peftbench.cli.main import main
from peftbench.config import schema
from peftbench.config.axes import CHOICES
from peftbench.config.keys import Key, list_keys
from peftbench.config.schema import HELP, Run, Search
from peftbench.config.task_validity import BASELINES, METRIC_NAMES
from peftbench.utils.differences import flatten


def test_every_key_of_the_schema_is_listed_once() -> None:
    names = [key.name for key in list_keys()]
    schema = OmegaConf.to_container(OmegaConf.structured(Run(search=Search())))
    assert isinstance(schema, dict)
    leaves = {name for name, _ in flatten(schema) if name not in ("size", "sizes")}
    assert len(names) == len(set(names)) and leaves <= set(names)


SCHEMAS = [kind for kind in vars(schema).values() if isinstance(kind, type) and is_dataclass(kind)]
FIELDS = [(kind, item) for kind in SCHEMAS for item in fields(kind)]


@pytest.mark.parametrize(("kind", "item"), FIELDS, ids=[f"{kind.__name__}.{item.name}" for kind, item in FIELDS])
def test_every_field_of_the_schema_has_help_or_keys_of_its_own(kind: type, item: Field[object]) -> None:
    hint = get_type_hints(kind)[item.name]
    help = item.metadata.get(HELP, "")
    if any(is_dataclass(part) for part in (hint, *get_args(hint))) and get_origin(hint) is not dict:
        assert help == ""
        return
    assert re.fullmatch(r"\S.*[.]", help)
    if type(None) in get_args(hint):
        assert "null: " in help


def test_every_key_that_is_listed_has_help() -> None:
    assert [key.name for key in list_keys() if not key.meaning] == []


@pytest.mark.parametrize("key", [key for key in list_keys() if key.choices], ids=lambda key: str(key.name))
def test_help_explains_each_choice(key: Key) -> None:
    told = "`peftbench ls axes` describes the choices" in key.meaning
    explained = {choice for choices in CHOICES.values() for choice in choices} if told else set()
    unexplained = [choice for choice in key.choices if not re.search(rf"\b{choice}\b", key.meaning)]
    assert [choice for choice in unexplained if choice not in explained] == []


def test_help_names_the_choices_of_texts() -> None:
    meaning = {key.name: key.meaning for key in list_keys()}
    for key, choices in (("task.metric", METRIC_NAMES), ("task.baselines", BASELINES)):
        assert all(re.search(rf"\b{choice}\b", meaning[key]) for of_kind in choices.values() for choice in of_kind)
    assert all(re.search(rf"\b{form}\b", meaning["functional_form.name"]) for form in schema.FUNCTIONAL_FORMS)


def test_a_default_is_copied_for_each_config() -> None:
    first, second = Run(), Run()
    first.trainer.betas.append(0.5)
    first.task.data_files["train"] = "train.csv"
    assert (second.trainer.betas, second.task.data_files) == ([0.9, 0.999], {})


def test_choices_and_defaults_are_as_they_are_typed() -> None:
    found = {key.name: key for key in list_keys()}
    assert found["trainer.keep"].choices == ["best", "last"]
    assert found["modified_representation.stacks"].choices == ["encoder", "decoder"]
    assert found["bottleneck"].default == "null" and found["bias"].default == "false"
    assert found["trainer.betas"].default == "[0.9,0.999]"


def test_ls_keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["ls", "keys", "trainer.keep"]) == 0
    assert "trainer.keep: best, last\n    Which state is reported" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["ls", "keys"]) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for key in list_keys():
        assert printed[printed.index(f"{key.name}: {', '.join(key.choices) or key.default}".strip()) + 1] == key.meaning
    assert main(["ls", "keys", "trainr"]) == 2
    assert "No key starts with trainr; did you mean trainer?" in capsys.readouterr().err


def test_the_page_of_keys_is_what_ls_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """`peftbench ls keys --markdown > docs/keys.md` brings the page up to date."""
    assert main(["ls", "keys", "--markdown"]) == 0
    page = Path(__file__).resolve().parents[2] / "docs" / "keys.md"
    assert capsys.readouterr().out == page.read_text(encoding="utf-8")
    assert main(["ls", "keys", "trainer.schedule", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert (
        "| `trainer.schedule` | `linear` | `linear`, `cosine`, `constant` |" in printed and "task" not in printed[400:]
    )


def test_ls_shows_a_users_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "own.yaml").write_text("# Mine: h <- h.\nmethod: own\n")
    assert main(["ls", "method", "--config-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Mine: h <- h." in out and "lora" in out
    assert main(["ls", "method", "--config-dir", str(tmp_path / "nowhere")]) == 2


def test_a_word_that_no_group_takes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "method", "lora"]) == 2
    assert "lora: ls method takes no further word; ls keys START does." in capsys.readouterr().err
