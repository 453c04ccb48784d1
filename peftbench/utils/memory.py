"""Memory that runs out: which errors say so, and what is done before a second try. Times without garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device's memory, or the machine's, is not enough."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def make_room() -> None:
    """Give back what nothing refers to. Call it behind the `except`, whose error holds on to all that was computed."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python's garbage collector waits."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
