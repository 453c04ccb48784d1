"""What a run must not depend on in its environment: launchers of several processes, and settings of accelerate's.

accelerate and transformers read variables of both kinds whenever a Trainer is made. Those of a launcher such as
torchrun would join the runs of its processes in one training, or wait for processes that never come; accelerate's own
would change what is trained, though the config says otherwise. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from peftbench.utils.errors import UserError

WORLD_SIZE = "WORLD_SIZE"
# Slurm and MPI start processes of any kind, such as a run each: what accelerate would take of theirs is cleared too.
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
    """Have this process, and those that it starts, train by the config alone: clears what would change its runs.

    Raises:
        UserError: a launcher has started it as one of several processes that belong together.
    """
    size = environment.get(WORLD_SIZE, "").strip()
    if size.isdecimal() and int(size) > 1:
        rank = environment.get("RANK", "")
        raise UserError(
            f"{WORLD_SIZE}={size}{f' RANK={rank}' if rank else ''} in the environment makes this one of {size} "
            "processes of a launcher such as torchrun, and a run of peftbench is one process; start it without the "
            f"launcher, or unset {WORLD_SIZE}. Several runs of a sweep go on at once, on all GPUs, with jobs=auto."
        )
    for name in list(environment):
        if name in CLEARED or name.startswith(CLEARED_BEGINNINGS):
            del environment[name]
