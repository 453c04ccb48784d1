"""Processes that meet through gloo, and run the cases of a test module together."""

from __future__ import annotations

import faulthandler
import importlib
import pickle
import tempfile
import traceback
from pathlib import Path
from typing import Any

from peftbench.sweeps.fork_server import choose_context
from peftbench.utils.quick_imports import speed_up_imports

PATIENCE = 150  # seconds


def run_together(module: str, names: list[str], size: int = 2) -> list[dict[str, Any]]:
    """The results of a module's functions `case_NAME(team, folder)`, by name, for each process in turn.

    A case that raises has its exception as the result, which must leave the processes able to meet again.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)
    context: Any = choose_context()  # forks that need not import torch each, where there can be some
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, f"{rank}.pickle") for rank in range(size)]
        processes = [
            context.Process(target=_serve, args=(rank, size, store.port, module, names, file), daemon=True)
            for rank, file in enumerate(files)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(PATIENCE)
                assert process.exitcode == 0
        finally:
            for process in processes:
                process.kill()
        return [pickle.loads(file.read_bytes()) for file in files]


def _serve(rank: int, size: int, port: int, module: str, names: list[str], file: Path) -> None:
    faulthandler.dump_traceback_later(PATIENCE - 20, exit=True)
    with speed_up_imports():
        cases = importlib.import_module(module)
        import torch

        from peftbench.training import devices

    torch.set_num_threads(1)
    team = devices.join_processes(torch.distributed.TCPStore("127.0.0.1", port, size, False), rank, size)
    found = {}
    for name in names:
        folder = file.parent / name / str(rank)
        folder.mkdir(parents=True)
        try:
            found[name] = getattr(cases, f"case_{name}")(team, folder)
        except Exception as error:
            traceback.print_exc()
            found[name] = error
    file.write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()
