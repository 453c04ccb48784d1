"""Import torch and transformers quickly. This module imports neither itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def speed_up_imports() -> Iterator[None]:
    """Import torch and transformers in half the time, inside the block.

    They create millions of objects that live as long as the process. The garbage collector would traverse these again
    and again while they are created, and once more at the end. Here it skips them.
    """
    if "torch" in sys.modules:  # the present objects are the caller's
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
