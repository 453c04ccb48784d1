"""Measure the time of a training, and of each optimiser step without making the CPU wait for the GPU."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback

Mark = Any  # a torch.cuda.Event, or the seconds of a clock


class Clock:
    """Counts the seconds of a training.

    Args:
        earlier: seconds of the interrupted attempts, up to the checkpoint from which this one resumes.
    """

    def __init__(self, earlier: float = 0.0) -> None:
        self.earlier = earlier
        self._began: float | None = None

    def start(self) -> None:
        """Start this attempt."""
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds so far, of this attempt and the earlier ones."""
        return self.earlier if self._began is None else self.earlier + time.perf_counter() - self._began


class Pace(TrainerCallback):
    """Marks the end of every step and records the seconds between two marks, including the wait for the batch.

    Steps after which something else was done (an evaluation, a checkpoint) are left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.pending: deque[tuple[Mark, Mark]] = deque()
        self.noted: list[float] = []
        self.last: Mark | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        mark = self._mark()
        if self.last is not None:
            self.pending.append((self.last, mark))
        self.last = mark
        while self.pending and self._over(self.pending[0][1]):
            self._note()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.last = None

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.last = None

    def seconds(self) -> list[float]:
        """Return the seconds of each step so far."""
        if self.cuda:
            torch.cuda.synchronize()
        while self.pending:
            self._note()
        return self.noted

    def _mark(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        events: Any = torch.cuda
        event = events.Event(enable_timing=True)
        event.record()
        return event

    def _over(self, mark: Mark) -> bool:
        return not self.cuda or bool(mark.query())

    def _note(self) -> None:
        began, ended = self.pending.popleft()
        self.noted.append(began.elapsed_time(ended) / 1000 if self.cuda else ended - began)
