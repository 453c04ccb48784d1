"""NVIDIA's Multi-Process Service (`mps`): the runs of a sweep that share a GPU compute on it in parallel.

Without it a GPU gives each process a slice of its time. peftbench starts its own daemon, which runs for as long as a
sweep's workers. The daemon's pipes are in its own folder, which the workers find in their environment.

    python -m peftbench.sweeps.mps    starts CUDA as every CUDA program does, and prints why that fails
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peftbench.utils.console import say
from peftbench.utils.errors import UserError

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
DEFAULT_PIPES = Path("/tmp/nvidia-mps")
# The same parent folder as that one: paths of sockets have at most 107 characters, and TMPDIR may be too long.
PARENT = DEFAULT_PIPES.parent
ERROR = "CUDA error"
NOT_READY = 807  # CUDA_ERROR_MPS_SERVER_NOT_READY: it starts, or waits for its clients to end after one has failed
PATIENCE = 60.0  # seconds for the daemon to start, and for its server to be ready
# The shell waits here until its input ends. With -t, servers whose clients hang are terminated too, after 10 seconds.
AT_THE_END = f'cat; echo "quit -t 10" | {CONTROL}; rm -rf "${PIPES}"'
QUIT_S = 20.0


class UnusableError(Exception):
    """The reason why runs cannot share their GPUs through MPS."""


def is_wanted(mode: bool | str, places: Sequence[Mapping[str, str]]) -> bool:
    """Return whether workers at these places need a daemon of ours.

    Args:
        mode: the key `mps`.
        places: the place of each worker, see `places.assign_places`.

    Raises:
        UserError: `mps=true`, but no daemon is possible.
    """
    if mode is False or len(places) < 2 or _finds_users_own():
        return False
    gpus = Counter(place["CUDA_VISIBLE_DEVICES"] for place in places if "CUDA_VISIBLE_DEVICES" in place)
    if mode is True and not gpus:
        raise UserError("mps=true: the runs of this sweep have no NVIDIA GPU to share; leave it out, or use mps=auto.")
    if max(gpus.values(), default=0) < 2:
        return False
    installed = shutil.which(CONTROL) is not None
    if mode is True and not installed:
        raise UserError(
            f"mps=true: {CONTROL} is not on PATH; it comes with NVIDIA's driver. Install it, or use mps=auto."
        )
    return installed


class Sharing:
    """How the workers of a sweep share their GPUs.

    Args:
        mode: the key `mps`.
        daemon: the one that was started for them, if any.
    """

    def __init__(self, mode: bool | str, daemon: _Daemon | None) -> None:
        self.mode, self.daemon = mode, daemon

    @property
    def environment(self) -> dict[str, str]:
        """What a worker has in its environment from its start, unless `works` is False; empty without MPS."""
        return {} if self.daemon is None else self.daemon.environment

    @cached_property
    def works(self) -> bool:
        """Whether each GPU can be used with that environment. The daemon's server takes seconds to start.

        Raises:
            UserError: `mps=true`, and a GPU cannot.
        """
        if self.daemon is not None:
            try:
                self.daemon.await_gpus()
            except UnusableError as error:
                _do_without(self.mode, error)
                return False
        return True


@contextmanager
def share_gpus(mode: bool | str, places: Sequence[Mapping[str, str]], logs: Path) -> Iterator[Sharing]:
    """Provide a context in which workers at these places can share their GPUs, if `mode` wants it.

    Args:
        logs: the folder for the output of the daemon and its server, `mps/control.log` and `mps/server.log`.

    Raises:
        UserError: `mps=true`, and the daemon does not start.
    """
    with ExitStack() as stack:
        daemon = None
        if is_wanted(mode, places):
            try:
                daemon = stack.enter_context(_run_daemon(places, logs / "mps"))
            except UnusableError as error:
                _do_without(mode, error)
        yield Sharing(mode, daemon)


def _do_without(mode: bool | str, error: UnusableError) -> None:
    """Say why the runs do not share their GPUs. Raises UserError where they must."""
    if mode is True:
        raise UserError(f"mps=true: {error}; mps=false trains without it.") from None
    say(f"mps=auto: {error}; the runs of a GPU take turns.")


def await_gpu(place: Mapping[str, str]) -> None:
    """Wait until a process at this place can use its GPU through MPS; return at once if the place has no MPS.

    If a server accepts no clients, torch sees no GPU, and a run would train on the CPU instead.

    Raises:
        UnusableError: the process cannot use it, or not within `PATIENCE`.
    """
    if PIPES not in place:
        return
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            asked = subprocess.run(
                [sys.executable, "-m", "peftbench.sweeps.mps"],
                env={**os.environ, **place},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:
            raise UnusableError(f"no answer within {PATIENCE:.0f} s") from None
        if asked.returncode == 0:
            return
        said = asked.stdout.strip() or f"exit code {asked.returncode}"
        if not said.startswith(f"{ERROR} {NOT_READY}:") or time.monotonic() > deadline:
            raise UnusableError(said)
        time.sleep(1)


def _finds_users_own() -> bool:
    """Return whether the user has a daemon: one whose folder the environment names, or one that listens."""
    if PIPES in os.environ:
        return True
    if not hasattr(socket, "AF_UNIX"):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        try:
            client.connect(str(DEFAULT_PIPES / "control"))
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):  # refused: the daemon has ended
            return False
        except OSError:  # it listens, but not to us
            return True
    return True


@dataclass(frozen=True)
class _Daemon:
    """A daemon that listens."""

    environment: dict[str, str]  # what its clients need
    gpus: Sequence[str]
    logs: Path

    def await_gpus(self) -> None:
        """Wait until each GPU can be used through it. Raises UnusableError with the first that cannot."""
        with ThreadPoolExecutor(len(self.gpus)) as pool:
            asked = [pool.submit(await_gpu, {**self.environment, "CUDA_VISIBLE_DEVICES": gpu}) for gpu in self.gpus]
        for gpu, answer in zip(self.gpus, asked, strict=True):
            try:
                answer.result()
            except UnusableError as error:
                raise UnusableError(f"GPU {gpu} cannot be used through it ({error}; see {self.logs})") from None


@contextmanager
def _run_daemon(places: Sequence[Mapping[str, str]], logs: Path) -> Iterator[_Daemon]:
    """Run a daemon for the GPUs of these places.

    A shell waits for our end of a pipe to close and then quits the daemon: when the context ends, or when we are
    killed. The shell is in its own session, where a terminal's Ctrl-C does not reach it.

    Raises:
        UnusableError: it does not start.
    """
    logs = logs.resolve()  # the daemon has another working directory
    logs.mkdir(parents=True, exist_ok=True)
    own = {PIPES: tempfile.mkdtemp(prefix="peftbench-mps-", dir=PARENT), LOGS: str(logs)}
    keeper = subprocess.Popen(
        ["sh", "-c", AT_THE_END],
        env={**os.environ, **own},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert keeper.stdin is not None
    try:
        gpus = sorted({place["CUDA_VISIBLE_DEVICES"] for place in places})
        _start_daemon(gpus, own)
        yield _Daemon(own, gpus, logs)
    finally:
        keeper.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(QUIT_S)


def _start_daemon(gpus: Sequence[str], own: Mapping[str, str]) -> None:
    """Start the daemon, which goes into the background by itself once it listens.

    UUIDs name the same GPUs for the daemon and for its clients. Indices would not, because a client's indices count
    only the GPUs that the daemon was given. With indices the daemon is given all GPUs, so that they mean the same as
    for nvidia-smi.
    """
    environment = {**os.environ, **own}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if all(gpu.startswith(("GPU-", "MIG-")) for gpu in gpus):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    try:
        started = subprocess.run(
            [CONTROL, "-d"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise UnusableError(f"{CONTROL} -d did not return within {PATIENCE:.0f} s") from None
    except OSError as error:
        raise UnusableError(f"{CONTROL} cannot be started ({error.strerror})") from None
    if started.returncode:
        said = " ".join(started.stdout.split()) or "no output"
        raise UnusableError(f"{CONTROL} -d ended with exit code {started.returncode} ({said})")


def main() -> int:
    """Use the GPU that the environment names; if that fails, print why. Returns the exit code."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        print(error)
        return 1
    device, context, words = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_char_p()
    steps: list[Callable[[], int]] = [
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
    ]
    for step in steps:
        if code := step():
            cuda.cuGetErrorString(code, ctypes.byref(words))
            print(f"{ERROR} {code}: {(words.value or b'').decode()}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
