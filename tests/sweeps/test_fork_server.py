"""Workers are forks of a server that has imported torch for them, if that is the same as importing it themselves."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftbench.cli import train
from peftbench.cli.main import main
from peftbench.sweeps import fork_server, preload
from peftbench.sweeps.fork_server import PRELOADED, choose_context
from peftbench.sweeps.workers import _set_environment
from peftbench.utils.errors import UserError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no fork server elsewhere")
SERVED = "from multiprocessing import forkserver; from peftbench.sweeps import fork_server; "


def forget_server() -> None:
    from multiprocessing import forkserver  # which not every system has

    # Nothing public stops it. Python's own tests do it so, and its stubs leave it out.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    fork_server._started_with = fork_server._answer = None


@pytest.fixture
def own_server() -> Iterator[None]:
    """No server yet: earlier tests of this process may have started theirs with variables that are gone since."""
    forget_server()
    yield
    forget_server()


def tell(file: str, variables: dict[str, str]) -> None:
    """What a worker finds, as the main function of a process."""
    preloaded = PRELOADED in sys.modules and "torch" in sys.modules
    _set_environment(variables)
    import torch

    told = {"preloaded": preloaded, "threads": torch.get_num_threads(), "variables": dict(os.environ)}
    Path(file).write_text(json.dumps(told), encoding="utf-8")


@pytest.mark.slow  # the server imports torch and transformers
@pytest.mark.usefixtures("own_server")
@pytest.mark.parametrize("threads", ["1", "3", "2,1"])
def test_a_worker_is_a_fork_with_variables_of_its_own(threads: str, tmp_path: Path) -> None:
    context: Any = choose_context()
    assert context.get_start_method() == "forkserver"
    variables = {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "GPU-b"}
    process = context.Process(target=tell, args=(str(tmp_path / "told"), variables))
    process.start()
    process.join()
    told = json.loads((tmp_path / "told").read_text(encoding="utf-8"))
    assert told == {"preloaded": True, "threads": int(threads[0]), "variables": variables}


@pytest.mark.slow  # the server imports torch and transformers
@pytest.mark.parametrize("change", ["another cache", "a variable more", "a variable less"])
def test_with_other_variables_workers_import_themselves(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries read them when they are imported."""
    choose_context()
    began = fork_server._started_with
    assert began is not None
    monkeypatch.setattr(fork_server, "_started_with", {**began, "HF_DATASETS_CACHE": "/here"})
    if change != "a variable less":
        monkeypatch.setenv("HF_DATASETS_CACHE", "/there" if change == "another cache" else "/here")
    assert choose_context().get_start_method() == "spawn"


@pytest.mark.slow  # the server imports torch and transformers
@pytest.mark.usefixtures("own_server")
def test_a_thread_or_a_path_of_the_users_is_no_other_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:/elsewhere")
    assert choose_context().get_start_method() == "forkserver"


@pytest.mark.parametrize("lost", ["the package", "the source"])
def test_a_server_of_another_package_is_not_used(lost: str, tmp_path: Path) -> None:
    """A folder that is called peftbench lies where the command is typed, or the server is not ours."""
    given = {fork_server.PATH: json.dumps(sys.path)} if lost == "the source" else {}
    given |= {fork_server.SOURCE: str(tmp_path / "peftbench" / "__init__.py"), fork_server.PARENT: str(os.getpid())}
    told = subprocess.run(
        [sys.executable, "-c", f"from {PRELOADED} import USABLE; import sys; print(USABLE, 'torch' in sys.modules)"],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(("answer", "started"), [(3, False), (0, True), (100, True)])
def test_a_server_that_has_started_cuda_is_not_used(
    answer: int, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3: not initialised, 100: there is no GPU."""

    class Driver:
        def cuDeviceGetCount(self, count: object) -> int:
            return answer

    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        return Driver()

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert preload._has_started_cuda() is started


def test_a_server_ends_with_its_sweep_also_while_it_imports() -> None:
    """Nor does it hold a pipe open: else `peftbench train ... | tail` would wait for it. Its imports take seconds."""
    code = "fork_server.start_fork_server(); print(forkserver._forkserver._forkserver_pid)"
    told = subprocess.run([sys.executable, "-c", SERVED + code], capture_output=True, text=True, check=True)
    pid = int(told.stdout)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        (["-m", "seed=1,2", "jobs=2"], True),
        (["-m", "seed=1", "search=lr3", "jobs=auto"], True),
        (["search=lr3", "jobs=2"], True),
        (["jobs=2"], False),  # one run is trained in the command's own process
        (["-m", "seed=1,2"], False),
        (["-m", "seed=1,2", "jobs=2", "method=none_such"], False),
    ],
)
def test_a_sweep_with_workers_starts_it(words: list[str], starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def stop(points: object) -> None:
        raise UserError("this is the plan")

    monkeypatch.setattr(train, "start_fork_server", lambda: started.append(True))
    monkeypatch.setattr(train, "resolve_points", stop)
    assert main(["train", *words]) == 2
    assert bool(started) is starts


@pytest.mark.slow
def test_modules_where_the_command_is_typed_are_not_imported(tmp_path: Path) -> None:
    """As in the process of the sweep, which is a script elsewhere."""
    (tmp_path / "bin").mkdir()
    code = f"{SERVED}\nif __name__ == '__main__': print(fork_server.choose_context().get_start_method())"
    (tmp_path / "bin" / "sweep.py").write_text(code, encoding="utf-8")
    (tmp_path / "evaluate.py").write_text("raise SystemExit('not this one')", encoding="utf-8")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise ValueError('nor this one')", encoding="utf-8")
    told = subprocess.run([sys.executable, "bin/sweep.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["forkserver"]


@pytest.mark.gpu
def test_forks_use_the_gpu(tmp_path: Path) -> None:
    """What the server imports must not start CUDA, which forks could not use then."""
    code = f"""{SERVED}
def use():
    import torch
    assert "{PRELOADED}" in __import__("sys").modules
    assert torch.ones(3, device="cuda").sum().item() == 3

if __name__ == "__main__":
    context = fork_server.choose_context()
    assert context.get_start_method() == "forkserver"
    processes = [context.Process(target=use) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
"""
    (tmp_path / "sweep.py").write_text(code, encoding="utf-8")
    subprocess.run([sys.executable, str(tmp_path / "sweep.py")], check=True)
