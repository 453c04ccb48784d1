"""The main function of a process that `devices` starts. It imports torch later, and quickly."""

from __future__ import annotations

import multiprocessing
import os
from importlib import import_module
from multiprocessing.connection import Connection

from peftbench.utils.quick_imports import speed_up_imports


def serve(pipe: Connection, place: dict[str, str], port: int, rank: int, number: int) -> None:
    """Say "ready" once torch is imported, then obey the process that has started this one."""
    os.environ.update(place)  # before CUDA is initialised
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    with speed_up_imports():
        devices = import_module("peftbench.training.devices")  # which imports this module
        devices.prepare_to_obey(parent.pid)
    pipe.send("ready")
    devices.obey_starter(port, rank, number)
