"""What the server of a sweep's workers imports, see fork_server.py. Importing this module does it."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from importlib import import_module

import peftbench
from peftbench.sweeps.fork_server import PARENT, PATH, SOURCE
from peftbench.utils.quick_imports import speed_up_imports

NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED


def _preload() -> bool:
    """Import what trains; return whether a fork of this process can train with it."""
    source, path, parent = (os.environ.pop(name, "") for name in (SOURCE, PATH, PARENT))
    if not (path and parent) or source != str(peftbench.__file__):  # Python 3.10 looks in the current folder first
        return False
    sys.path[:] = json.loads(path)
    _redirect_output()
    done = threading.Event()
    watcher = threading.Thread(target=_end_with_parent, args=(int(parent), done))
    watcher.start()
    try:
        with speed_up_imports():
            import_module("peftbench.train")
    except Exception:  # the workers will meet it, and say so
        return False
    finally:
        done.set()
        watcher.join()  # a fork would not have it
    return not _has_started_cuda()


def _redirect_output() -> None:
    """Say nothing, and hold no pipe open that the sweep's process writes to. Workers have their logs."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


def _end_with_parent(parent: int, done: threading.Event) -> None:
    """End this process if the sweep ends during the imports; after them, the server itself finds that out."""
    while not done.wait(0.2):
        if os.getppid() != parent:
            os._exit(0)


def _has_started_cuda() -> bool:
    """Return whether this process has started CUDA, which its forks could then not use."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no NVIDIA GPU
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != NOT_INITIALIZED)


USABLE = _preload()
