"""Files of runs that are being trained."""

from __future__ import annotations

import os
from pathlib import Path


def find_live(folder: Path, name: str) -> list[Path]:
    """Return the files of a name below a folder. `rglob` fails where a checkpoint is deleted while it looks there."""
    return [Path(place, name) for place, _, names in os.walk(folder) if name in names]
