"""One thread for each test process: the models are tiny, and several processes' threads would fight over the cores.

A shell that starts the tests in the background has them ignore Ctrl-C, and the commands that they start would inherit
that, among them those that are to be interrupted.

What is alive once the tests are collected, torch and transformers with their thousands of classes, is there to the end:
the garbage collector need not look through it again and again, nor while it is imported. So is most of what the tests
have imported and cached since, and each training begins with a collection.

Workers of sweeps are forks of one server, as they are for a user, though pytest sets another variable for each test.

Each `torch.manual_seed` keeps the text of the stack for devices that have not started, should that fail. Under pytest
the stack is so deep that this takes a millisecond, and a test of a tiny model, of thirty, seeds two or three times.

Tests marked `gpu` are skipped where there is none, also when another mark has chosen them.
"""

import gc
import os
import signal
from types import SimpleNamespace

import pytest

from peftbench.sweeps import fork_server
from peftbench.utils.quick_imports import freeze_objects

_finished = 0  # tests

gc.disable()
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
fork_server.WITHOUT_EFFECT.add("PYTEST_CURRENT_TEST")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # torch.manual_seed stores the text of the stack for each kind of device that has not begun, a millisecond each
    # time. No test reads it, and these modules' stubs do not name the library that formats it.
    for device in (torch.cuda, torch.xpu, torch.mtia):
        device.traceback = SimpleNamespace(format_stack=list)  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.collect()
    freeze_objects()
    gc.enable()


def pytest_runtest_logfinish() -> None:
    global _finished
    _finished += 1
    if _finished % 100 == 0:
        gc.collect()
        freeze_objects()
