"""Commands in forked processes, and what ends them: signals before a change of a file, limits, small disks."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 120.0  # seconds for a command, after which it counts as hung


class Loss(Exception):
    """What a trial lost, as a sentence."""


@dataclass(frozen=True)
class Said:
    """How a command ended: the exit code, negative for a signal, and what it printed."""

    code: int
    out: str
    err: str
    line: str

    @property
    def both(self) -> str:
        return self.out + self.err

    def check(self, codes: Sequence[int] = (0, 1, 2), quiet: bool = False) -> Said:
        """Raise Loss for a traceback, an exit code that is not one of `codes`, or silence."""
        if "Traceback (most recent call last)" in self.both:
            raise Loss(f"traceback: {self.line}\n{self.both[-1500:]}")
        if self.code not in codes:
            raise Loss(f"exit code {self.code}: {self.line}\n{self.both[-800:]}")
        if not self.both.strip() and not quiet:
            raise Loss(f"silent, exit code {self.code}: {self.line}")
        return self


class Child:
    """A command in a forked process.

    Args:
        before: is called in the child, before the command.
    """

    def __init__(self, words: Sequence[str], place: Path, before: Callable[[], None] = lambda: None) -> None:
        self.line = "peftbench " + " ".join(words)
        pipes = [os.pipe() for _ in range(2)]  # a file could be full
        self.ends, self.read = [end for end, _ in pipes], [bytearray(), bytearray()]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            for end, other in pipes:
                os.close(other)
                os.set_blocking(end, False)
            return
        code = 70
        try:
            sys.unraisablehook = sys.__unraisablehook__
            os.setsid()
            os.chdir(place)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, (_, end) in enumerate(pipes, start=1):
                os.dup2(end, number)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="replace", closefd=False)
            sys.argv = ["peftbench", *words]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            from peftbench.cli.main import main

            code = main(list(words))
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(code)

    def wait(self, limit: float = LIMIT) -> Said:
        """Wait for the end; a command that hangs is a Loss."""
        deadline = time.monotonic() + limit
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._drain()
            if pid:
                break
            if time.monotonic() > deadline:
                self.kill(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Loss(f"hung for {limit:.0f} s: {self.line}\n{bytes(self.read[0][-500:] + self.read[1][-500:])!r}")
            time.sleep(0.005)
        for end in self.ends:
            os.close(end)
        out, err = (bytes(part).decode("utf-8", "replace") for part in self.read)
        return Said(os.waitstatus_to_exitcode(status), out, err, self.line)

    def kill(self, number: int) -> None:
        """Send a signal to the command and its own children, if it is still there."""
        for send in (os.killpg, os.kill):
            try:
                send(self.pid, number)
                return
            except ProcessLookupError:
                pass

    def _drain(self) -> None:
        for end, part in zip(self.ends, self.read, strict=True):
            try:
                while more := os.read(end, 1 << 16):
                    part.extend(more)
            except BlockingIOError:
                pass


CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


def die_at_change(number: int, place: Path, count: Callable[[int], Any] = lambda seen: None) -> Callable[[], None]:
    """Return what makes a process kill itself before its `number`-th change below `place`; `count` gets each number."""

    def install() -> None:
        seen = [0]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if not (writes or event in CHANGES) or not os.path.abspath(str(arguments[0])).startswith(str(place)):
                return
            seen[0] += 1
            count(seen[0])
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return install


def limit_files(size: int, deadly: bool) -> Callable[[], None]:
    """Return what ends each write beyond `size` bytes of a file: in the middle of it by a signal, or by EFBIG."""

    def install() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return install


def mount(place: Path, size: int) -> bool:
    """Mount a small file system at a folder; return whether we may."""
    if os.geteuid() or shutil.which("mount") is None:
        return False
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    return done.returncode == 0
