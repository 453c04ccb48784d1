"""Modules that say that they import no torch do not, so that commands that read or refuse start at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import peftbench

PACKAGE = Path(peftbench.__file__).parent
TRY_ALL = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def test_what_says_that_it_imports_no_torch_does_not() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    opening = {file: " ".join((ast.get_docstring(ast.parse(file.read_bytes())) or "").split()) for file in files}
    named = [file for file, text in opening.items() if "no torch" in text.lower() or "imports neither" in text.lower()]
    modules = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in named]
    assert len(modules) > 30 and "peftbench.cli.results" in modules
    done = subprocess.run([sys.executable, "-c", TRY_ALL, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
