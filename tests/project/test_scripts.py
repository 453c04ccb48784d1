"""scripts/*.py find what they import from the package: each explains itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts"
# As `python SCRIPT` in a fresh process, but without the garbage collector, which makes torch's import twice as long.
RUN = """
import gc, runpy, sys
gc.disable()
sys.path[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: str(path.stem))
def test_a_script_says_what_it_does(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(FOLDER), str(script), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
