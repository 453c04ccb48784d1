"""Training steps as CUDA graphs: `trainer.graphs`.

A step of a small backbone is some thousand kernels of a few microseconds, and Python takes longer to launch them than
the GPU to run them. A CUDA graph launches all of them at once. It is of one shape, and reads and writes the memory with
which it was recorded: so each shape of batch has a graph of its own, a batch is copied to where the graph reads it, and
the gradients of all graphs are added to the same tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from peftbench.errors import UserError

MOST = 64  # graphs, each of a few MB; batches of further shapes are computed without one

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
Key = tuple[tuple[str, torch.Size, torch.dtype], ...]


class Replayed:
    """A step that is computed where the shape of its batch is new, recorded when it comes again, and then replayed.

    The first time stays unrecorded as it compiles and chooses kernels, which no graph may contain.

    Args:
        step: adds the gradients of a batch's loss to those of `parameters`, and returns the loss, which has none. It
            must not wait for the GPU.
        parameters: those that are trained.
        record: gives what replays a function, and the tensor in which each replay leaves the function's outcome.
        required: a step that cannot be recorded is an error; else all are computed from then on.

    Raises:
        UserError: when called, see `required`.
    """

    record: Record | None

    def __init__(
        self,
        step: Callable[[dict[str, Tensor]], Tensor],
        parameters: Iterable[nn.Parameter],
        record: Record | None = None,
        *,
        required: bool = True,
    ) -> None:
        self.step, self.parameters, self.required = step, list(parameters), required
        self.record = record or CudaGraphs()
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.seen: set[Key] = set()
        self.recorded: dict[Key, tuple[dict[str, Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Add the batch's gradients; returns its loss."""
        self._give_gradients()
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if key not in self.recorded and not self._record(key, batch):
            return self.step(dict(batch))
        kept, replay, loss = self.recorded[key]
        for name, tensor in batch.items():
            kept[name].copy_(tensor, non_blocking=True)
        replay()
        return loss.clone()

    def _record(self, key: Key, batch: Mapping[str, Tensor]) -> bool:
        """Record the step for batches of a shape that comes again; whether that was done."""
        if self.record is None or key not in self.seen or len(self.recorded) >= MOST:
            self.seen.add(key)
            return False
        kept = {name: tensor.clone() for name, tensor in batch.items()}
        try:
            self.recorded[key] = (kept, *self.record(lambda: self.step(dict(kept))))
        except UserError:
            if self.required:
                raise
            self.record = None
            return False
        return True

    def _give_gradients(self) -> None:
        """Zeros in the tensors to which all graphs add, where an optimiser step begins and `zero_grad` took them."""
        if all(p.grad is gradient for p, gradient in zip(self.parameters, self.gradients, strict=True)):
            return
        torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient


class CudaGraphs:
    """Records functions as CUDA graphs that share their memory, as they are never replayed at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        cuda: Any = torch.cuda
        self.stream = cuda.Stream()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """The graph's replay and the function's outcome, whose memory the replays write.

        Raises:
            UserError: the function waits for the GPU, or does what else a graph cannot.
        """
        graph: Any = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # a graph cannot use what unrecorded steps leave behind
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream), _no_collection():
            # Other threads, such as one that pins batches, may go on.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                outcome = function()
                graph.capture_end()
            except RuntimeError as error:
                with suppress(RuntimeError):  # that of a recording that failed
                    graph.capture_end()
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UserError(
                    f"trainer.graphs=true: a step of this model cannot be recorded as a CUDA graph ({error}); use "
                    "trainer.graphs=false."
                ) from error
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay, outcome


@contextmanager
def _no_collection() -> Iterator[None]:
    """Objects with GPU memory must not be destroyed in the middle of a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
