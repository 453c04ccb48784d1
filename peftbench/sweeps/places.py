"""How many runs of a sweep go on at once (`jobs`), and on which GPU and cores each of them runs. Imports no torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from joblib import cpu_count
from psutil import virtual_memory

from peftbench.config.schema import Device, Run
from peftbench.records.record import load_records
from peftbench.utils.errors import UserError

GIB = 1 << 30
RUN_BYTES = 16 * GIB  # of GPU memory, for a run of which nothing is known yet
CONTEXT_BYTES = GIB  # what each process takes of a GPU before it trains
MARGIN = 1.25  # on what an earlier run of the same task and backbone took
HOST_BYTES = 3 * GIB  # of main memory, for a worker: the libraries, the rows, a small backbone
MOST_ON_A_GPU = 8
CORES_OF_A_RUN = 2  # beside a GPU: one launches its kernels, one prepares batches and writes


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use: its name in CUDA_VISIBLE_DEVICES, and its free memory where it is known."""

    name: str
    free_bytes: int | None = None


def places(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Where each run of a sweep that goes on at once runs, as what it finds in its environment before it imports torch.

    The GPUs are dealt in turn. One place: one run after the other.

    Raises:
        UserError: `jobs` differs from run to run.
    """
    asked = {run.jobs for run in runs}
    if len(asked) > 1:
        raise UserError(f"jobs={','.join(sorted(asked))}: a sweep has one number of runs at once, not several.")
    gpus = [] if all(run.trainer.device is Device.cpu for run in runs) else visible_gpus()
    (jobs,) = asked
    number = min(len(runs), automatic(runs, gpus) if jobs == "auto" else int(jobs))
    threads = max(1, cpu_count() // number)
    return [_environment(threads, gpus[index % len(gpus)] if gpus else None) for index in range(number)]


def automatic(runs: Sequence[Run], gpus: Sequence[Gpu]) -> int:
    """`jobs=auto`: as many runs as have memory and cores, at least one; on CPUs a core for each."""
    most = virtual_memory().available // HOST_BYTES
    if not gpus:
        return int(max(1, min(cpu_count(), most)))
    each = max(_gpu_bytes(run) for run in runs)
    room = sum(1 if gpu.free_bytes is None else min(MOST_ON_A_GPU, int(gpu.free_bytes // each)) for gpu in gpus)
    return int(max(1, min(cpu_count() // CORES_OF_A_RUN, most, room)))


def visible_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that torch would see, as nvidia-smi and CUDA_VISIBLE_DEVICES tell, without a context on any."""
    listed = _listed()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [Gpu(uuid, free) for _, uuid, free in listed]
    found = []
    for name in (word.strip() for word in chosen.split(",")):
        if name in ("", "-1"):  # CUDA stops at the first name that is none
            break
        free = [free for index, uuid, free in listed if name == index or uuid.startswith(name)]
        found.append(Gpu(name, free[0] if free else None))
    return found


def _listed() -> list[tuple[str, str, int]]:
    """(index, uuid, free bytes) of each GPU of this machine; nothing where there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in printed.splitlines() if line.strip()]
        return [(index, uuid, int(mebibytes) << 20) for index, uuid, mebibytes in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _gpu_bytes(run: Run) -> float:
    """What a run needs of a GPU: what the largest recorded one of its task and backbone took, with a margin."""
    folder = Path(run.output_dir).expanduser() / run.task.name / run.model.name
    records = load_records(folder)[0] if folder.is_dir() else []
    taken = [record.peak_memory_bytes for record in records if record.peak_memory_bytes is not None]
    return MARGIN * max(taken) + CONTEXT_BYTES if taken else RUN_BYTES


def _environment(threads: int, gpu: Gpu | None) -> dict[str, str]:
    given = {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    environment = {key: os.environ.get(key, value) for key, value in given.items()}  # the user's own number stands
    return environment if gpu is None else {**environment, "CUDA_VISIBLE_DEVICES": gpu.name}
