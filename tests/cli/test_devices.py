"""One run as several processes, as a user starts, stops and resumes it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from peftbench.cli.main import main
from tests.cli.test_train import SMALL_MAM, SUBPROCESS, records, sentiment, smoke
from tests.finished import save_backbone
from tests.sweeps.test_sweeper import replaced
from tests.tasks.test_completion import tiny_llama
from tests.tasks.test_tasks import byte_level

__all__ = ["sentiment", "smoke"]  # fixtures

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "peftbench"]

# A command whose leading process sends a signal, to itself or to the other one, when it has saved the checkpoint of a
# step: whoever waits for the file from outside may come too late.
STOP = """
import os, sys
from pathlib import Path
import psutil
from peftbench.utils.quick_imports import speed_up_imports

with speed_up_imports():
    from peftbench.training.checkpoint import SaveByTime

file, step, who, number = sys.argv[1:5]
really = SaveByTime.on_save

def on_save(self, args, state, control, **kwargs):
    really(self, args, state, control, **kwargs)
    if state.global_step == int(step):
        (other,) = [each.pid for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]
        Path(file).write_text(str(other))
        os.kill(other if who == "other" else os.getpid(), int(number))

SaveByTime.on_save = on_save
from peftbench.cli.main import main
sys.exit(main(sys.argv[5:]))
"""


def assert_same_runs(folder: Path, expected: Path) -> None:
    """The adapters, metrics and predictions of all runs below two folders are equal but for rounding."""
    files = sorted(file.relative_to(expected) for file in expected.rglob("adapter/*.safetensors"))
    assert files and files == sorted(file.relative_to(folder) for file in folder.rglob("adapter/*.safetensors"))
    for file in files:
        tensors = load_file(folder / file)
        for key, tensor in load_file(expected / file).items():
            assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-4)
        run = file.parent.parent
        lines = [_read_lines(where / run / "metrics.jsonl") for where in (folder, expected)]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
        losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        texts = [(where / run / "predictions.jsonl").read_text() for where in (folder, expected)]
        assert texts[0] == texts[1]


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_torchrun_trains_one_run_of_a_sweep_after_another(smoke: list[str], tmp_path: Path) -> None:
    words = ["train", "-m", "method=lora", "seed=1,2", *smoke, "trainer.max_steps=4"]
    done = subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 2 runs are done") == 1
    assert main(["train", *replaced(words[1:], tmp_path / "alone")]) == 0
    assert_same_runs(tmp_path / "outputs", tmp_path / "alone")
    for record in records(tmp_path / "outputs"):
        assert record["status"] == "done" and record["device"].startswith("2 x cpu")


@pytest.mark.slow
def test_a_run_whose_processes_are_stopped_goes_on_where_it_was(smoke: list[str], tmp_path: Path) -> None:
    """A process is killed at step 3, Ctrl-C ends the run at step 20; the same line goes on each time."""
    words = ["train", *SMALL_MAM, *smoke, "task.baselines=[]", "trainer.max_steps=40"]
    words += ["trainer.checkpoint_minutes=0"]  # 40 checkpoints, which a MAM of the usual size would make one of 38 MB
    words.append("trainer.devices=2")
    outputs = tmp_path / "outputs"

    def stop(at: int, who: str, by: signal.Signals) -> tuple[int, list[str], float]:
        asked = tmp_path / f"{who}.pid"
        line = [sys.executable, "-c", STOP, str(asked), str(at), who, str(int(by)), *words]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not asked.exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        began = time.monotonic()
        said = process.communicate(timeout=60)[1].splitlines()
        seconds = time.monotonic() - began
        other = int(asked.read_text())
        while psutil.pid_exists(other) and time.monotonic() < began + 70:
            time.sleep(0.05)
        assert not psutil.pid_exists(other)
        return process.returncode, said, seconds

    code, said, seconds = stop(3, "other", signal.SIGKILL)
    assert code == 1 and seconds < 15
    assert said == [
        "peftbench: process 2 of the 2 of this run was ended by SIGKILL; the same line goes on with the run."
    ]
    assert records(outputs)[0]["status"] == "interrupted"
    code, said, seconds = stop(20, "leader", signal.SIGINT)
    assert code == 130 and seconds < 15 and said == ["peftbench: interrupted; the same line goes on with this run."]
    assert records(outputs)[0]["status"] == "interrupted"
    done = subprocess.run([*SUBPROCESS, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "goes on from step 20" in done.stdout
    assert main([*replaced(words[:-1], tmp_path / "alone")]) == 0
    assert_same_runs(outputs, tmp_path / "alone")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more", [[], ["trainer.graphs=false", "trainer.padding_free=false"], ["trainer.sharding=full"]]
)
@pytest.mark.parametrize("method", ["mam", "lora"])
def test_two_gpus_train_as_one(method: str, more: list[str], tmp_path: Path) -> None:
    """Over NCCL, with a backbone without dropout: rounding is all that the number of GPUs changes."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    lines = [json.dumps({"source": f"{i} a b c " * (1 + i % 5), "target": f"{i} c"}) for i in range(40)]
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "validation", "test"):
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    model = save_backbone(tmp_path / "llama", tiny_llama(pad_token_id=1), byte_level())
    words = ["train", "task=text_to_text", f"task.data_dir={data}", "model=llama", f"model.path={model}"]
    words += [f"method={method}", "bottleneck=4", "debug=smoke"]
    words += ["task.baselines=[]", "trainer.max_steps=20", "trainer.batch_size=5", "trainer.precision=fp32", *more]
    together = [*words, "trainer.devices=2", f"output_dir={tmp_path / 'two'}"]
    done = subprocess.run([*SUBPROCESS, *together], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    alone = [word for word in words if "sharding" not in word]
    assert main([*alone, f"output_dir={tmp_path / 'one'}"]) == 0
    assert_same_runs(tmp_path / "two", tmp_path / "one")
    (record,) = records(tmp_path / "two")
    assert record["device"].startswith("2 x ") and "cpu" not in record["device"]
