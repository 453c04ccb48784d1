"""A scheduler that ends a process sends a signal first: the training writes a checkpoint, and goes on from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from peftbench.cli.main import main
from peftbench.config.schema import Device, Keep, Trainer
from peftbench.records.record import find_record
from peftbench.training.checkpoint import StopWhenAsked
from peftbench.utils.stopping import Stopped, defer_stop, heed_signals, stop_if_asked
from tests.cli.test_train import SUBPROCESS
from tests.live_files import find_live
from tests.training.test_checkpoint import Noted, gone_on


def test_a_signal_raises_once_and_is_put_off_where_a_training_is() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGUSR1") as raised, heed_signals():
        with defer_stop():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert True  # Python runs the handler between two lines
        try:
            stop_if_asked()
        except Stopped:
            os.kill(os.getpid(), signal.SIGTERM)  # while the record is written
            stop_if_asked()
            raise
    assert raised.value.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) is before
    with heed_signals():
        stop_if_asked()  # nothing is left of it


@pytest.mark.parametrize("keep", [Keep.best, pytest.param(Keep.last, marks=pytest.mark.slow)])
def test_a_training_that_is_asked_to_end_goes_on_from_that_step(
    keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in step 8, between two logged steps and two looks: the same weights as without, to the bit."""
    settings = Trainer(learning_rate=1e-2, batch_size=4, max_steps=11, evaluate_every=3, keep=keep)
    settings.device, settings.batch_tokens = Device.cpu, 20
    whole, parts = Noted(), Noted()
    expected = gone_on(tmp_path / "whole", settings, whole, resume=False)
    really = StopWhenAsked.on_step_end

    def seldom(self: TrainerCallback, args: object, state: Any, control: object, **kwargs: object) -> None:
        state.logging_steps, state.save_steps = 5, 500

    def asked(self: TrainerCallback, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        really(self, args, state, control, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Stopped), heed_signals():
        patch.setattr(StopWhenAsked, "on_train_begin", seldom)
        patch.setattr(StopWhenAsked, "on_step_end", asked)
        gone_on(tmp_path / "parts", settings, parts, resume=False)
    parts.seen.clear()
    found = gone_on(tmp_path / "parts", settings, parts, resume=True)  # asserts that it goes on from step 8
    assert parts.seen[-3:] == whole.seen[-3:]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow  # the two above are the short form for one run
def test_a_sweep_that_is_asked_to_end_leaves_checkpoints(tmp_path: Path) -> None:
    """`kill PID` of a sweep whose workers train: interrupted, with checkpoints; then it goes on."""
    words = ["task=doctopic", "debug=smoke", "method=lora", "task.baselines=[]", f"output_dir={tmp_path}"]
    line = ["train", "-m", "jobs=2", *words, "seed=1,2", "trainer.max_steps=120"]
    process = subprocess.Popen([*SUBPROCESS, *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while len(find_live(tmp_path, "metrics.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, said
    for file in tmp_path.rglob("record.json"):
        record = find_record(file.parent)
        assert record is not None and record.status == "interrupted"
        (checkpoint,) = file.parent.glob("checkpoints/*/checkpoint-*")
        last = json.loads((file.parent / "metrics.jsonl").read_text().splitlines()[-1])
        assert checkpoint.name == f"checkpoint-{last['step']}"  # no step is lost
    assert main(line) == 0  # whose workers are processes as before
    for file in tmp_path.rglob("record.json"):
        record = find_record(file.parent)
        assert record is not None and record.status == "done"
        first, second = record.attempts
        assert first.step == 0 < second.step < 120 and first.started < second.started
