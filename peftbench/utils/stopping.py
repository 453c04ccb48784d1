"""SIGTERM, SIGUSR1 and SIGUSR2: a scheduler such as Slurm will soon end this process.

Where that can be done at any moment, the signal raises `Stopped`, which is recorded as Ctrl-C is. A training is first
taken to the end of its step, and writes a checkpoint. Neither is lost where Python ignores exceptions. Signals belong
to the process, so what was asked is module state.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HEEDED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A scheduler has asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number  # of the signal


class _Asked:
    """What this process has been asked."""

    heeding = False
    deferring = False
    asked: int | None = None  # the number of the signal
    raised = False  # one `Stopped` is enough: its handling must not be interrupted


@contextmanager
def heed_signals() -> Iterator[None]:
    """Raise `Stopped` inside the block when one of the signals comes; only in the main thread, where Python has them.

    An inner block of two changes nothing.
    """
    if _Asked.heeding or threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier, hook = {number: signal.signal(number, _note) for number in HEEDED}, sys.unraisablehook
    _Asked.heeding, _Asked.asked, _Asked.raised = True, None, False
    sys.unraisablehook = lambda ignored: _raise_again(ignored) or hook(ignored)
    try:
        yield
    finally:
        _Asked.heeding = False
        sys.unraisablehook = hook
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def defer_stop() -> Iterator[None]:
    """Only note the signals inside the block, which watches `is_asked`. The outer one of two blocks counts."""
    before = _Asked.deferring
    _Asked.deferring = True
    try:
        yield
    finally:
        _Asked.deferring = before


def is_deferring() -> bool:
    """Return whether signals are only noted now."""
    return _Asked.deferring


def is_asked() -> bool:
    """Return whether one of the signals has come."""
    return _Asked.heeding and _Asked.asked is not None


def stop_if_asked() -> None:
    """Raise `Stopped` if one of the signals has come."""
    if is_asked() and _Asked.asked is not None and not _Asked.raised:
        _Asked.raised = True
        raise Stopped(_Asked.asked)


def describe_ignored_interrupt() -> str | None:
    """Return how to stop this process if Ctrl-C cannot: the shell has it ignored in the background jobs of scripts."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        return None
    return f"Ctrl-C does not reach this process, which runs in the background; kill {os.getpid()} stops it."


def _raise_again(ignored: Any) -> bool:
    """Interrupt this process again, soon, if Python has ignored an interruption, as it does in a callback of a weak
    reference. Return whether it has."""
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        return False
    _Asked.raised = False
    number = signal.SIGINT if _Asked.asked is None else _Asked.asked
    threading.Timer(0.01, _thread.interrupt_main, (number,)).start()
    return True


def _note(number: int, frame: FrameType | None) -> None:
    if _Asked.asked is None:
        _Asked.asked = number
    if not _Asked.deferring:
        stop_if_asked()
