"""The processes of a run on several devices: how many, how they are started, and how they meet: `trainer.devices`.

This process leads, and starts a process for each further device. Under torchrun it has started all of them, and that of
rank 0 leads. A process that is not the leader obeys (`peftbench.train.obey`): it takes part in one training after
another until the leader ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import connection
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from tqdm import tqdm

from peftbench.backbones.precision import choose_device
from peftbench.config import schema
from peftbench.training.started import serve
from peftbench.utils.environment import Launch, clear_launch
from peftbench.utils.errors import LostProcess, UserError, print_faults
from peftbench.utils.stopping import HEEDED
from peftbench.utils.team import ALONE, PATIENCE, Processes, Team

AUTO = "auto"
VISIBLE = "CUDA_VISIBLE_DEVICES"
OBEY = ("peftbench.train", "obey")  # what a process that does not lead runs
READY_IN = 600.0  # seconds that a started process may take to import torch
GRACE = 10.0  # seconds that the leader has, once a process has died, to end by itself

_launched: list[Processes] = []  # the team of torchrun, once this process has joined it


def count_devices(settings: schema.Trainer) -> int:
    """Return `trainer.devices`, with `auto` as the number of visible GPUs, or 1 without any.

    Raises:
        UserError: there are fewer GPUs.
    """
    gpus = torch.cuda.device_count() if choose_device(settings).type == "cuda" else None
    if settings.devices == AUTO:
        return max(1, gpus or 1)
    number = int(settings.devices)
    if gpus is not None and number > gpus:
        raise UserError(
            f"trainer.devices={number}, but torch sees {gpus} GPU{'' if gpus == 1 else 's'} here; use "
            f"trainer.devices={AUTO}, which takes all of them."
        )
    return number


@contextmanager
def form_team(settings: schema.Trainer) -> Iterator[Team]:
    """Provide the processes that train a run together: those of torchrun, or those that `trainer.devices` starts.

    Raises:
        UserError: as `count_devices`; torchrun has started another number of processes; or one device is to shard.
        LostProcess: one of those that were started here has died.
    """
    if _launched:
        (team,) = _launched
        if settings.devices not in ("1", AUTO, str(team.size)):
            raise UserError(
                f"trainer.devices={settings.devices}, but torchrun has started {team.size} processes; leave "
                "trainer.devices out."
            )
        if team.broken:
            raise LostProcess("the processes of torchrun no longer meet; the same line goes on with the other runs.")
        yield team
    elif (number := count_devices(settings)) == 1:
        if settings.sharding is not schema.Sharding.none:
            raise UserError("trainer.sharding=full needs several devices; give trainer.devices=2, or use torchrun.")
        yield ALONE
    else:
        with _start_processes(number, choose_device(settings).type == "cuda") as team:
            yield team


@contextmanager
def lead(launch: Launch) -> Iterator[None]:
    """Inside the block, this process of torchrun leads the others; afterwards it dismisses them."""
    clear_launch()
    choose_own_gpu(launch.local_rank)
    team: Processes | None = join(launch)
    assert team is not None
    _launched.append(team)
    try:
        with team.handling_interrupts():
            yield
    except LostProcess as error:
        print_faults([str(error)])
        team.broken = True
    finally:
        _launched.clear()
        with suppress(LostProcess):
            if not team.broken:
                team.decide(lambda: None)  # an order to end
                dist.destroy_process_group()
                team = None
        if team is not None:  # others wait for this process, or are gone; torchrun ends those that are left
            sys.stdout.flush()
            os._exit(1)


def follow(launch: Launch) -> int:
    """Obey the leader of a command that torchrun has started, until it ends; return the exit code."""
    clear_launch()
    choose_own_gpu(launch.local_rank)
    prepare_to_obey(os.getppid())
    try:
        _obey(join(launch))
    except LostProcess:  # the leader has said why
        os._exit(1)  # without waiting for those that are gone
    dist.destroy_process_group()  # a process that ends without it may hang
    return 0


def join(launch: Launch) -> Processes:
    """Join the processes of torchrun."""
    store = TCPStore(launch.host, launch.port, launch.size, not launch.hosted and launch.rank == 0, PATIENCE)
    return join_processes(PrefixStore("peftbench", store), launch.rank, launch.size)


def choose_own_gpu(index: int) -> None:
    """Let this process see only the GPU of that index among those visible, before CUDA is initialised."""
    visible = os.environ.get(VISIBLE)
    names = [name.strip() for name in visible.split(",")] if visible is not None else None
    if names is None:
        os.environ[VISIBLE] = str(index)
    elif names not in ([""], ["-1"]):
        os.environ[VISIBLE] = names[index] if index < len(names) else ""


def join_processes(store: Store, rank: int, size: int) -> Processes:
    """Join the processes that meet at a store.

    Raises:
        UserError: a variable of the environment names a network that is not there; or there are too few GPUs.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        given = [
            f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(("GLOO_", "NCCL_", "TP_"))
        ]
        if not given:
            raise
        reason = str(error).split("\n")[0].rpartition("] ")[2]
        raise UserError(f"{', '.join(given)}: the processes of this run cannot meet so ({reason}).") from error
    team = Processes(rank, size)
    with team.together():
        if len(set(team.gather(torch.cuda.is_available()))) > 1:
            raise UserError(f"There are fewer GPUs here than the {size} processes that torchrun has started.")
    return team


@contextmanager
def _start_processes(number: int, cuda: bool) -> Iterator[Processes]:
    """Start the processes of ranks 1, 2, ... on this machine, and end them after the block: they write nothing."""
    store = TCPStore("127.0.0.1", 0, number, True, PATIENCE, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    names = (os.environ.get(VISIBLE) or ",".join(map(str, range(number)))).split(",")
    threads = torch.get_num_threads()
    processes: list[BaseProcess] = []
    pipes = []
    torch.set_num_threads(max(1, threads // number))
    team: Processes | None = None
    try:
        for rank in range(1, number):
            ours, theirs = context.Pipe(duplex=False)
            place = {"OMP_NUM_THREADS": str(max(1, threads // number))}
            place |= {VISIBLE: names[rank]} if cuda else {}
            process = context.Process(target=serve, args=(theirs, place, store.port, rank, number), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        for each, pipe in zip(processes, pipes, strict=True):
            connection.wait([pipe, each.sentinel], READY_IN)
            if not pipe.poll():
                raise LostProcess(_describe_death(processes, each))
        team = join_processes(store, 0, number)
        ended = threading.Event()
        threading.Thread(target=_watch, args=(processes, ended), daemon=True).start()
        try:
            with team.handling_interrupts():
                yield team
        except LostProcess as error:
            team.broken = True
            dead = _find_dead(processes, patience=2.0)
            raise LostProcess(_describe_death(processes, dead)) from error
        finally:
            ended.set()
    finally:
        torch.set_num_threads(threads)
        for each in processes:
            each.kill()
        for each in processes:
            each.join()
        if team is not None:
            _leave_ended_group()


def _leave_ended_group() -> None:
    """Leave the group of processes that have ended, whatever they were doing.

    NCCL ends a communicator only when all processes do, so that `destroy_process_group` would wait here for ever.
    """
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if torch.cuda.is_available() and abort is not None:
        abort()
    else:
        dist.destroy_process_group()


def obey_starter(port: int, rank: int, number: int) -> None:
    """Obey the process that has started this one and waits at the port."""
    store = TCPStore("127.0.0.1", port, number, False, PATIENCE)
    with suppress(LostProcess):
        _obey(join_processes(store, rank, number))


def prepare_to_obey(parent: int) -> None:
    """Leave the terminal, Ctrl-C and a scheduler's signals to the leader. End when the process `parent` ends."""
    tqdm.set_lock(threading.RLock())  # its own, a semaphore, would be reported as leaked when this process is killed
    for number in (signal.SIGINT, *HEEDED):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module, function = OBEY
    getattr(import_module(module), function)


def _obey(team: Processes) -> None:
    module, function = OBEY
    getattr(import_module(module), function)(team)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _watch(processes: list[BaseProcess], ended: threading.Event) -> None:
    """End this process if another one has died and the collective that this one waits in does not notice."""
    connection.wait([process.sentinel for process in processes])
    if not ended.wait(GRACE):
        dead = _find_dead(processes, patience=0.0)
        print_faults([_describe_death(processes, dead)])
        os._exit(1)


def _find_dead(processes: list[BaseProcess], patience: float) -> BaseProcess | None:
    """Return the process that died: it has ended, or ends within `patience` seconds.

    Those that waited for it end too, with exit code 0, and may have done so before this process looks.
    """
    found = connection.wait([process.sentinel for process in processes], patience)
    ended = [process for process in processes if process.sentinel in found]
    for process in ended:
        process.join()
    return next((process for process in ended if process.exitcode), ended[0] if ended else None)


def _describe_death(processes: list[BaseProcess], dead: BaseProcess | None) -> str:
    if dead is None:
        return "another process of this run has ended."
    dead.join()
    code, number = dead.exitcode or 0, processes.index(dead) + 2
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"process {number} of the {len(processes) + 1} of this run {how}; the same line goes on with the run."
