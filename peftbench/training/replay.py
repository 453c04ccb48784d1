"""Training steps as CUDA graphs: `trainer.graphs`.

A step of a small backbone consists of some thousand kernels of a few microseconds, and Python takes longer to launch
them than the GPU takes to run them. A CUDA graph launches all of them at once. It has one shape, and reads and writes
the memory with which it was recorded. Therefore each shape of batch has its own graph, a batch is copied to the memory
that the graph reads, and the gradients of all graphs are added to the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftbench.utils.errors import UserError
from peftbench.utils.memory import pause_collection

MOST = 64  # graphs, each of a few MB; batches of further shapes are computed without one

Key = tuple[tuple[str, torch.Size, torch.dtype], ...]


class Recorder(Protocol):
    """Records functions, and computes other functions meanwhile."""

    memory: int  # maximum so far of the bytes that the recordings hold between replays

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return a function that replays `function`, and the tensor in which each replay leaves its result.

        Raises:
            UserError: it cannot be recorded.
        """

    def compute(self, function: Callable[[], Tensor]) -> Tensor:
        """Return the function's result."""

    def release(self) -> None:
        """Release the memory of all recordings, which are not replayed again."""


class Replayed:
    """A step that is computed when its batch's shape is new, recorded when the shape comes again, and then replayed.

    The first time is not recorded, because it compiles and chooses kernels, which no graph may contain.

    Args:
        step: adds the gradients of a batch's loss to those of `parameters`, and returns the loss, without a gradient.
            It must not wait for the GPU.
        parameters: the trained parameters.
        recorder: records the step; by default with CUDA.
        required: a step that cannot be recorded is an error. Otherwise all steps are computed from then on, also if
            there is not enough memory for a recording.

    Raises:
        UserError: when called, see `required`.
    """

    recorder: Recorder | None
    failure: str | None = None  # why no step is recorded any more

    def __init__(
        self,
        step: Callable[[dict[str, Tensor]], Tensor],
        parameters: Iterable[nn.Parameter],
        recorder: Recorder | None = None,
        *,
        required: bool = True,
    ) -> None:
        self.step, self.parameters, self.required = step, list(parameters), required
        self.recorder = recorder or CudaGraphs()
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.seen: set[Key] = set()
        self.recorded: dict[Key, tuple[dict[str, Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Add the batch's gradients; return its loss."""
        self._give_gradients()
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if key not in self.recorded and not self._record(key, batch):
            if self.recorder is None:
                return self.step(dict(batch))
            return self.recorder.compute(lambda: self.step(dict(batch)))
        kept, replay, loss = self.recorded[key]
        for name, tensor in batch.items():
            kept[name].copy_(tensor, non_blocking=True)
        replay()
        return loss.clone()

    def release(self) -> None:
        """Release the memory of all recordings; later batches are recorded again."""
        self.recorded.clear()
        if self.recorder is not None:
            self.recorder.release()

    def _record(self, key: Key, batch: Mapping[str, Tensor]) -> bool:
        """Record the step for batches of a shape that comes again; return whether that was done."""
        if self.recorder is None or key not in self.seen or len(self.recorded) >= MOST:
            self.seen.add(key)
            return False
        kept = {name: tensor.clone() for name, tensor in batch.items()}
        try:
            self.recorded[key] = (kept, *self.recorder.record(lambda: self.step(dict(kept))))
        except (UserError, torch.OutOfMemoryError) as error:
            if self.required:
                raise
            self.recorder, self.failure = None, str(error).splitlines()[0]
            self.recorded.clear()
            return False
        return True

    def _give_gradients(self) -> None:
        """Put zeros in the tensors to which all graphs add, if `zero_grad` removed them at the start of a step."""
        if all(p.grad is gradient for p, gradient in zip(self.parameters, self.gradients, strict=True)):
            return
        torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient


class CudaGraphs:
    """Records functions as CUDA graphs that share their memory, because they are never replayed at the same time.

    Computations between two replays may write that memory too. They do so once there is a graph, so that a training
    takes no second share of the GPU for the batches that it does not replay. Tensors that the first pass leaves for all
    later ones, such as weights in another dtype, are outside the graphs' memory.
    """

    def __init__(self) -> None:
        cuda: Any = torch.cuda
        self.pool, self.stream = cuda.MemPool(), cuda.Stream()
        self.graphs = self.held = self.memory = 0

    def compute(self, function: Callable[[], Tensor]) -> Tensor:
        """Return the function's result."""
        if self.graphs == 0:
            return function()
        torch.cuda.empty_cache()  # allocations for a pool do not reuse the unused memory of other pools by themselves
        # The backward pass must run in this thread, whose allocations are the pool's.
        with (
            self._growing(),
            self._stream(),
            torch.autograd.set_multithreading_enabled(False),
            torch.cuda.use_mem_pool(self.pool),
        ):
            outcome = function()
        return outcome.clone()  # a graph may overwrite it

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return the graph's replay and the function's result, whose memory the replays write.

        Raises:
            UserError: the function waits for the GPU, or does something else that a graph cannot do.
        """
        graph: Any = torch.cuda.CUDAGraph()
        generator: Any = torch.cuda.default_generators[torch.cuda.current_device()]
        random = generator.clone_state()
        torch.cuda.empty_cache()  # a graph cannot use the memory that unrecorded steps leave unused
        torch.cuda.synchronize()
        # Objects with GPU memory must not be destroyed in the middle of a recording.
        with self._growing(), self._stream(), pause_collection():
            # Other threads, such as one that pins batches, may continue.
            graph.capture_begin(pool=self.pool.id, capture_error_mode="thread_local")
            try:
                outcome = function()
                graph.capture_end()
            except RuntimeError as error:
                with suppress(RuntimeError):  # raised if the recording failed
                    graph.capture_end()
                generator.graphsafe_set_state(random)  # as torch left it, it would give numbers only to recordings
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UserError(
                    f"trainer.graphs=true: a step of this model cannot be recorded as a CUDA graph ({error}); use "
                    "trainer.graphs=false."
                ) from error
        self.graphs += 1
        return graph.replay, outcome

    def release(self) -> None:
        """Release the memory of all graphs, which no longer exist."""
        self.pool, self.graphs, self.held = type(self.pool)(), 0, 0
        torch.cuda.empty_cache()

    @contextmanager
    def _growing(self) -> Iterator[None]:
        """Count the memory that is taken from the GPU inside the block as the graphs'."""
        before = torch.cuda.memory_reserved()
        yield
        self.held += max(0, torch.cuda.memory_reserved() - before)
        self.memory = max(self.memory, self.held)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """Inside the block, the GPU works in the graphs' stream, after all that was launched before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)
