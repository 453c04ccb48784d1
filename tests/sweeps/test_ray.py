"""A sweep on a Ray cluster of two nodes on this machine, one of which is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from peftbench.cli.main import main
from peftbench.records.record import load_records
from tests.cli.test_train import SUBPROCESS
from tests.live_files import find_live

WORDS = ["task=doctopic", "debug=smoke", "method=bitfit", "task.baselines=[]"]
PORT = 6391


def test_without_ray_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("peftbench.sweeps.executors.find_spec", lambda name: None)
    assert main(["train", "-m", *WORDS, "seed=1,2", "hydra/launcher=ray", f"output_dir={tmp_path / 'outputs'}"]) == 2
    assert "hydra/launcher=ray needs ray, which is missing: pip install peftbench[ray]." in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[int]]:
    """The ids of the processes that hold the two nodes; each node has room for one run."""
    pytest.importorskip("ray")
    ray = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--num-cpus=1",
        "--block",
        "--node-ip-address=127.0.0.1",
    ]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    head = ["--head", f"--port={PORT}", "--include-dashboard=false", "--temp-dir=/tmp/peftbench-ray"]
    started = []
    for words in (head, [f"--address=127.0.0.1:{PORT}"]):
        log = tmp_path / f"node-{len(started)}.log"
        with log.open("w") as file:
            command = [*ray, "--object-store-memory=80000000", *words]
            started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True))
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert started[-1].poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
    try:
        yield [process.pid for process in started]
    finally:
        for process in reversed(started):
            with suppress(psutil.NoSuchProcess):
                for member in family(process.pid):
                    member.kill()
            process.wait(30)


@pytest.mark.slow
def test_the_run_of_a_lost_node_goes_on_elsewhere(nodes: list[int], tmp_path: Path) -> None:
    """The node that is killed trains a run whose checkpoint the other node goes on from: no step is trained twice."""
    runs = tmp_path / "runs"
    more = ["trainer.max_steps=80", "trainer.checkpoint_minutes=0", "seed=1,2,3", f"output_dir={runs}"]
    settings = ["hydra/launcher=ray", f"hydra.launcher.address=127.0.0.1:{PORT}"]
    process = subprocess.Popen(
        [*SUBPROCESS, "train", "-m", *WORDS, *more, *settings], stdout=subprocess.PIPE, text=True
    )
    deadline, lost = time.monotonic() + 240, None
    while process.poll() is None:
        assert time.monotonic() < deadline
        for file in [] if lost else find_live(runs, "metrics.jsonl"):
            members = family(nodes[1])
            training = int((file.parent / ".lock").read_text().split()[0]) in [member.pid for member in members]
            if training and 15 <= len(file.read_text().splitlines()) < 70:
                lost = file.parent.name
                for member in members:
                    with suppress(psutil.NoSuchProcess):
                        member.kill()
        time.sleep(0.1)
    out = process.communicate()[0]
    assert process.returncode == 0 and "3 of 3 runs are done" in out, out
    starts = {}
    for record in load_records(runs)[0]:
        lines = [json.loads(line) for line in (record.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 81))
        starts[record.run] = [attempt.step for attempt in record.attempts]
    assert lost is not None and len(starts) == 3
    first, second = starts.pop(lost)
    assert first == 0 and 15 <= second < 80 and list(starts.values()) == [[0], [0]]
