"""Worker processes that train several runs of a sweep at once, each one run after another.

A worker starts when there is a run for it, and stays for the next ones: it keeps the rows and tokens of its runs
(tasks/cache.py). Where it can be, it is a fork of a process that has imported torch (fork_server.py). The locks of the
runs' folders settle who trains what. When a worker dies its run fails, and another worker takes its place; when the
parent dies, all workers end.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, TracebackType

from peftbench.sweeps.fork_server import choose_context
from peftbench.sweeps.jobs import Ended, Job, take_ready, train_attempt
from peftbench.sweeps.mps import Sharing, UnusableError, await_gpu
from peftbench.utils.console import say
from peftbench.utils.files import open_unlinked
from peftbench.utils.quick_imports import speed_up_imports
from peftbench.utils.stopping import Stopped

PATIENCE = 60.0  # seconds that a worker has, when it is interrupted, to note it in its run's record


class Workers:
    """Processes that train jobs side by side, one at each place; a context manager that ends them all.

    Args:
        places: for each worker, what it finds in its environment before it imports torch.
        logs: the folder for what they print, `worker-1.log` and so on.
        sharing: how they share their GPUs.
    """

    def __init__(self, places: Sequence[dict[str, str]], logs: Path, sharing: Sharing) -> None:
        self.logs, self.sharing = logs, sharing
        self.workers = [
            _Worker(place, sharing.environment, logs / f"worker-{number}.log")
            for number, place in enumerate(places, start=1)
        ]

    def __enter__(self) -> Workers:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def run(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, Ended]]:
        """Train the jobs; yield each with how it ended, in the order in which they end.

        A job is taken from `jobs` when a worker is free, and when what ended before has been yielded. None stands for
        no job now: free workers ask again when the next run has ended.

        Raises:
            UserError: the GPUs must be shared, and cannot be.
        """
        waiting, free = iter(jobs), list(self.workers)
        busy: dict[Connection, tuple[_Worker, Job]] = {}

        def give_out() -> None:
            chosen = []
            for worker, job in zip(free, take_ready(waiting, len(free)), strict=False):
                worker.start()
                chosen.append((worker, job))
            del free[: len(chosen)]
            works = self.sharing.works  # which takes seconds the first time, as the imports of the workers do
            for worker, job in chosen:
                worker.admit(works)
                worker.give(job)
                busy[worker.pipe] = (worker, job)

        give_out()
        while busy:
            for pipe in connection.wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker, job = busy.pop(pipe)
                yield job, worker.take()
                free.append(worker)
                give_out()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        started = [worker for worker in self.workers if worker.process is not None]
        try:
            for worker in started:
                worker.dismiss()
                if error is not None:
                    worker.interrupt(error)
            for worker in started:
                worker.join(PATIENCE)
        finally:  # a second Ctrl-C ends the patience
            for worker in started:
                worker.kill()


class _Worker:
    """The parent's end of one worker."""

    pipe: Connection

    def __init__(self, place: dict[str, str], sharing: dict[str, str], log: Path) -> None:
        self.place, self.sharing, self.log = place, sharing, log
        self.process: BaseProcess | None = None
        self.works: bool | None = None  # what it was admitted with

    def start(self) -> None:
        """Start a process, if none lives."""
        if self.process is not None:
            if self.process.is_alive():
                return
            self.pipe.close()
        context = choose_context()
        self.pipe, theirs = context.Pipe()
        variables = dict(os.environ)  # a fork has those of its server
        self.process = context.Process(  # type: ignore[attr-defined]  # each context has one
            target=_serve_jobs, args=(theirs, variables, self.place, self.sharing, str(self.log))
        )
        self.process.start()
        theirs.close()  # so that our end sees it when the worker dies
        if self.works is not None:
            self._send(self.works)

    def admit(self, works: bool) -> None:
        """Let the worker use its GPU; `works`: as it was meant to share it."""
        if self.works is None:
            self.works = works
            self._send(works)

    def give(self, job: Job) -> None:
        self._send(job)

    def dismiss(self) -> None:
        self._send(None)

    def _send(self, message: object) -> None:
        with suppress(OSError):  # it has died; `take` finds out
            self.pipe.send(message)

    def take(self) -> Ended:
        """How the job ended that it was given last. A worker that has died is replaced."""
        try:
            ended: Ended = self.pipe.recv()
        except (EOFError, OSError):
            code = self._replace()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return Ended(faults=(f"the process of this run {how}; its last words are in {self.log}.",))
        if ended.last:
            self._replace()
        return ended

    def _replace(self) -> int:
        """Start another process in the place of one that ends; returns that one's exit code."""
        self.join(PATIENCE)
        code = self.kill()  # what hangs in its exit holds its GPU
        self.start()
        return code

    def join(self, seconds: float) -> None:
        """Wait for the process to end, but not longer."""
        assert self.process is not None
        self.process.join(seconds)

    def kill(self) -> int:
        """Kill the process if it lives; returns its exit code."""
        assert self.process is not None
        self.process.kill()
        self.process.join()
        return self.process.exitcode or 0

    def interrupt(self, error: BaseException) -> None:
        """End the worker as this process is ended: by Ctrl-C, or by a scheduler, for whom runs write a checkpoint."""
        assert self.process is not None
        pid = self.process.pid
        if os.name != "posix":
            self.process.terminate()
        elif self.process.is_alive() and pid is not None:
            os.kill(pid, signal.SIGTERM if isinstance(error, Stopped) else signal.SIGINT)


def _serve_jobs(
    pipe: Connection, variables: dict[str, str], place: dict[str, str], sharing: dict[str, str], log: str
) -> None:
    """Train the jobs from the pipe until None comes. This is the main function of a worker process."""
    _set_environment({**variables, **place, **sharing})
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # which it is if a script started the sweep with &
        signal.signal(signal.SIGINT, _handle_interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open_unlinked(Path(log), "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a TextIOWrapper, over file 1
    began = time.monotonic()
    try:
        # At once: each takes seconds, and the GPU is asked in a process of its own.
        with ThreadPoolExecutor(1) as pool, speed_up_imports():
            asked = pool.submit(_await_admission, pipe, place, sharing)
            import_module("peftbench.train")
            imported = time.monotonic() - began
        asked.result()
        say(f"ready for runs after {time.monotonic() - began:.1f} s, of which its imports took {imported:.1f} s")
        while (job := pipe.recv()) is not None:
            say(f"\nrun {job.number}: {' '.join(job.overrides)}")
            ended = train_attempt(job.run, job.overrides, wait=job.wait, trial=job.trial)
            for sentence in ended.faults:
                say(f"peftbench: {sentence}")
            usable = _free_gpu()
            pipe.send(replace(ended, last=not usable))
            if not usable:
                return
    except (KeyboardInterrupt, EOFError, OSError):  # the parent knows, or has ended
        pass
    except UnusableError as error:
        sys.exit(f"peftbench: the GPU cannot be used through MPS: {error}.")


def _set_environment(variables: dict[str, str]) -> None:
    """Give this process the environment of a worker, before CUDA is first used, which reads it then."""
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
    threads = variables.get("OMP_NUM_THREADS", "").partition(",")[0]  # then come those of nested regions
    if "torch" in sys.modules and threads.isdecimal():
        sys.modules["torch"].set_num_threads(int(threads))  # torch had read the server's


def _await_admission(pipe: Connection, place: dict[str, str], sharing: dict[str, str]) -> None:
    """Wait until this process may use its GPU, and can."""
    works = pipe.recv()
    if works is None:  # dismissed before there was a job
        raise EOFError
    if works:
        await_gpu({**place, **sharing})
    else:
        for name in sharing:  # before CUDA is first used, which reads it then
            os.environ.pop(name, None)


def _handle_interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C reaches a worker from the terminal and from its parent; once is enough, and the record must be written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """End this process when its parent is killed. Its run can be resumed from the last checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _free_gpu() -> bool:
    """Free the GPU memory of the run that ended, for the other workers.

    Returns whether this process can still use its GPU: after a fault in a kernel no call succeeds.
    """
    import torch

    gc.collect()
    try:
        torch.cuda.empty_cache()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it without types
            torch.cuda.synchronize()
    except RuntimeError as error:
        say(f"peftbench: this process has lost its GPU: {error}")
        return False
    return True
