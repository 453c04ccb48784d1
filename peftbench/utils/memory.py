"""Out-of-memory errors: how to recognise them, how to free memory before a second try. Pausing garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that the memory of a device, or of the machine, is not enough."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def make_room() -> None:
    """Free unreferenced memory. Call it after the `except` block, because its error keeps all computed tensors
    alive."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def pause_collection() -> Iterator[None]:
    """Pause Python's garbage collector inside the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
