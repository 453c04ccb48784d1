"""Parts of a user's own for tests: the example folder of the docs, and modules that a test writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peftbench.config import own_parts

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "own_parts"


@contextmanager
def importable(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> Iterator[None]:
    """Inside the block, modules in these folders can be imported; none of them is left over from another test."""
    monkeypatch.setattr(sys, "path", [*sys.path, *map(str, folders)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before = set(sys.modules)
    forget_classes()
    yield
    for name in set(sys.modules) - before:
        if any(str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)) for folder in folders):
            del sys.modules[name]
    forget_classes()


def forget_classes() -> None:
    """Have classes be looked up again."""
    own_parts.load_class.cache_clear()
    own_parts._import_part.cache_clear()
