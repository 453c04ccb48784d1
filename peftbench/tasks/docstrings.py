"""Real text on every machine: the docstrings of Python's standard library and of installed packages.

Source files are parsed with `ast`; no package is imported. `gather_packages` returns the docstrings, `assign_split`
deals them into train, validation and test by name, and two tasks are made from them: `make_topic_rows` (which package
does this text come from?) and `make_summary_rows` (write the first paragraph, given the rest).

The standard library has the package name `python`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args

from peftbench.utils.cache_dir import find_cache_dir
from peftbench.utils.errors import UserError, warn
from peftbench.utils.files import dump_json, replace_file

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

STDLIB = "python"

# The words, in addition to its own name, that reveal a package in a topic row. A space matches any white space.
ALIASES: dict[str, tuple[str, ...]] = {
    "numpy": ("np",),
    "pandas": ("pd",),
    "python": ("cpython", "python2", "python3"),
    "torch": ("pytorch", "libtorch"),
    "transformers": ("hugging face", "huggingface"),
}
MASK_WORD = "package"

# Folders whose docstrings describe tests, demos or another package.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "_vendor", "_vendored", "idlelib", "site-packages", "dist-packages", "test", "tests", "turtledemo"}
)
SKIPPED_PAIRS = frozenset({("testing", "_data"), ("testing", "_internal")})

MIN_WORDS = 3  # shorter docstrings ("See above.") say nothing about their object
MIN_TEXT = 150  # characters of a topic text, or of a document to summarise
SUMMARY_LENGTH = range(20, 201)  # characters of a summary that is worth learning to write

# First paragraphs that are not a summary: "Args: ...", "x (`int`, *optional*): ...", a block of code, a directive.
NOT_A_SUMMARY = re.compile(r"(?:\w+|\S+ \(.*?\))\s*:|```|\.\. ")

_SCHEMA = 2  # part of the cache file's name: raise it whenever the gathered text or the file changes
_POOL_FROM = 64  # source files; with fewer, starting workers costs more than it saves
_WORKERS = 2


@dataclass(frozen=True)
class Docstring:
    """One docstring: `name` is its object's qualified name, as in `torch.nn.modules.linear.Linear.forward`."""

    package: str
    name: str
    summary: str  # the first paragraph, on one line
    body: str  # the other paragraphs; empty if there is only one

    @property
    def text(self) -> str:
        """Summary and body, with a blank line between them."""
        return f"{self.summary}\n\n{self.body}" if self.body else self.summary


def gather_packages(packages: Sequence[str]) -> list[Docstring]:
    """Return the docstrings of `packages`, sorted by name; of equal texts (see `normalise_text`) only the first.

    Names are not quite unique: a function that is defined twice, say once per platform, is listed twice.
    The docstrings of a package are cached in `find_cache_dir()`.
    Raises UserError for packages that are not installed.
    """
    installed = read_versions(packages)
    found: list[Docstring] = []
    for package, version in installed.items():
        cache = find_cache_dir() / f"docstrings-{package}-{version}-v{_SCHEMA}.jsonl"
        kept = _load_cached(cache)
        if kept is not None:
            found += kept
            continue
        fresh = _read_all(package, _list_sources(package))
        with suppress(OSError):  # a cache that cannot be written costs seconds, not the run
            cache.parent.mkdir(parents=True, exist_ok=True)
            _save_cached(cache, fresh)
        found += fresh
    return _drop_duplicates(found)


def gather_folder(folder: Path, package: str) -> list[Docstring]:
    """Gather, without the cache, the docstrings of a package that is not installed; `folder` has its sources."""
    return _read_all(package, list(_walk_files(folder, folder.name)))


def assign_split(name: str) -> Split:
    """Return the split of the docstring called `name`: a pure function of the name, 80/10/10."""
    tenth = _hash_text(name) % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def read_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each package. Raises UserError for packages that are not installed."""
    missing = [package for package in packages if not _find_roots(package)]
    if missing:
        raise UserError(
            *(
                f"{package} is not an installed package with Python sources; install it, or name an installed "
                f"top-level package such as numpy, or {STDLIB} for the standard library."
                for package in missing
            )
        )
    return {package: _read_version(package) for package in packages}


def normalise_text(text: str) -> str:
    """Return `text` in lower case with single spaces: two docstrings are the same if they are equal in this form."""
    return " ".join(text.lower().split())


def make_topic_rows(packages: Sequence[str], split: Split) -> list[dict[str, str]]:
    """Return rows `{"name", "text", "label"}` for the task "which of `packages` does this docstring come from?".

    The names of all `packages` are masked in the text. Every label has the same number of rows: as many as the rarest
    label has. A hash of their content determines which rows are taken, and their order.
    Raises UserError if a package is not installed or has no row in this split.
    """
    names = _match_names(packages)
    by_label: dict[str, list[dict[str, str]]] = {package: [] for package in packages}
    for docstring in gather_packages(packages):
        if assign_split(docstring.name) != split:
            continue
        text = names.sub(MASK_WORD, docstring.text)
        if len(text) >= MIN_TEXT:
            by_label[docstring.package].append({"name": docstring.name, "text": text, "label": docstring.package})

    empty = [package for package, rows in by_label.items() if not rows]
    if empty:
        raise UserError(
            *(f"{package} has no docstring of {MIN_TEXT} characters in the {split} split." for package in empty)
        )

    def order(row: dict[str, str]) -> int:
        return _hash_text(f"0 {row['name']} {row['text']}")  # keep the 0: it determines the task's rows

    count = min(len(rows) for rows in by_label.values())
    taken = [row for rows in by_label.values() for row in sorted(rows, key=order)[:count]]
    return sorted(taken, key=order)  # mixes the labels, so that the first n rows are balanced


def make_summary_rows(packages: Sequence[str], split: Split) -> list[dict[str, str]]:
    """Return rows `{"name", "document", "summary"}`, sorted by name, for the task "write the summary of this document".

    Several documents may have the same summary ("Fill missing values."). A validation or test row is left out if its
    summary is in an earlier split, where a model could memorise it.
    Raises UserError for packages that are not installed.
    """
    docstrings = gather_packages(packages)
    earlier = SPLITS[: SPLITS.index(split)]
    taken = {normalise_text(docstring.summary) for docstring in docstrings if assign_split(docstring.name) in earlier}
    return [
        {"name": docstring.name, "document": docstring.body, "summary": docstring.summary}
        for docstring in docstrings
        if assign_split(docstring.name) == split
        and len(docstring.summary) in SUMMARY_LENGTH
        and len(docstring.body) >= MIN_TEXT
        and not NOT_A_SUMMARY.match(docstring.summary)
        and normalise_text(docstring.summary) not in taken
    ]


def _hash_text(text: str) -> int:
    """Return a number that is the same on every machine and in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _match_names(packages: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for the packages' names and aliases as whole identifiers, also in dotted names, in any case."""
    words = sorted({word for package in packages for word in (package, *ALIASES.get(package, ()))}, key=len)
    choices = "|".join(r"\s+".join(map(re.escape, word.split())) for word in reversed(words))
    return re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE)


# Finding a package's source files


def _find_roots(package: str) -> list[Path]:
    """Return the folders with the sources of `package`, or the file of a single-file module; empty if none exist."""
    if package == STDLIB:
        return [Path(sysconfig.get_paths()["stdlib"])]
    if not package.isidentifier():  # find_spec would import the parent of a dotted name
        return []
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module in sys.modules without a spec
        spec = None
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [path for path in map(Path, spec.submodule_search_locations) if path.is_dir()]
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _read_version(package: str) -> str:
    """Return the version of an installed `package`; if it has none, a hash of its files' sizes and times."""
    if package == STDLIB:
        return platform.python_version()
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    distributions = importlib.metadata.packages_distributions().get(package)  # sklearn comes from scikit-learn
    if distributions:
        return importlib.metadata.version(distributions[0])
    stats = [(name, path.stat()) for name, path in _list_sources(package)]
    listing = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return "unversioned-" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def _list_sources(package: str) -> list[tuple[str, Path]]:
    """Return (module name, file) of every source file of an installed `package`, without tests."""
    prefix = "" if package == STDLIB else package
    return [
        source
        for root in _find_roots(package)
        for source in (_walk_files(root, prefix) if root.is_dir() else [(package, root)])
    ]


def _walk_files(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for where, folders, files in os.walk(folder):
        here = Path(where)
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and (here.name, f) not in SKIPPED_PAIRS]
        parts = [part for part in (prefix, *here.relative_to(folder).parts) if part]
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix == ".py" and not stem.startswith("test_") and stem != "conftest":
                yield ".".join(parts if stem == "__init__" else [*parts, stem]), here / file


# Reading docstrings out of source files


def _read_all(package: str, sources: list[tuple[str, Path]]) -> list[Docstring]:
    if len(sources) < _POOL_FROM:
        parsed = list(map(_read_file, sources))
    else:
        # Workers only parse text, so forking a process with threads is safe here. On Linux, a forked worker need not
        # import the caller's main module, with torch, again.
        context = get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(_WORKERS, context) as pool:
            parsed = list(pool.map(_read_file, sources, chunksize=16))
    return _drop_duplicates(Docstring(package, *parts) for file in parsed for parts in file)


def _read_file(source: tuple[str, Path]) -> list[tuple[str, str, str]]:
    """Return (name, summary, body) of each docstring in a (module name, file); none if it cannot be read or parsed."""
    module, path = source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes(), str(path))
        documented = list(_walk_tree(tree, module))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [(name, *_divide_text(text)) for name, text in documented if len(text.split()) >= MIN_WORDS]


def _walk_tree(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) of `node`, which is called `name`, and of all definitions within it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk_tree(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # definitions under if, try, with ...
            yield from _walk_tree(child, name)


def _divide_text(text: str) -> tuple[str, str]:
    """Return the summary and the body of a cleaned docstring."""
    # Half a surrogate pair is legal in a Python string, but can be neither hashed nor saved.
    text = text.encode("utf-8", "replace").decode()
    paragraphs = re.split(r"\n\s*\n", text.strip(), maxsplit=1)
    summary = " ".join(paragraphs[0].split())
    if len(paragraphs) == 1:
        return summary, ""
    lines = "\n".join(line.rstrip() for line in paragraphs[1].expandtabs().splitlines())
    return summary, re.sub(r"\n{3,}", "\n\n", textwrap.dedent(lines).strip("\n"))


def _drop_duplicates(docstrings: Iterable[Docstring]) -> list[Docstring]:
    """Sort by name; of texts that differ only in case and white space, keep the first."""
    kept: dict[str, Docstring] = {}
    for docstring in sorted(docstrings, key=lambda d: (d.name, d.summary, d.body)):
        kept.setdefault(normalise_text(docstring.text), docstring)
    return list(kept.values())


# The cache


def _save_cached(path: Path, docstrings: Iterable[Docstring]) -> None:
    """Write a line for each docstring, and before them a hash of them all."""
    lines = "".join(dump_json(asdict(docstring)) + "\n" for docstring in docstrings)
    with replace_file(path) as file:
        file.write(f"{hashlib.sha256(lines.encode()).hexdigest()}\n{lines}")


def _load_cached(path: Path) -> list[Docstring] | None:
    """Return what `_save_cached` wrote; None if it is missing, or damaged, which is told."""
    if not path.exists():
        return None
    with suppress(OSError, ValueError):
        stamp, _, lines = path.read_bytes().partition(b"\n")
        if hashlib.sha256(lines).hexdigest().encode() == stamp:
            return [Docstring(**json.loads(line)) for line in lines.decode().split("\n")[:-1]]
    warn(f"{path} is damaged: it is a cache, and is made again.")
    return None
