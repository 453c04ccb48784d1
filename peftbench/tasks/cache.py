"""What is worth keeping between runs: tokenised rows, under a name that is a hash of all that they follow from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset

MIN_ROWS = 2_000  # fewer are tokenised faster than they are found


def cache_dir() -> Path:
    """`$PEFTBENCH_CACHE`, or `~/.cache/peftbench`."""
    return Path(os.environ.get("PEFTBENCH_CACHE") or Path.home() / ".cache" / "peftbench")


def kept(what: dict[str, Any], rows: int, make: Callable[[], Dataset]) -> Dataset:
    """The Dataset that `make` gives, from the cache where another run has made it.

    Args:
        what: JSON values that the Dataset follows from, and nothing else does.
        rows: how many are read to make it.
    """
    if rows < MIN_ROWS:
        return make()
    folder = cache_dir() / "tokens" / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    if folder.is_dir():
        try:
            return Dataset.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError):  # torn by somebody's cleaning up
            shutil.rmtree(folder, ignore_errors=True)
    made = make()
    with suppress(OSError):  # a cache that cannot be written costs seconds, not the run
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            made.save_to_disk(str(unfinished))
            os.rename(unfinished, folder)  # whole or not at all; where another run was faster, its is as good
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return made
