"""Environment variables on which a run must not depend: those of multi-process launchers, and accelerate's settings.

accelerate and transformers read variables of both kinds whenever a Trainer is made. Those of a launcher such as
torchrun would join the runs of its processes into one training, or wait for processes that never start. Accelerate's
own would change what is trained, against the config. `peftbench train` itself reads those of torchrun (`read_launch`).
"""

from __future__ import annotations

import codecs
import locale
import os
import socket
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass

from peftbench.utils.errors import UserError

WORLD_SIZE = "WORLD_SIZE"
# Slurm and MPI start any processes, such as one per run: their variables that accelerate reads are cleared, too.
CLEARED = {
    *(WORLD_SIZE, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *("FORK_LAUNCHED", "SMDATAPARALLEL_LOCAL_RANK", "SM_HP_MP_PARAMETERS", "SM_FRAMEWORK_PARAMS"),
}
CLEARED_BEGINNINGS = (
    *("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_"),
    *("TORCHELASTIC_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_"),
)


def run_alone(environment: MutableMapping[str, str] = os.environ) -> None:
    """Clear the variables that would change runs of this process and of its children: only the config counts.

    Raises:
        UserError: a launcher has started this process as one of several that belong together.
    """
    if _count_processes(environment) > 1:
        raise UserError(
            f"{_describe_process(environment)} processes of a launcher such as torchrun, but only peftbench train "
            f"works as several processes; start this without the launcher, or unset {WORLD_SIZE}."
        )
    clear_launch(environment)


def read_as_utf8(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have this process and its children read files as UTF-8 in the locale C too, for which Python may take ASCII.

    Our own files name their encoding, but not all files that torch reads when it is imported do.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name != "ascii":
        return
    environment["PYTHONUTF8"] = "1"
    with suppress(locale.Error):  # a system without this locale
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def clear_launch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Clear the variables that accelerate would read."""
    for name in list(environment):
        if name in CLEARED or name.startswith(CLEARED_BEGINNINGS):
            del environment[name]


@dataclass(frozen=True)
class Launch:
    """This process as one of those that torchrun has started for one command."""

    rank: int
    size: int
    local_rank: int  # among the processes of this machine
    host: str  # of the store through which they meet
    port: int
    hosted: bool  # torchrun has opened the store, not the process of rank 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return what torchrun has made this process; None if it is alone.

    Raises:
        UserError: it is one of several processes of another launcher, or they cannot meet.
    """
    size = _count_processes(environment)
    if size < 2:
        return None
    instead = "use torchrun, or trainer.devices= without a launcher"
    if not any(name.startswith("TORCHELASTIC_") for name in environment):
        raise UserError(
            f"{_describe_process(environment)} processes, but torchrun has not started them; {instead}, or unset "
            f"{WORLD_SIZE}."
        )
    numbers = {name: environment.get(name, "") for name in ("RANK", "LOCAL_RANK", "MASTER_PORT")}
    missing = [name for name, value in numbers.items() if not value.isdecimal()]
    missing += [] if environment.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if missing:
        raise UserError(
            f"{_describe_process(environment)} processes, but the environment lacks {', '.join(missing)}; {instead}."
        )
    rank, local_rank, port = (int(value) for value in numbers.values())
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    launch = Launch(rank, size, local_rank, environment["MASTER_ADDR"], port, hosted)
    if launch.hosted:
        _require_store(launch)
    return launch


def _require_store(launch: Launch) -> None:
    """Raise UserError if nobody answers where torchrun's processes meet."""
    try:
        socket.create_connection((launch.host, launch.port), timeout=0.8).close()
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={launch.host} MASTER_PORT={launch.port}: nobody answers there ({error}), so this process "
            f"cannot meet the other {launch.size - 1} of {WORLD_SIZE}={launch.size}; start all of them by torchrun."
        ) from None


def _count_processes(environment: Mapping[str, str]) -> int:
    size = environment.get(WORLD_SIZE, "").strip()
    return int(size) if size.isdecimal() else 1


def _describe_process(environment: Mapping[str, str]) -> str:
    """Return the beginning of a sentence about a process of several."""
    size, rank = environment[WORLD_SIZE].strip(), environment.get("RANK", "")
    return f"{WORLD_SIZE}={size}{f' RANK={rank}' if rank else ''} in the environment makes this one of {size}"
