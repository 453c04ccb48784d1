"""Which of torch's kernels of scaled_dot_product_attention a run uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_cudnn_attention() -> Iterator[None]:
    """Inside, cuDNN's kernel is not used.

    In training its gradient of the queries is NaN for some batches with a mask whose width is 64 modulo 128, and torch
    takes it by default on Hopper from 2.11 on (pytorch#196678; one batch in 460 of `scripts/pretrain.py`). The others
    are right. In prediction it makes a plan for each shape that is new, and keys are longer with each token.
    """
    enabled: Callable[[], bool] = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
