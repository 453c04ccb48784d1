"""Where is kept on disk what another process would have to find out again. Imports nothing of weight."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$PEFTBENCH_CACHE`, or `~/.cache/peftbench`."""
    return Path(os.environ.get("PEFTBENCH_CACHE") or Path.home() / ".cache" / "peftbench")
