"""Runs of a sweep side by side, in processes that are killed, interrupted and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftbench.cli.main import main
from peftbench.records.record import load_records
from peftbench.sweeps.workers import _Worker
from tests.cli.test_train import SUBPROCESS, records, sentiment, smoke
from tests.live_files import find_live
from tests.sweeps.test_mps import Machine
from tests.sweeps.test_sweeper import SHORT, outcome, replaced

__all__ = ["sentiment", "smoke"]  # fixtures

pytestmark = pytest.mark.slow  # each worker imports torch and transformers

ENDLESS = ["method=lora", "trainer.max_steps=4000", "trainer.checkpoint_minutes=0", "task.baselines=[]", "seed=1,2,3"]


def started(arguments: list[str], *before: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, *SUBPROCESS, "train", "-m", *arguments, "jobs=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def training(folder: Path) -> list[int]:
    """The processes that train a run: a run's metrics have begun, and its lock names who holds it."""
    return [int((file.parent / ".lock").read_text().split()[0]) for file in find_live(folder, "metrics.jsonl")]


def test_runs_side_by_side_are_runs_alone(smoke: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Four runs in two workers, so that each trains two, against one after the other: the same to the bit."""
    arguments = [word for word in smoke if not word.startswith("trainer.max_steps")] + SHORT + ["method=lora,prefix"]
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    assert main(["train", "-m", *replaced(arguments, alone)]) == 0
    capfd.readouterr()
    assert main(["train", "-m", *replaced(arguments, beside), "jobs=2"]) == 0
    printed = capfd.readouterr()
    assert outcome(beside) == outcome(alone) and len(outcome(alone)) == 4
    assert {tuple(record["overrides"][:-2]) for record in records(beside)} == {
        tuple(record["overrides"][:-1]) for record in records(alone)
    }
    lines = printed.out.splitlines()
    assert [line.split(":")[0] for line in lines if " of 4: " in line] == [f"{n} of 4" for n in (1, 2, 3, 4)]
    assert any(line.partition(": ")[2].startswith("method=prefix seed=2: accuracy ") for line in lines), lines
    assert "4 of 4 runs are done" in lines[-1] and "loss" not in printed.out  # no lines of the workers between ours
    logs = sorted((beside / ".sweeps").rglob("worker-*.log"))
    assert all("ready for runs after " in log.read_text(encoding="utf-8") for log in logs)
    assert sum(log.read_text().count("s loss") for log in logs) == 4

    assert main(["train", "-m", *replaced(arguments, beside), "jobs=2"]) == 0
    assert "4 of 4 runs are done, 4 of them before" in " ".join(capfd.readouterr().out.split())
    assert sorted((beside / ".sweeps").rglob("worker-*.log")) == logs  # nothing to do, no worker


def test_one_that_fails_stops_no_other(smoke: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*smoke, "method=lora", "task.baselines=[]", "modified_representation.layers=[99],[0],[1]"]
    assert main(["train", "-m", *arguments, "jobs=2"]) == 1
    assert sorted(record["status"] for record in records(tmp_path / "outputs")) == ["done", "done", "failed"]
    printed = capfd.readouterr()
    assert "modified_representation.layers" in printed.err and "Traceback" not in printed.err
    assert "2 of 3 runs are done. 1 failed; retry=true" in " ".join(printed.out.split())


@pytest.mark.parametrize("to", ["the parent", "all, as a terminal does"])
def test_ctrl_c_ends_all(to: str, smoke: list[str], tmp_path: Path) -> None:
    process = started([*smoke, *ENDLESS])
    try:
        until(lambda: len(training(tmp_path)) == 2)
        workers = training(tmp_path)
        (os.killpg if to.startswith("all") else os.kill)(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 130 and "Traceback" not in error, error
    assert [record["status"] for record in records(tmp_path / "outputs")] == ["interrupted"] * 2
    assert "0 of 3 runs are done. 3 unfinished; the same line goes on" in " ".join(out.split())
    assert not any(map(psutil.pid_exists, workers))


def test_a_sweep_in_the_background_of_a_script_is_not_interrupted(smoke: list[str], tmp_path: Path) -> None:
    """A shell has what a script starts with & ignore Ctrl-C, and its workers are part of that."""
    process = started([*smoke, *ENDLESS], "sh", "-c", 'trap "" INT; exec "$@"', "sh")
    try:
        until(lambda: len(training(tmp_path)) == 2)
        workers = training(tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(3)
        assert process.poll() is None and training(tmp_path) == workers
        assert all(map(psutil.pid_exists, workers))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_no_orphans_train_on(smoke: list[str], tmp_path: Path) -> None:
    process = started([*smoke, *ENDLESS])
    until(lambda: len(training(tmp_path)) == 2)
    workers = training(tmp_path)
    process.kill()
    process.wait()
    until(lambda: not any(map(psutil.pid_exists, workers)))
    found, _ = load_records(tmp_path / "outputs")
    assert [record.status for record in found] == ["interrupted"] * 2


def test_a_worker_that_is_killed_is_replaced(smoke: list[str], tmp_path: Path) -> None:
    """As the system does to one that takes too much memory: its run is unfinished, the others are not touched."""
    settings = ["method=lora", "trainer.max_steps=4000,2", "task.baselines=[]", "seed=1,2"]
    process = started([*smoke, *settings])
    try:
        until(lambda: len(training(tmp_path)) == 2)  # the two long runs, which come first
        for pid in training(tmp_path):
            os.kill(pid, signal.SIGKILL)
        _, error = process.communicate(timeout=120)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 1
    assert error.count("the process of this run was ended by SIGKILL") == 2
    found, _ = load_records(tmp_path / "outputs")
    assert {(record.trainer["max_steps"], record.status) for record in found} == {(4000, "interrupted"), (2, "done")}
    assert len(found) == 4


def test_mps_that_serves_nobody_is_left(
    smoke: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A GPU is listed and a daemon starts, but no CUDA program gets through: mps=auto trains as without it."""
    machine = Machine(tmp_path)
    machine.script("nvidia-smi", "echo 0, GPU-none, 143000")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    assert main(["train", "-m", *smoke, "method=lora", "task.baselines=[]", "seed=1,2", "jobs=2", "mps=auto"]) == 0
    assert machine.said() == ["-d", "quit -t 10"]
    assert [record["status"] for record in records(tmp_path / "outputs")] == ["done"] * 2
    said = capfd.readouterr().out
    assert "2 runs, 2 at once; what" in said and "mps=auto: GPU GPU-none cannot be used through it" in said


def test_a_worker_that_died_between_two_runs_is_started_again(tmp_path: Path) -> None:
    worker = _Worker({}, {}, tmp_path / "log")
    worker.start()
    worker.admit(True)
    assert worker.process is not None
    first = worker.process.pid
    worker.start()
    assert worker.process.pid == first  # it lives
    assert worker.kill() == -signal.SIGKILL
    worker.start()
    assert worker.process.pid != first
    worker.dismiss()
    worker.join(120)
    assert worker.process.exitcode == 0 and "ready for runs after " in (tmp_path / "log").read_text()
