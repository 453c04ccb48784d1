"""Caches between runs: tokenised rows on disk, under a hash of everything that determines them, and in memory the data
that the last runs of this process have read and prepared."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from datasets import Dataset

from peftbench.config.stamps import stamp_content
from peftbench.utils.cache_dir import find_cache_dir
from peftbench.utils.errors import UserError, warn

T = TypeVar("T")

RECENT = 2  # values in memory: enough for a sweep over two tasks or two backbones
STAMP = ".stamp"  # a hash of the other files of a cached Dataset: Arrow would read any bytes, to the process's end
MIN_ROWS = 2_000  # tokenising fewer rows is faster than reading them from the cache


class Recent(Generic[T]):
    """The `RECENT` most recently used values, each under a key that determines it."""

    def __init__(self) -> None:
        self.values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value under `key`, made by `make` if absent; the oldest is dropped before a new one is made."""
        if key not in self.values:
            while len(self.values) >= RECENT:
                self.values.popitem(last=False)
            self.values[key] = make()
        self.values.move_to_end(key)
        return self.values[key]


def cache_dataset(what: dict[str, Any], rows: int, make: Callable[[], Dataset]) -> Dataset:
    """Return the Dataset that `make` returns, from the cache if another run has made it.

    Args:
        what: JSON values that determine the Dataset.
        rows: how many rows it is made from.
    """
    if rows < MIN_ROWS:
        return make()
    folder = find_cache_dir() / "tokens" / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    if folder.is_dir():
        try:
            if (folder / STAMP).read_text(encoding="utf-8") == stamp_content(folder):
                return Dataset.load_from_disk(str(folder))
            warn(f"{folder} is damaged: it is a cache, and is made again.")
        except (OSError, ValueError, UserError):  # an earlier version made it, or somebody has deleted files
            pass
        shutil.rmtree(folder, ignore_errors=True)
    made = make()
    with suppress(OSError):  # a cache that cannot be written costs seconds, not the run
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            made.save_to_disk(str(unfinished))
            (unfinished / STAMP).write_text(stamp_content(unfinished), encoding="utf-8")
            os.rename(unfinished, folder)  # atomic; if another run was faster, its folder is as good
            made = Dataset.load_from_disk(str(folder))  # memory-mapped: many processes share the system's copy
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return made
