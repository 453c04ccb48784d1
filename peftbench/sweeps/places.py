"""The number of runs of a sweep that run at once (`jobs`), and the GPU and cores that each of them uses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from joblib import cpu_count
from psutil import virtual_memory

from peftbench.config.schema import Device, Run
from peftbench.records.record import load_records
from peftbench.utils.errors import UserError
from peftbench.utils.files import expand_home

GIB = 1 << 30
RUN_BYTES = 16 * GIB  # GPU memory for a run if nothing is known yet
CONTEXT_BYTES = GIB  # GPU memory that each process takes before it trains
MARGIN = 1.25  # factor on the memory that an earlier run of the same task and backbone took
HOST_BYTES = 3 * GIB  # main memory for a worker: the libraries, the rows, a small backbone
MOST_ON_A_GPU = 8
CORES_OF_A_RUN = 2  # per run on a GPU: one launches its kernels, one prepares batches and writes


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use: its name in CUDA_VISIBLE_DEVICES, and its free memory if it is known."""

    name: str
    free_bytes: int | None = None


def assign_places(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return a place for each run that runs at once: the variables that it finds in its environment before it imports
    torch.

    The GPUs are assigned in turn. With one place, the runs run one after another.

    Raises:
        UserError: `jobs` differs from run to run.
    """
    asked = {run.jobs for run in runs}
    if len(asked) > 1:
        raise UserError(f"jobs={','.join(sorted(asked))}: a sweep has one number of runs at once, not several.")
    gpus = [] if all(run.trainer.device is Device.cpu for run in runs) else list_visible_gpus()
    (jobs,) = asked
    number = min(len(runs), choose_jobs(runs, gpus) if jobs == "auto" else int(jobs))
    threads = max(1, cpu_count() // number)
    return [_build_environment(threads, gpus[index % len(gpus)] if gpus else None) for index in range(number)]


def choose_jobs(runs: Sequence[Run], gpus: Sequence[Gpu]) -> int:
    """Return the number for `jobs=auto`: as many runs as have memory and cores, at least one; on CPUs one per core."""
    most = virtual_memory().available // HOST_BYTES
    if not gpus:
        return int(max(1, min(cpu_count(), most)))
    each = max(_estimate_gpu_bytes(run) for run in runs)
    room = sum(1 if gpu.free_bytes is None else min(MOST_ON_A_GPU, int(gpu.free_bytes // each)) for gpu in gpus)
    return int(max(1, min(cpu_count() // CORES_OF_A_RUN, most, room)))


def list_visible_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that torch would see, by nvidia-smi and CUDA_VISIBLE_DEVICES, without a context on any."""
    listed = _query_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [Gpu(uuid, free) for _, uuid, free in listed]
    found = []
    for name in (word.strip() for word in chosen.split(",")):
        if name in ("", "-1"):  # CUDA stops at the first invalid name
            break
        free = [free for index, uuid, free in listed if name == index or uuid.startswith(name)]
        found.append(Gpu(name, free[0] if free else None))
    return found


def _query_gpus() -> list[tuple[str, str, int]]:
    """Return (index, uuid, free bytes) of each GPU of this machine; nothing if there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in printed.splitlines() if line.strip()]
        return [(index, uuid, int(mebibytes) << 20) for index, uuid, mebibytes in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _estimate_gpu_bytes(run: Run) -> float:
    """Return the GPU memory that a run needs: the most that a recorded run of its task and backbone took, plus a
    margin."""
    folder = expand_home(run.output_dir) / run.task.name / run.model.name
    records = load_records(folder)[0] if folder.is_dir() else []
    taken = [record.peak_memory_bytes for record in records if record.peak_memory_bytes is not None]
    return MARGIN * max(taken) + CONTEXT_BYTES if taken else RUN_BYTES


def _build_environment(threads: int, gpu: Gpu | None) -> dict[str, str]:
    given = {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    environment = {key: os.environ.get(key, value) for key, value in given.items()}  # the user's own number is kept
    return environment if gpu is None else {**environment, "CUDA_VISIBLE_DEVICES": gpu.name}
