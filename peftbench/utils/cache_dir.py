"""The folder for results that other processes would have to compute again. Imports no heavy package."""

from __future__ import annotations

import os
from pathlib import Path


def find_cache_dir() -> Path:
    """Return `$PEFTBENCH_CACHE`, or `~/.cache/peftbench`."""
    return Path(os.environ.get("PEFTBENCH_CACHE") or Path.home() / ".cache" / "peftbench")
