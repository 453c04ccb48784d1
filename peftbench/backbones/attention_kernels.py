"""Selection of torch's kernels for scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def avoid_cudnn_attention() -> Iterator[None]:
    """Disable cuDNN's kernel inside the block.

    In training, its gradient of the queries is NaN for some batches with a mask whose width is 64 modulo 128 (one batch
    in 460 of `scripts/pretrain.py`). From 2.11 on, torch uses it by default on Hopper (pytorch#196678). The other
    kernels are correct. In prediction cuDNN makes a plan for each new shape, and the keys are longer with each token.
    """
    enabled: Callable[[], bool] = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
