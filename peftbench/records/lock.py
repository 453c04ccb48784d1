"""One process per run: a lock in the run's folder, which the system releases when its process ends.

The library filelock provides it: flock if the system has it, msvcrt on Windows, and on a file system without either a
file that names its process, which another process takes over once that process is dead.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from peftbench.utils.errors import UserError
from peftbench.utils.files import open_unlinked, refuse_links

FILE = ".lock"
PATIENCE = 1.0  # seconds: longer than `is_held` ever holds a lock while it checks it


class Busy(UserError):
    """Another process is training the run."""


@contextmanager
def hold_run(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the run in `folder`: inside the block no other process trains the run.

    Args:
        wait: wait for as long as another process holds the lock.

    Raises:
        Busy: another process holds the lock, and `wait` is false.
        UserError: there is a symbolic link in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)  # among them the lock itself
    lock = FileLock(folder / FILE)
    try:
        lock.acquire(timeout=-1 if wait else PATIENCE, poll_interval=0.2)
    except Timeout:
        raise Busy(f"{folder} is being trained by {_find_holder(folder)}.") from None
    try:
        if not isinstance(lock, SoftFileLock):  # a soft lock has written the same itself
            with open_unlinked(folder / FILE, "w") as file:
                file.write(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield
    finally:
        if [file.name for file in folder.iterdir()] == [FILE]:  # the run was refused
            _remove(folder)
        lock.release()


def _remove(folder: Path) -> None:
    """Remove a run's folder that contains only the lock that we hold, and the folders METHOD, MODEL and TASK above it
    if they are then empty."""
    with suppress(OSError):  # Windows keeps a file that is open
        (folder / FILE).unlink()
        for place in (folder, *folder.parents[:3]):
            place.rmdir()


def is_held(folder: Path) -> bool:
    """Return whether some process holds the lock of the run in `folder`."""
    if not (folder / FILE).is_file():
        return False
    lock = FileLock(folder / FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a read-only copy of the records
        return False
    lock.release()
    return False


def _find_holder(folder: Path) -> str:
    with suppress(OSError, ValueError):
        pid, host, *_ = (folder / FILE).read_text().split("\n")
        return f"process {int(pid)} on {host}"
    return "another process"
