"""A daemon for runs that share a GPU: when it is started, for whom, and that it is always quit again.

Its program and a CUDA program's first steps are played by scripts that write down how they are called.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftbench.cli.main import main
from peftbench.sweeps import mps as module
from peftbench.sweeps import places, workers
from peftbench.sweeps.mps import CONTROL, LOGS, PIPES, UnusableError, await_gpu, share_gpus
from peftbench.sweeps.workers import Ended
from peftbench.utils.errors import UserError

TWO_ON_ONE = [{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("GPU-b", "GPU-a", "GPU-b")]
PYTHON = sys.executable
CALL = 'echo "$said;${CUDA_VISIBLE_DEVICES-all};$CUDA_MPS_PIPE_DIRECTORY;$CUDA_MPS_LOG_DIRECTORY" >>'


class Machine:
    """A machine with the control program on PATH, and a Python that reaches its GPU.

    Args:
        control: what the former does after it has noted its call, in shell.
        client: likewise the latter.
    """

    def __init__(self, folder: Path, control: str = "", client: str = "") -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.folder.joinpath("bin").mkdir()
        said = 'if [ "$1" = -d ]; then said=-d; else said=$(cat); fi'
        self.control = self.script(CONTROL, f'{said}; {CALL} {self.calls}; if [ "$1" = -d ]; then {control or ":"}; fi')
        self.python = self.script("python", f"said=client; {CALL} {self.calls}; {client}")

    def script(self, name: str, body: str) -> Path:
        script = self.folder / "bin" / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        return script

    def heard(self) -> list[list[str]]:
        """Of each call: what was said, the GPUs, the folder of the pipes and that of the logs."""
        return [line.split(";") for line in self.calls.read_text().splitlines()] if self.calls.exists() else []

    def said(self) -> list[str]:
        return [call[0] for call in self.heard()]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def make(**behaviour: str) -> Machine:
        made = Machine(tmp_path, **behaviour)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        monkeypatch.setattr(module.sys, "executable", str(made.python))
        return made

    for name in (PIPES, LOGS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "DEFAULT_PIPES", tmp_path / "default")
    monkeypatch.setattr(module, "PARENT", tmp_path)
    return make


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_one_daemon_for_the_gpus_in_use(raised: type[BaseException] | None, machine: Any, tmp_path: Path) -> None:
    made = machine()
    with (
        pytest.raises(raised) if raised else share_gpus(False, [], tmp_path),
        share_gpus("auto", TWO_ON_ONE, tmp_path / "logs") as sharing,
    ):
        own = sharing.environment
        assert made.said() == ["-d"]  # its server starts with its first client, which takes seconds
        assert sharing.works
        pipes = Path(own[PIPES])
        assert own == {PIPES: str(pipes), LOGS: str(tmp_path / "logs" / "mps")}
        assert pipes.parent == tmp_path and pipes.stat().st_mode & 0o777 == 0o700
        at_work = made.heard()
        if raised:
            raise raised
    assert [at_work[0], *sorted(at_work[1:])] == [  # the GPUs are asked at once
        [said, gpus, *own.values()] for said, gpus in (("-d", "GPU-a,GPU-b"), ("client", "GPU-a"), ("client", "GPU-b"))
    ]
    assert made.heard()[len(at_work) :] == [["quit -t 10", "all", *own.values()]]
    assert not pipes.exists()


def test_indices_are_those_of_all_gpus(machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's index counts among the daemon's GPUs, so the daemon gets all of them, not the user's choice."""
    made = machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with share_gpus(True, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "2323"], tmp_path) as sharing:
        assert sharing.works
    first, *asked, last = [call[:2] for call in made.heard()]
    assert (first, last) == (["-d", "all"], ["quit -t 10", "2,3"])
    assert sorted(asked) == [["client", "2"], ["client", "3"]]


@pytest.mark.parametrize("mode", ["auto", True])
@pytest.mark.parametrize("why", ["one run at a time", "a GPU for each", "a daemon of the user's", "one that listens"])
def test_none_where_none_is_needed(
    why: str, mode: bool | str, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = machine()
    at = {"one run at a time": TWO_ON_ONE[:1], "a GPU for each": TWO_ON_ONE[:2]}.get(why, TWO_ON_ONE)
    if why == "a daemon of the user's":
        monkeypatch.setenv(PIPES, "/tmp/theirs")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        if why == "one that listens":
            _listen(server, tmp_path, monkeypatch)
        with share_gpus(mode, at, tmp_path) as sharing:
            assert sharing.works and sharing.environment == {}
    assert made.heard() == []


def test_none_unless_asked_for(machine: Any, tmp_path: Path) -> None:
    with share_gpus(False, TWO_ON_ONE, tmp_path) as sharing:
        assert sharing.environment == {}
    assert machine().heard() == []


def test_what_a_dead_daemon_left_is_none(machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        _listen(server, tmp_path, monkeypatch)
    assert (tmp_path / "default" / "control").exists()
    with share_gpus("auto", TWO_ON_ONE, tmp_path):
        assert "-d" in made.said()


def _listen(server: socket.socket, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a daemon does in its folder. The path is a short one: a socket's has at most 107 characters."""
    (folder / "default").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, "DEFAULT_PIPES", Path("default"))
    server.bind("default/control")
    server.listen()


REFUSED = {
    "no GPU": ({}, "mps=true: the runs of this sweep have no NVIDIA GPU to share; leave it out"),
    "no program": ({}, f"mps=true: {CONTROL} is not on PATH; it comes with NVIDIA's driver"),
    "not started": (
        {"control": "echo no rights; exit 3"},
        f"mps=true: {CONTROL} -d ended with exit code 3 (no rights); mps=false trains without it.",
    ),
    "silent": ({"control": "exit 1"}, "ended with exit code 1 (no output); mps=false"),
    "hangs": ({"control": "exec sleep 5"}, f"mps=true: {CONTROL} -d did not return within 0 s"),
    "no client": (
        {"client": "echo CUDA error 805: no connection; exit 1"},
        "mps=true: GPU GPU-a cannot be used through it (CUDA error 805: no connection; see ",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_said_or_left(
    why: str, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """mps=true says in a sentence why there is no daemon; mps=auto does without, and leaves none behind."""
    behaviour, sentence = REFUSED[why]
    made = machine(**behaviour)
    at = [{"OMP_NUM_THREADS": "1"}] * 2 if why == "no GPU" else TWO_ON_ONE
    if why == "no program":
        made.control.unlink()
    if why == "hangs":
        monkeypatch.setattr(module, "PATIENCE", 0.2)
    with pytest.raises(UserError) as refused, share_gpus(True, at, tmp_path) as sharing:
        assert not sharing.works
    assert len(refused.value.faults) == 1 and sentence in refused.value.faults[0]
    assert capfd.readouterr() == ("", "")
    with share_gpus("auto", at, tmp_path) as sharing:
        assert [sharing.works, sharing.works] == [not sharing.environment] * 2
    told = "" if why in ("no GPU", "no program") else "mps=auto: "
    out, err = capfd.readouterr()
    assert out.startswith(told) and out.count("the runs of a GPU take turns.") == bool(told) and not err
    assert made.said().count("quit -t 10") == (0 if why in ("no GPU", "no program") else 2)
    assert made.said()[-1:] == ([] if why in ("no GPU", "no program") else ["quit -t 10"])
    assert not list(tmp_path.glob("peftbench-mps-*"))


def test_a_server_that_is_not_ready_is_asked_again(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts, or waits for the clients of a GPU on which one has failed: a new worker waits with it."""
    count = 'n=$(grep -c client "${0%/*}/../calls"); '
    made = machine(client=f"{count} test $n = 3 || {{ echo CUDA error 807: not ready; exit 1; }}")
    waited: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 20.0 * len(waited), sleep=waited.append))
    await_gpu({PIPES: "pipes", "CUDA_VISIBLE_DEVICES": "GPU-a"})
    assert made.said() == ["client"] * 3 and len(waited) == 2
    waited.clear()
    with pytest.raises(UnusableError, match="CUDA error 807: not ready"):
        await_gpu({PIPES: "pipes"})  # three clients are noted already
    assert 20.0 * len(waited) > module.PATIENCE and len(waited) == 4
    made.calls.unlink()
    await_gpu({"CUDA_VISIBLE_DEVICES": "GPU-a"})  # without MPS there is nothing to wait for
    assert made.heard() == []


def test_a_server_that_does_not_answer(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(client="exec sleep 5")
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with pytest.raises(UnusableError, match="no answer within 0 s"):
        await_gpu({PIPES: "pipes"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_sweep(number: signal.Signals, machine: Any, tmp_path: Path) -> None:
    """Whatever ends it. A Ctrl-C goes to all processes of the terminal, and the daemon still outlives the workers."""
    made = machine()
    code = f"""
import sys, time
from pathlib import Path
from peftbench.sweeps import mps
mps.PARENT, mps.DEFAULT_PIPES, sys.executable = Path({str(tmp_path)!r}), Path("/nonexistent"), {str(made.python)!r}
with mps.share_gpus(True, {TWO_ON_ONE!r}, Path({str(tmp_path)!r})) as sharing:
    try:
        assert sharing.works
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.2)
        Path({str(made.calls)!r}).open("a").write("the workers have ended\\n")
"""
    process = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    process.wait(60)
    process.stdout.close()
    deadline = time.monotonic() + 60
    while list(tmp_path.glob("peftbench-mps-*")):
        assert time.monotonic() < deadline, made.said()
        time.sleep(0.02)
    ended = ["the workers have ended"] if number is signal.SIGINT else []
    assert made.said() == ["-d", "client", "client", *ended, "quit -t 10"]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_query_gpus", lambda: [])
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.setattr(module, "DEFAULT_PIPES", Path("/nonexistent"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mps=true"], "mps=true: the runs of this sweep have no NVIDIA GPU to share"),
        (["mps=maybe"], "mps=maybe: it must be auto, true or false."),
        (["mps=true,auto"], "mps=auto,true: a sweep has one way to share its GPUs, not several."),
    ],
)
def test_refused_on_the_command_line(
    words: list[str], sentence: str, no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", "seed=1,2", "jobs=2", f"output_dir={tmp_path}", *words]) == 2
    printed = capsys.readouterr().err
    assert sentence in printed and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_worker_that_lost_its_gpu_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in a kernel, which under MPS reaches all processes on the GPU, spoils this process for further runs."""
    events: list[str] = []
    worker = workers._Worker({}, {}, tmp_path / "log")

    def start() -> None:
        events.append("start")
        worker.pipe, theirs = multiprocessing.Pipe()
        worker.process = SimpleNamespace(
            exitcode=0, join=lambda *_: events.append("join"), kill=lambda: events.append("kill")
        )
        theirs.send(Ended(1.0) if len(events) > 1 else Ended(faults=("a fault",), last=True))

    monkeypatch.setattr(worker, "start", start)
    worker.start()
    assert worker.take().faults == ("a fault",)
    assert events == ["start", "join", "kill", "join", "start"]
    assert worker.take() == Ended(1.0) and len(events) == 5


@pytest.mark.parametrize("works", [True, False, None])
def test_a_worker_drops_what_does_not_work(works: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sharing, asked = {PIPES: "pipes", LOGS: "logs"}, []
    for name, value in sharing.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers, "await_gpu", asked.append)
    ours, theirs = multiprocessing.Pipe()
    ours.send(works)
    if works is None:  # the sweep has ended before
        with pytest.raises(EOFError):
            workers._await_admission(theirs, {}, sharing)
        return
    workers._await_admission(theirs, {"CUDA_VISIBLE_DEVICES": "GPU-a"}, sharing)
    assert [name in os.environ for name in sharing] == [works, works]
    assert asked == ([{"CUDA_VISIBLE_DEVICES": "GPU-a", **sharing}] if works else [])


@pytest.mark.parametrize("lost", [False, True])
def test_whether_a_gpu_is_lost_is_seen_after_a_run(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        if lost:
            raise RuntimeError("CUDA error: device-side assert triggered")

    assert workers._free_gpu()  # where there is no GPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert workers._free_gpu() is not lost


@pytest.mark.gpu
def test_processes_share_a_gpu(tmp_path: Path) -> None:
    """The real one: two programs are clients of one server, and one with a fault in a kernel does not spoil it."""
    if shutil.which(CONTROL) is None or module._finds_users_own():
        pytest.skip(f"needs {CONTROL}, and no daemon that is there already")
    gpu = places.list_visible_gpus()[0].name
    program = "import torch; x = torch.arange(8, device='cuda'); print(int(x[x + {}].sum()))"
    right, wrong = program.format(0), program.format(1)

    def start(code: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **place}
        return subprocess.Popen([PYTHON, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)

    with share_gpus(True, [{"CUDA_VISIBLE_DEVICES": gpu}] * 2, tmp_path) as sharing:
        assert sharing.works
        place = {"CUDA_VISIBLE_DEVICES": gpu, **sharing.environment}
        assert [process.communicate(timeout=120)[0] for process in (start(right), start(right))] == ["28\n"] * 2
        ask = {"input": "get_server_list\n", "capture_output": True, "text": True}
        servers = subprocess.run([CONTROL], env={**os.environ, **place}, **ask)
        assert len(servers.stdout.split()) == 1, servers
        fault = start(wrong)
        fault.communicate(timeout=120)
        assert fault.returncode != 0
        await_gpu(place)
        assert start(right).communicate(timeout=120)[0] == "28\n"
    assert not Path(place[PIPES]).exists()
