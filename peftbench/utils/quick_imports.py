"""Importing torch and transformers quickly. Imports neither itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports of torch and transformers in half of the time.

    They make millions of objects that live as long as the process. The garbage collector would look through them again
    and again while they are made, and once more at the end; here it passes them over.
    """
    if "torch" in sys.modules:  # the objects that are about are the caller's
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
