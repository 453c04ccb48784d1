"""The processes that train one run together: one for each device, of which the first leads.

The leader decides, reads and writes; the others compute their share of each batch and leave nothing on disk. They meet
in the same order, through collectives of torch.distributed. At each meeting an error, or Ctrl-C, of one process is
raised in all of them, so that none waits for another that has given up.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from peftbench.utils.errors import LostProcess, print_faults
from peftbench.utils.stopping import defer_stop, is_deferring, stop_if_asked

T = TypeVar("T")

# Between two meetings the leader may read data or score texts for hours. A process that ends is noticed without it.
PATIENCE = timedelta(days=7)
BUCKET = 1 << 26  # elements; tensors are summed together up to so many, because a message of a few MB is slow


class Team:
    """A process alone, for which all meetings are trivial; `Processes` are several."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Return whether this process decides and writes."""
        return self.rank == 0

    def decide(self, function: Callable[[], T]) -> T:
        """Return, in all processes, what the function returns in the leader; the others do not call it."""
        return function()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        return [value]

    def find_highest(self, *numbers: int) -> list[int]:
        """Return the maximum over the processes of each number, without waiting for a GPU."""
        return list(numbers)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place."""

    def copy_leaders(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the leader's, in place."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one process inside the block in all of them."""
        yield

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The others enter the block when the leader has left it: it has then filled the caches."""
        yield

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Inside the block Ctrl-C and a scheduler's signals wait for its end, so that all processes come to the same
        collectives."""
        yield

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Inside the block the processes wait for each other in the middle of computing, as with sharded weights.

        An error of one cannot be told there. It ends the other processes, and Ctrl-C waits for the end of the block.
        """
        yield


ALONE = Team()


class Processes(Team):
    """One of several processes, once torch.distributed has joined them; see `Team`.

    Values, errors and flags take the way of the CPU (gloo), gradients that of the device.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._depth = 0
        self._interrupted = False
        self.broken = False  # an error has left the processes at different places

    def decide(self, function: Callable[[], T]) -> T:
        value: T | None = None
        if self.leads:
            try:
                value = function()
            except BaseException as error:
                self._report(error)
        return self._meet(value)[0]  # type: ignore[return-value]  # the leader's

    def gather(self, value: T) -> list[T]:
        return self._meet(value)

    def find_highest(self, *numbers: int) -> list[int]:
        with self.steady():
            return self._flag(None, numbers)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        with self.steady(), _noticing_losses():
            for bucket in fill_buckets(tensors):
                if len(bucket) == 1:
                    dist.all_reduce(bucket[0])
                    continue
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                dist.all_reduce(flat)
                parts = torch.split(flat, [tensor.numel() for tensor in bucket])
                views = [part.view_as(tensor) for tensor, part in zip(bucket, parts, strict=True)]
                torch._foreach_copy_(bucket, views)

    def copy_leaders(self, tensors: Sequence[Tensor]) -> None:
        self._meet(None)
        with self.steady(), _noticing_losses():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._report(error)
        self._meet(None)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        if not self.leads:
            self._meet(None)
        yield
        if self.leads:
            self._meet(None)

    @contextmanager
    def steady(self) -> Iterator[None]:
        self._depth += 1
        try:
            with defer_stop():
                yield
        finally:
            self._depth -= 1
        if self._depth == 0:
            if self._interrupted:
                self._interrupted = False
                raise KeyboardInterrupt
            if not is_deferring():
                stop_if_asked()

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        with self.steady():
            try:
                with _noticing_losses():
                    yield
            except BaseException as error:
                self.broken = True
                if not self.leads:
                    said = f"process {self.rank + 1} of {self.size}: {type(error).__name__}: {error}"
                    print_faults([said])
                    os._exit(1)
                setattr(error, _TOLD, True)
                raise

    @contextmanager
    def handling_interrupts(self) -> Iterator[None]:
        """Inside the block the first Ctrl-C waits for a meeting to end; later ones are ignored."""
        before = signal.getsignal(signal.SIGINT)
        if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if self._depth:
                self._interrupted = True
            else:
                raise KeyboardInterrupt

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _report(self, error: BaseException) -> NoReturn:
        """Tell the others of an error, and raise what all of them raise; do so once for each error."""
        if not (isinstance(error, LostProcess) or getattr(error, _TOLD, False)):
            self._meet(None, error)
        raise error

    def _meet(self, value: T, error: BaseException | None = None) -> list[T]:
        """Return the values of all processes. Raise the same error in all if one of them has one."""
        with self.steady():
            self._flag(error)
            return _gather_objects(value, self.size)

    def _flag(self, error: BaseException | None, numbers: Sequence[int] = ()) -> list[int]:
        """Return the maximum of each number, of which there are the same in all processes that are here without error.

        This is how every meeting begins, so that one with an error is always understood.
        """
        flags = torch.zeros(FLAGS, dtype=torch.int64)
        flags[0] = int(error is not None)
        flags[1 : 1 + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        with _noticing_losses():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        highest: list[int] = flags.tolist()
        if highest[0]:
            self._raise_worst(error)
        return highest[1 : 1 + len(numbers)]

    def _raise_worst(self, own: BaseException | None) -> NoReturn:
        """Raise in all processes the error of one: Ctrl-C if there is one, else that of the lowest rank."""
        packed = None if own is None else _pack_error(own, self.rank, self.size)
        found = [(rank, each) for rank, each in enumerate(_gather_objects(packed, self.size)) if each is not None]
        rank, raised = next(((rank, each) for rank, each in found if _is_interrupt(each)), found[0])
        error = own if rank == self.rank and own is not None else _unpack_error(raised)
        setattr(error, _TOLD, True)
        raise error


FLAGS = 8  # of a meeting: whether there is an error, and numbers
_GONE = re.compile(r"closed by peer|reset by peer|connection|broken pipe|socket|timed out", re.IGNORECASE)
_TOLD = "_told_to_the_team"  # the attribute of an error that all processes know
Packed = tuple[bytes | None, str, str, bool]  # the pickled error if that works, what it says, traceback, interrupt


class RemoteError(RuntimeError):
    """The traceback of an error in another process."""


def fill_buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in groups of one dtype, in their order, each of at most `BUCKET` elements or of one tensor."""
    buckets: list[list[Tensor]] = []
    last: dict[torch.dtype, tuple[list[Tensor], int]] = {}  # of each dtype, and its elements
    for tensor in tensors:
        bucket, held = last.get(tensor.dtype, ([], BUCKET))
        if held + tensor.numel() > BUCKET:
            bucket, held = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        last[tensor.dtype] = bucket, held + tensor.numel()
    return buckets


def _gather_objects(value: T, size: int) -> list[T]:
    found: list[Any] = [None] * size
    with _noticing_losses():
        dist.all_gather_object(found, value)
    return found


def _pack_error(error: BaseException, rank: int, size: int) -> Packed:
    said = f"{type(error).__name__}: {error}"
    trace = f"in process {rank + 1} of {size}:\n" + "".join(traceback.format_exception(error))
    interrupt = isinstance(error, KeyboardInterrupt)
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # some errors pickle, but cannot be made again
        return None, said, trace, interrupt
    return pickled, said, trace, interrupt


def _is_interrupt(packed: Packed) -> bool:
    return packed[3]


def _unpack_error(packed: Packed) -> BaseException:
    pickled, said, trace, _ = packed
    error: BaseException = RuntimeError(said) if pickled is None else pickle.loads(pickled)
    error.__cause__ = RemoteError(trace)
    return error


@contextmanager
def _noticing_losses() -> Iterator[None]:
    """Turn the error of a collective, whose other side has gone, into a `LostProcess`."""
    try:
        yield
    except RuntimeError as error:
        if not _GONE.search(str(error)):
            raise
        raise LostProcess("another process of this run has ended.") from error
