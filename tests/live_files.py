"""Files of runs that are being trained, and folders that cannot be looked into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def find_live(folder: Path, name: str) -> list[Path]:
    """Return the files of a name below a folder. `rglob` fails where a checkpoint is deleted while it looks there."""
    return [Path(place, name) for place, _, names in os.walk(folder) if name in names]


def refuse_scan(name: str, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `os.scandir`, on which all walks rest, raise an error in folders of a name."""
    scandir = os.scandir

    def guarded(place: Any) -> Any:
        if Path(place).name == name:
            error.filename = place
            raise error
        return scandir(place)

    monkeypatch.setattr("os.scandir", guarded)
