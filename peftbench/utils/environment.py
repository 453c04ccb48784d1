"""Environment variables on which a run must not depend: those of multi-process launchers, and accelerate's settings.

accelerate and transformers read variables of both kinds whenever a Trainer is made. Those of a launcher such as
torchrun would join the runs of its processes into one training, or wait for processes that never start. Accelerate's
own would change what is trained, against the config.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

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
    size = environment.get(WORLD_SIZE, "").strip()
    if size.isdecimal() and int(size) > 1:
        rank = environment.get("RANK", "")
        raise UserError(
            f"{WORLD_SIZE}={size}{f' RANK={rank}' if rank else ''} in the environment makes this one of {size} "
            "processes of a launcher such as torchrun, but a run of peftbench is one process; start it without the "
            f"launcher, or unset {WORLD_SIZE}. To train several runs of a sweep at once, on all GPUs, use jobs=auto."
        )
    for name in list(environment):
        if name in CLEARED or name.startswith(CLEARED_BEGINNINGS):
            del environment[name]
