"""Quick imports, each in a process of its own: they act only where torch is not imported yet."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, gc
from peftbench.utils.quick_imports import speed_up_imports

atexit.register(lambda: print(gc.get_freeze_count() > 0))
with speed_up_imports():
    kind = type("Kind", (type,), {"__module__": MODULE})
print(gc.get_freeze_count() > 0, gc.isenabled())
"""


@pytest.mark.parametrize(("module", "frozen_at_the_end"), [("nanobind", "False"), ("pybind11_builtins", "True")])
def test_types_of_nanobind_alone_are_collected_at_the_end(module: str, frozen_at_the_end: str) -> None:
    """nanobind prints those that are left; for the others the last collection would take seconds."""
    script = SCRIPT.replace("MODULE", repr(module))
    lines = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    assert lines == ["True True", frozen_at_the_end]
