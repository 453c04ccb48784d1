"""The folder for results that other processes would have to compute again. Imports no heavy package."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import gettempdir

from peftbench.utils.files import expand_home


def find_cache_dir() -> Path:
    """Return `$PEFTBENCH_CACHE`, or `~/.cache/peftbench`; without a home folder, one among the temporary files."""
    if given := os.environ.get("PEFTBENCH_CACHE"):
        return expand_home(given)
    home = expand_home("~")
    return home / ".cache" / "peftbench" if home.is_absolute() else Path(gettempdir()) / "peftbench-cache"
