"""The folders of the package import each other in one direction, and those that only read or refuse import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peftbench

PACKAGE = Path(peftbench.__file__).parent
# Each imports what stands left of it and nothing else. Those in one string know nothing of each other.
LAYERS = ("utils", "config", "records backbones metrics", "tables modification tasks", "counts training", "evaluation")
LAYERS = (*LAYERS, "train", "exchange", "sweeps", "cli", "__main__")
WITHOUT_TORCH = ("config", "records", "tables")
IMPORT_ALL = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders.split()}


def _modules() -> dict[str, Path]:
    """The files of the package by their dotted names below it; a folder's __init__.py by the folder's."""
    files = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in files.items() if name != "__init__"}


def _imported(node: ast.AST) -> Iterator[str]:
    """The modules of the package, or names in them, that the code below a node imports, by their dotted names below it.

    What runs only where a file is the program itself does not count.
    """
    for below in ast.iter_child_nodes(node):
        if isinstance(below, ast.If) and "__main__" in ast.unparse(below.test):
            continue
        if isinstance(below, ast.ImportFrom) and (below.module or "").split(".")[0] == "peftbench":
            base = (below.module or "").partition(".")[2]
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in below.names)
        elif isinstance(below, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in below.names if alias.name.startswith("peftbench."))
        yield from _imported(below)


def _imports() -> dict[str, set[str]]:
    """The modules that each module imports, at its top or inside of a function."""
    modules = _modules()
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        imported = _imported(ast.parse(file.read_bytes()))
        found[name] = {one if one in modules else one.rpartition(".")[0] for one in imported} - {"", name}
    return found


def test_no_folder_imports_one_above_it() -> None:
    crossings = {
        (module, other)
        for module, imported in _imports().items()
        for other in imported
        if module.split(".")[0] != other.split(".")[0]
    }
    assert len(crossings) > 200  # the walk finds them
    upward = [pair for pair in crossings if LEVEL[pair[0].split(".")[0]] <= LEVEL[pair[1].split(".")[0]]]
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = _imports()
    while leaves := [module for module, imported in imports.items() if not imported & imports.keys()]:
        for module in leaves:
            del imports[module]
    assert not imports


def test_every_module_lies_in_a_folder_of_the_plan() -> None:
    assert {name.split(".")[0] for name in _modules()} == LEVEL.keys()


def test_folders_that_read_or_refuse_import_no_torch() -> None:
    modules = [f"peftbench.{name}" for name in _modules() if name.split(".")[0] in WITHOUT_TORCH]
    assert len(modules) > 25
    commands = [f"peftbench.cli.{name}" for name in ("main", "train", "results", "compare", "status", "params")]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *modules, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_plain_run_does_not_wait_for_what_few_runs_need() -> None:
    """Each takes half a second or more: torch's compiler, and the packages that split texts and draw."""
    few = ("torch._inductor.compile_fx", "nltk", "scipy.stats", "matplotlib", "evaluate", "sklearn")
    code = "import gc, sys; gc.disable(); import peftbench.train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers"} <= set(done.stdout.split()) and not set(few) & set(done.stdout.split())


def test_one_name_means_one_thing() -> None:
    """No two classes and no two public functions of the package have one name."""
    named: dict[str, list[str]] = {}
    for module, file in _modules().items():
        for node in ast.parse(file.read_bytes()).body:
            is_public = isinstance(node, ast.FunctionDef) and node.name != "main" and not node.name.startswith("_")
            if isinstance(node, ast.ClassDef) or is_public:
                named.setdefault(node.name, []).append(module)
    assert {name: places for name, places in named.items() if len(places) > 1} == {}
