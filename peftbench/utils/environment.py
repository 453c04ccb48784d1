"""Environment variables on which a run must not depend: a run's settings are its config's.

accelerate and transformers read variables whenever a Trainer is made. Those of a launcher such as torchrun would join
the runs of its processes into one training, or wait for processes that never start; accelerate's own would change what
is trained. torch reads some that change its arithmetic. All of these are cleared (`clear_settings`), and values that
stop an import are refused (`refuse_values`). `peftbench train` itself reads the variables of torchrun (`read_launch`).

What says where files are (HF_HOME, TORCH_HOME), which devices there are, how many threads and which instructions of the
processor are used, or which network, is the machine's, and kept.
"""

from __future__ import annotations

import codecs
import locale
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
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
    *("TORCHELASTIC_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "TORCHCOMM_"),
    "TQDM_",  # of bars that are hidden; tqdm cannot be imported with a wrong one
)
# What changes the numbers of a run: they are cleared with a line, since somebody wanted something.
ARITHMETIC = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),  # products of float32 with 10 bits, on GPUs
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),  # the same on CPUs
    *("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "PYTORCH_TENSOREXPR_FALLBACK", "TRANSFORMERS_SDPA_FORCE_GQA"),
    *("TORCHINDUCTOR_USE_FAST_MATH", "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG"),
    *("TORCHINDUCTOR_EMULATE_PRECISION_CASTS", "TORCHINDUCTOR_FREEZING"),
    *("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_SUPPRESS_ERRORS"),  # trainer.compile says it
)
OTHERS = (
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",  # would let a pickle of others run code
    *("TORCH_CUDA_SANITIZER", "LOGLEVEL", "PYTORCH_MATCHER_LOGLEVEL"),  # torch cannot be imported with a wrong one
    *("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"),  # 0 forbids to hide them
    *("HYDRA_FULL_ERROR", "HYDRA_DEPRECATION_WARNINGS_AS_ERRORS", "HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE", "OC_CAUSE"),
)
WHOLE, NUMBER = (r"\d*", "a whole number"), (r"(\d+(\.\d*)?)?", "a number")
# Values without which a library cannot be imported: the pattern, what it is, and the library.
VALUES = {
    "HF_HUB_ETAG_TIMEOUT": (*WHOLE, "huggingface_hub"),
    "HF_HUB_DOWNLOAD_TIMEOUT": (*WHOLE, "huggingface_hub"),
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": (*NUMBER, "datasets"),
    "TORCH_DIST_INIT_BARRIER": (*WHOLE, "torch"),
    "TORCH_DISTRIBUTED_DEBUG": ("(?i:OFF|INFO|DETAIL)?", "OFF, INFO or DETAIL", "torch"),
}


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
    """Clear the variables of launchers, and those of `clear_settings`."""
    for name in list(environment):
        if name in CLEARED or name.startswith(CLEARED_BEGINNINGS):
            del environment[name]
    clear_settings(environment)


def clear_settings(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Clear what would change the numbers of a run, or stop it, against its config. Return the former.

    torch reads some of these when it is imported.
    """
    found = [name for name in ARITHMETIC if environment.get(name)]
    for name in (*ARITHMETIC, *OTHERS, *(name for name in list(environment) if name.startswith("TQDM_"))):
        environment.pop(name, None)
    return found


@contextmanager
def keep_environment(*names: str) -> Iterator[None]:
    """After the block, these variables are as before: what is set in it is not what a user has set for all."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def refuse_values(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for values at which the import of a library would end."""
    faults = [
        f"{name}={environment[name]} in the environment is not {what}, and {library} stops at it; unset it."
        for name, (pattern, what, library) in VALUES.items()
        if not re.fullmatch(pattern, environment.get(name, ""))
    ]
    if sys.flags.optimize > 1:
        faults.append("PYTHONOPTIMIZE=2, or python -OO, removes texts that transformers is made of; leave it out.")
    if faults:
        raise UserError(*faults)


def allow_warnings(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have warnings printed where PYTHONWARNINGS or python -W makes errors of them: those of torch are not the user's.

    This holds for this process and its children.
    """
    if any(option.startswith("error") for option in sys.warnoptions):
        sys.warnoptions[:] = ["default"]
        environment["PYTHONWARNINGS"] = "default"
        warnings.simplefilter("default")


def explain_import_error(error: Exception) -> str | None:
    """Return the sentence for an error that has ended the import of torch, if a variable of the user's is the cause."""
    if isinstance(error, ValueError) and "torch" not in sys.modules and (logs := os.environ.get("TORCH_LOGS")):
        return f"TORCH_LOGS={logs} in the environment is not what torch reads there; unset it."
    return None


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
