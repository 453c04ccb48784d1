"""Every `peftbench train` line of the README composes, and runs in its smoke form."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from peftbench.cli.main import main
from peftbench.config.compose import compose_points

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
LINES = [line.split(" #")[0] for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [" ".join(line.split()) for line in LINES if line.startswith("peftbench train")]


def arguments(command: str, tmp_path: Path) -> list[str]:
    """The command's words after `peftbench`, with FOLDER standing for an existing one."""
    (tmp_path / "train.csv").write_text("text,label\ngood,yes\nbad,no\n", encoding="utf-8")
    return [word.replace("FOLDER", str(tmp_path)) for word in shlex.split(command)[1:]]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=pytest.mark.slow) if "seed=" in c or "table6" in c else c for c in COMMANDS
    ],  # dozens of runs
)
def test_commands_compose(command: str, tmp_path: Path) -> None:
    words = arguments(command, tmp_path)[1:]
    assert compose_points([word for word in words if word != "-m"], multirun="-m" in words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if not any(word in c for word in ("FOLDER", "task=", "experiment="))]
)
def test_commands_run(command: str, tmp_path: Path) -> None:
    train, *words = arguments(command, tmp_path)
    # First: of several grids the first one's words are those of all.
    assert main([train, "debug=smoke", f"output_dir={tmp_path / 'outputs'}", *words]) == 0
