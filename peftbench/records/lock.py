"""One process to a run: a lock in the run's folder, given back by the system when its process ends. Imports no torch.

The library filelock holds it: flock where the system has it, msvcrt on Windows, and on a file system without either a
file that names its process, which is taken over once that process is dead.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from peftbench.utils.errors import UserError

FILE = ".lock"
PATIENCE = 1.0  # seconds: longer than `is_held` ever holds a lock that it looks at


class Busy(UserError):
    """Another process is at the run."""


@contextmanager
def holding(folder: Path, wait: bool = False) -> Iterator[None]:
    """Inside the block no other process is at the run in `folder`.

    Args:
        wait: for as long as another process is at it.

    Raises:
        Busy: another process is at it, and we do not wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / FILE)
    try:
        lock.acquire(timeout=-1 if wait else PATIENCE, poll_interval=0.2)
    except Timeout:
        raise Busy(f"{folder} is being trained by {_holder(folder)}.") from None
    try:
        if not isinstance(lock, SoftFileLock):  # which has written the same itself
            (folder / FILE).write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield
    finally:
        if [file.name for file in folder.iterdir()] == [FILE]:  # the run was refused
            _remove(folder)
        lock.release()


def _remove(folder: Path) -> None:
    """Take away a run's folder with nothing in it but the lock that we hold, and those of METHOD, MODEL and TASK above
    it that are empty then."""
    with suppress(OSError):  # Windows keeps a file that is open
        (folder / FILE).unlink()
        for place in (folder, *folder.parents[:3]):
            place.rmdir()


def is_held(folder: Path) -> bool:
    """Whether some process is at the run in `folder`."""
    if not (folder / FILE).is_file():
        return False
    lock = FileLock(folder / FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a copy of the records that only can be read
        return False
    lock.release()
    return False


def _holder(folder: Path) -> str:
    with suppress(OSError, ValueError):
        pid, host, *_ = (folder / FILE).read_text().split("\n")
        return f"process {int(pid)} on {host}"
    return "another process"
