"""Import torch and transformers quickly. This module imports neither itself."""

from __future__ import annotations

import atexit
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
        freeze_objects()
        gc.enable()


def freeze_objects() -> None:
    """Have the garbage collector skip all present objects, at the end of the process too if that is silent."""
    gc.freeze()
    # Types made with nanobind are printed as leaked, unless the last collection frees them. Triton 3.9's are such
    # types, and importing transformers imports Triton where torch is a CUDA build.
    if any(kind.__module__ == "nanobind" for kind in type.__subclasses__(type)):
        atexit.register(gc.unfreeze)
