"""The process that a sweep's workers are forks of: it imports torch and transformers once, for all of them.

A worker that imports them itself takes seconds for it, more when many start at once, and a gigabyte of memory. The
server (`multiprocessing.forkserver`) imports them while the sweep is planned (preload.py), and each fork has them.

A process that has used a GPU cannot be forked, and a server that was started with other variables is another one. In
these cases, and on other systems than Linux, workers are started from nothing, as by `spawn`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing.context import BaseContext

import peftbench
from peftbench.utils.environment import keep_environment

PRELOADED = "peftbench.sweeps.preload"
SOURCE, PATH, PARENT = "PEFTBENCH_SOURCE", "PEFTBENCH_PATH", "PEFTBENCH_PARENT"  # which package, where modules are
# The server computes nothing: it needs no threads, which a fork would not have. It asks NVML, not CUDA, for GPUs.
QUIET = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONSAFEPATH": "1"}
# On what a worker is: it has its own, and the same sys.path in any case. joblib sets the last one when it is imported.
WITHOUT_EFFECT = {*QUIET, "PYTHONPATH", "KMP_INIT_AT_FORK"}

_started_with: dict[str, str] | None = None  # the variables; None: there is no server of ours
_answer: tuple[dict[str, str], bool] | None = None  # with which variables it was asked, and whether it can be used


def start_fork_server() -> None:
    """Start the server, if there can be one, and return at once, while it imports."""
    global _started_with
    if _started_with is not None or not sys.platform.startswith("linux"):
        return
    from multiprocessing import forkserver  # which not every system has

    _started_with = _list_variables()
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED])
    told = {SOURCE: str(peftbench.__file__), PATH: json.dumps(sys.path), PARENT: str(os.getpid())}
    with keep_environment(*QUIET, *told):
        os.environ.update(QUIET | told)
        forkserver.ensure_running()


def choose_context() -> BaseContext:
    """Return how workers are started: from the server, once it has imported everything, or from nothing."""
    global _answer
    start_fork_server()
    variables = _list_variables()
    if _started_with is None or _started_with.keys() - variables.keys():  # which it has read
        return multiprocessing.get_context("spawn")
    if _answer is None or _answer[0] != variables:
        _answer = variables, _can_be_used(variables)
    return multiprocessing.get_context("forkserver" if _answer[1] else "spawn")


def _can_be_used(variables: dict[str, str]) -> bool:
    """Ask a fork of the server whether it has what workers need."""
    process = multiprocessing.get_context("forkserver").Process(target=_end_with_answer, args=(variables,))
    try:
        process.start()
    except (OSError, EOFError):  # the server has ended
        return False
    process.join()
    return process.exitcode == 0


def _end_with_answer(variables: dict[str, str]) -> None:
    """End a fork of the server: with 0 if it can train as a process with these variables would.

    Libraries set some when they are imported, here too. The server may be that of another package.
    """
    preloaded = sys.modules.get(PRELOADED)
    usable = preloaded is not None and preloaded.USABLE
    same = all(os.environ.get(name) == value for name, value in variables.items())
    os._exit(0 if usable and same else 1)


def _list_variables() -> dict[str, str]:
    """Return the environment on which it depends what an import does."""
    return {name: value for name, value in os.environ.items() if name not in WITHOUT_EFFECT}
