"""A Slurm of one machine: sbatch, squeue, scontrol and srun as commands, and a controller that runs the tasks.

The state is a folder, $FAKE_SLURM: a file for each task, and requests to preempt one, `preempt/TASK` with a signal.
USR2 is the warning before a time limit, after which the task itself asks to be queued again. TERM is a preemption: the
task has a grace time, is killed, and is queued again. KILL is a node that fails.

    install(FOLDER)                        writes the commands into FOLDER/bin
    python fake_slurm.py COMMAND ...       is one of them, but for squeue
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "squeue", "scontrol", "srun")
GRACE_S = 4.0


@contextmanager
def install(folder: Path, at_once: int = 2) -> Iterator[dict[str, str]]:
    """Provide the variables with which a process finds this Slurm, while its controller runs."""
    (folder / "bin").mkdir(parents=True)
    for name in ("tasks", "preempt", "requeue"):
        (folder / name).mkdir()
    for command in COMMANDS:
        script = folder / "bin" / command
        line = f'{shlex.quote(sys.executable)} {__file__} {command} "$@"'
        if command == "squeue":  # asked all the time: without a process of Python's for each
            line = f"ls {shlex.quote(str(folder / 'tasks'))}"
        script.write_text(f"#!/bin/sh\nexec {line}\n")
        script.chmod(0o755)
    found = {"FAKE_SLURM": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    controller = subprocess.Popen(
        [sys.executable, __file__, "controller", str(at_once)], env={**os.environ, **found}, start_new_session=True
    )
    try:
        yield found
    finally:
        controller.send_signal(signal.SIGTERM)
        controller.wait(30)


def _state() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def sbatch(script: str) -> int:
    text = Path(script).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, flags=re.MULTILINE))
    job = str(1 + len(list(_state().glob("*.sh"))))
    (_state() / f"{job}.sh").write_text(text)
    (_state() / f"{job}.json").write_text(json.dumps(options))
    array = re.fullmatch(r"0-(\d+)%\d+", options["array"]) if "array" in options else None
    for index in range(int(array[1]) + 1) if array else [None]:
        name = job if index is None else f"{job}_{index}"
        (_state() / "tasks" / name).write_text("PENDING")
    print(f"Submitted batch job {job}")
    return 0


def scontrol(what: str, task: str) -> int:
    assert what == "requeue"
    (_state() / "requeue" / task).touch()
    return 0


def srun(*words: str) -> int:
    options, command = [word for word in words if word.startswith("-")], list(words)
    while command[0].startswith("--"):
        command = command[2:] if command[0] in ("--output", "--error") else command[1:]
    given = dict(pairwise(words))
    task, job = os.environ.get("SLURM_ARRAY_TASK_ID", ""), os.environ["SLURM_JOB_ID"]
    array = os.environ.get("SLURM_ARRAY_JOB_ID", job)
    for name, number in (("--output", 1), ("--error", 2)):
        if name in options:
            path = given[name].replace("%A", array).replace("%a", task).replace("%t", "0").replace("%j", job)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.execvp(command[0], command)


class Controller:
    """Runs tasks in the order of their submission."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.preempted: dict[str, float] = {}  # when they will be killed
        self.starts: dict[str, int] = {}

    def serve(self) -> None:
        """Until this process is told to end."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            while True:
                self._step()
                time.sleep(0.1)
        finally:
            for process in self.running.values():
                os.killpg(process.pid, signal.SIGKILL)

    def _step(self) -> None:
        for request in (_state() / "preempt").iterdir():
            if request.name in self.running:
                kind = request.read_text()
                request.unlink()
                self._signal(request.name, kind)
        for name, due in list(self.preempted.items()):
            if name in self.running and time.monotonic() > due:
                os.killpg(self.running[name].pid, signal.SIGKILL)
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                asked = _state() / "requeue" / name
                if asked.exists() or (self.preempted.pop(name, None) is not None and process.returncode < 0):
                    asked.unlink(missing_ok=True)
                    (_state() / "tasks" / name).write_text("PENDING")
                else:
                    (_state() / "tasks" / name).unlink()
        waiting = [task.name for task in (_state() / "tasks").iterdir() if task.read_text() == "PENDING"]
        for name in sorted(waiting, key=lambda name: [int(part) for part in name.split("_")]):
            if len(self.running) < self.at_once:
                self._start(name)

    def _signal(self, name: str, kind: str) -> None:
        if kind == "USR2":
            # Slurm signals the processes of the step, not the shell around them, which exec has replaced here
            os.kill(self.running[name].pid, signal.SIGUSR2)
        else:
            self.preempted[name] = time.monotonic() + (GRACE_S if kind == "TERM" else 0)
            if kind == "TERM":
                os.kill(self.running[name].pid, signal.SIGTERM)

    def _start(self, name: str) -> None:
        array, _, index = name.partition("_")
        self.starts[name] = self.starts.get(name, 0) + 1
        (_state() / "tasks" / name).write_text("RUNNING")
        variables: dict[str, Any] = {"SLURM_JOB_ID": 1000 * int(array) + int(index) if index else array}
        if index:  # one run alone is no array
            variables |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index}
        variables |= {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0}
        variables |= {"SLURM_NTASKS": 1, "SLURM_JOB_NUM_NODES": 1, "SLURM_JOB_NODELIST": "here"}
        variables |= {"SLURM_RESTART_COUNT": self.starts[name] - 1}
        script = (_state() / f"{array}.sh").read_text().replace("\nsrun ", "\nexec srun ")
        self.running[name] = subprocess.Popen(
            ["bash", "-c", script],
            env={**os.environ, **{key: str(value) for key, value in variables.items()}},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "controller":
        Controller(int(arguments[0])).serve()
    else:
        sys.exit(globals()[command](*arguments))
