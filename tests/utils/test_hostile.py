"""What others wrote, in a record, a folder, a config or a link, is shown and read, and commands nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

import peftbench
from peftbench.backbones.load import load_config
from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.schema import EMBEDDED, Model
from peftbench.evaluation.partial import Partial
from peftbench.records.lock import hold_run
from peftbench.records.record import Score
from peftbench.records.recording import record_run
from peftbench.records.run_files import append_metrics
from peftbench.records.saved import read_saved_config
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.files import refuse_links, replace_file
from tests.records.test_record import RUN

ESCAPES = "\x1b]0;title\x07\x1b[2J\r\x9b1m\u202enoitcnuf\x00"
ODD = "=HYPERLINK(1)" + ESCAPES + "\n\\input{/etc/passwd}\n"


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A record with hostile names wherever a record has a text."""
    folder = tmp_path / "outputs" / f"folder{ESCAPES.replace(chr(0), '')}"
    with record_run(RUN, folder, ["method=mam"]) as record:
        record.scores["report"] = Score(f"te{ODD}st", 100, {"accuracy": 63.0})
        record.score = 63.0
    values = json.loads((folder / "record.json").read_text())
    values |= {"method": ODD, "task": ODD, "device": ODD, "overrides": [ODD]}
    values["model"]["name"] = ODD
    values["axes"][0]["functional_form"] = f"[{ESCAPES}"
    (folder / "record.json").write_text(json.dumps(values))
    plan = {"arguments": [ODD], "points": [{"folder": ODD, "method": ODD, "settings": {ODD: ODD}}]}
    (tmp_path / "outputs" / ".sweeps").mkdir()
    (tmp_path / "outputs" / ".sweeps" / "a.sweep.json").write_text(json.dumps(plan))
    return tmp_path / "outputs"


@pytest.mark.parametrize("words", [["results"], ["status"], ["results", "--rows", "method"]], ids=" ".join)
@pytest.mark.parametrize("form", ["", "--csv", "--markdown", "--latex", "--json"])
def test_no_record_commands_the_terminal(
    words: list[str], form: str, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words == ["status"] and form not in ("", "--json"):
        return
    assert main([words[0], str(outputs), *words[1:], *filter(None, [form])]) == 0
    said = "".join(capsys.readouterr())
    assert said and not set(said) & set(ESCAPES[:1] + "\x07\r\x9b\u202e\x00")
    for line in said.splitlines() if form == "--latex" else []:
        assert not line.startswith("\\input")


def test_a_console_prints_its_own_styles_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file, table = io.StringIO(), Table("a\x1b[31mb")
    table.add_row("c\x9b1md")
    console = make_console()
    console.file, console._force_terminal, console._color_system = file, True, console._color_system
    console.print("x\x1b[2Jy", style="bold")
    console.print(table)
    said = file.getvalue()
    assert "x\ufffd[2Jy" in said and "a\ufffd[31m" in said and "c\ufffd1md" in said


def test_lines_and_faults_are_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2Jb\tc\nd")
    print_faults(["e\x07\ud800"])
    assert tuple(capsys.readouterr()) == ("a\ufffd[2Jb\tc\nd\n", "peftbench: e\ufffd\ufffd\n")


def test_nothing_else_prints() -> None:
    """One place strips controls: whoever calls print() passes it by."""
    package = Path(peftbench.__file__).parent
    calls = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if any(line.strip().startswith("print(") for line in file.read_text(encoding="utf-8").splitlines())
    }
    assert calls == {"cli/main.py", "sweeps/mps.py", "utils/console.py", "utils/errors.py"}


def test_cells_of_csv_are_no_formulas(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["results", str(outputs), "--csv"])
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["method"].startswith("'=HYPERLINK") and row["score"] == "63.0"
    from peftbench.tables.formats import rows_to_csv

    cells = ["=1+1", "+1", "-0.5", "-1e-05", "@a", " \t=b", "-x", "a=b", -1]
    assert [line for (line,) in csv.reader(io.StringIO(rows_to_csv([{"a": cell} for cell in cells])))][1:] == [
        *("'=1+1", "+1", "-0.5", "-1e-05", "'@a", "' \t=b", "'-x", "a=b", "-1")
    ]


def test_a_picture_is_xml_and_draws_dollars(outputs: Path, tmp_path: Path) -> None:
    (record,) = outputs.rglob("record.json")
    values = json.loads(record.read_text())
    values |= {
        "method": f"$\\frac${ESCAPES}",
        "counts": {**dict.fromkeys(("backbone", "trained", "stored"), 9), "head": 0, "paper": None},
    }
    record.write_text(json.dumps(values))
    main(["plot", str(outputs), "--out", str(tmp_path / "a.svg")])
    ElementTree.parse(tmp_path / "a.svg")
    assert "\\frac" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["checkpoints", ".lock", "metrics.jsonl", "adapter/adapter.safetensors"])
def test_a_run_does_not_go_through_a_link(name: str, tmp_path: Path) -> None:
    elsewhere, link = tmp_path / "precious", tmp_path / "run" / name
    elsewhere.write_text("mine")
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    said = r"is a link, and a run writes and deletes in its own folder only"
    with pytest.raises(UserError, match=said), hold_run(tmp_path / "run"):
        pytest.fail("the run began")
    assert elsewhere.read_text() == "mine" and link.is_symlink()


def test_a_link_that_comes_later_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "precious"
    elsewhere.write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(elsewhere)
    (tmp_path / "a.partial").symlink_to(elsewhere)
    writes: list[Callable[[], Any]] = [
        lambda: append_metrics(tmp_path, {"step": 1}),
        lambda: Partial(tmp_path / "a.partial", "stamp"),
    ]
    for write in writes:
        with pytest.raises(OSError, match="symbolic links"):
            write()
    monkeypatch.setattr("peftbench.utils.files.token_hex", lambda size: "known")
    (tmp_path / "record.json.known.tmp").symlink_to(elsewhere)
    with pytest.raises(FileExistsError), replace_file(tmp_path / "record.json") as file:
        file.write("theirs")
    assert elsewhere.read_text() == "mine"


def test_a_folder_of_a_run_may_lie_on_another_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk", target_is_directory=True)
    refuse_links(tmp_path / "run")


BOMB = "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases"),
        ("a: &a [*a]", "levels deep"),
        ("[" * 1000, "is not YAML"),
        ("a: " + "[" * 200 + "]" * 200, "levels deep"),
        ("x" * (1 << 21), "larger than"),
        ("\x00", "is not YAML"),
    ],
    ids=["bomb", "circle", "open", "deep", "large", "control"],
)
def test_a_config_that_would_grow_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_saved_config(tmp_path)


CALL = "callbacks: {x: {_target_: os.system, command: touch PWNED}}"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("method/m.yaml", f"# @package _global_\nhydra:\n  {CALL}\n", "hydra.callbacks"),
        ("method/m.yaml", f"# @package hydra\n{CALL}\n", "@package hydra"),
        ("method/m.yaml", "# @package hydra.callbacks\nx: {_target_: os.system}\n", "@package hydra.callbacks"),
        ("method/m.yaml", "defaults: [task@hydra.callbacks: x]\n", "task@hydra.callbacks among its defaults"),
        ("method/m.yaml", "defaults: [override /hydra/job_logging: x]\n", "/hydra/job_logging among its defaults"),
        ("method/m.yaml", "a: &a {hydra: {run: {dir: x}}}\n<<: *a\n", "hydra.run"),
        (
            "experiment/x/m.yaml",
            "hydra: {sweeper: {params: {seed: 1}, _target_: os.system}}\n",
            "hydra.sweeper._target_",
        ),
        ("hydra/callbacks/m.yaml", "x: 1\n", "a file in hydra/callbacks/"),
        ("hydra/launcher/m.yaml", "_target_: os.system\n", "_target_"),
        ("task/m.yaml", BOMB, "aliases"),
    ],
)
def test_a_group_file_does_not_configure_hydra(file: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as refused:
        compose_run(["method=lora"], config_dir=str(tmp_path))
    assert said in str(refused.value)


def test_the_grid_of_an_experiment_and_settings_of_a_plugin_are_taken(tmp_path: Path) -> None:
    for file, text in (
        ("experiment/mine.yaml", "# @package _global_\nhydra:\n  sweeper:\n    params: {seed: '1,2'}\n"),
        ("hydra/launcher/mine.yaml", "n_jobs: 2\n"),
        ("experiment/wide.yaml", "# @package _global_\ndefaults: [override /hydra/launcher: basic]\n"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert compose_run(["method=lora"], config_dir=str(tmp_path)).method == "lora"


@pytest.mark.parametrize(
    "words", [["hydra.searchpath=[file:///tmp]"], ["--config-path", "/tmp"], ["--config-name", "x"]]
)
def test_folders_of_configs_come_by_one_way(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    assert "--config-dir" in capsys.readouterr().err


def test_code_in_a_folder_of_a_backbone_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((EMBEDDED / "mini" / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked"))
    with pytest.raises(UserError, match="which peftbench never runs"):
        load_config(Model(name="x", path=str(tmp_path)))


def test_the_state_of_a_checkout_is_read_without_its_lock(tmp_path: Path) -> None:
    """A git in the PATH that says which variables it was given."""
    (tmp_path / "git").write_text(f"#!/bin/sh\necho $GIT_OPTIONAL_LOCKS >> {tmp_path}/said\n")
    (tmp_path / "git").chmod(0o755)
    code = "from peftbench.records.recording import read_git; read_git()"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PATH": path}, check=True)
    assert set((tmp_path / "said").read_text().split()) == {"0"}
