"""scripts/*.py find what they import from the package: each explains itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts"
# As `python SCRIPT --help`, one after another in a process that imports torch once for all of them, but without the
# garbage collector, which makes that import twice as long.
RUN = """
import contextlib, gc, io, json, runpy, sys, traceback
gc.disable()
sys.path[0], *scripts = sys.argv[1:]
said = {}
for script in scripts:
    sys.argv = [script, "--help"]
    code, out = None, io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = traceback.format_exc()
    said[script] = [code, out.getvalue()]
print(json.dumps(said))
"""


@pytest.mark.slow
def test_each_script_says_what_it_does() -> None:
    scripts = sorted(map(str, FOLDER.glob("*.py")))
    assert len(scripts) > 10
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(FOLDER), *scripts], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert [*said] == scripts
    assert {script: told for script, told in said.items() if told[0] or not told[1].startswith("usage: ")} == {}
