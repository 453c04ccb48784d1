"""A sweep survives what happens to it: killed processes, failing runs, and a second process on the same runs."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import peftbench.tasks.load
import peftbench.tasks.prepare
from peftbench.backbones.load import load_backbone
from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.schema import Task
from peftbench.evaluation.evaluator import Evaluator
from peftbench.records.record import find_record
from peftbench.tasks.base import TaskData
from peftbench.tasks.cache import Recent
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.tasks.rows import Source
from tests.cli.test_train import SMALL_MAM, SUBPROCESS, records, sentiment, smoke
from tests.live_files import find_live

__all__ = ["sentiment", "smoke"]  # fixtures

SETTINGS = ["trainer.keep=best", "trainer.checkpoint_minutes=0"]
SHORT = [*SETTINGS, "trainer.max_steps=6", "trainer.evaluate_every=3", "method=lora", "task.baselines=[]", "seed=1,2"]
LONG = ["trainer.max_steps=12", "trainer.evaluate_every=4"]
FOUR = [*SETTINGS, *LONG, "method=lora,parallel_adapter", "seed=1,2"]


def outcome(folder: Path) -> dict[str, Any]:
    """What a run measured, by its hash; the times that it took are left out."""
    found = {}
    for record in records(folder):
        run = next(folder.rglob(record["run"]))
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        is_trained = record["status"] == "trained"  # a trial that was not chosen
        assert (run / "predictions.jsonl").exists() is not is_trained
        predictions = None if is_trained else (run / "predictions.jsonl").read_text()
        weights = (run / "adapter" / "adapter.safetensors").read_bytes()
        left = [file.name for file in (run / "checkpoints").glob("*")]
        assert left == (["ended.json"] if is_trained else []) and (run / "checkpoints").exists() is is_trained
        metrics.sort(key=lambda line: str(line["stage"]))
        found[record["run"]] = (record["status"], record["scores"], metrics, predictions, weights)
    return found


def replaced(arguments: list[str], folder: Path) -> list[str]:
    """The same line with another output_dir."""
    return [*(word for word in arguments if not word.startswith("output_dir=")), f"output_dir={folder}"]


def trained(log: str) -> int:
    """How many trainings a process finished, by what it printed."""
    return sum(line.startswith("train ") and " s loss" in line for line in log.splitlines())


def done(folder: Path) -> dict[str, str]:
    """When the runs that are done were begun."""
    return {record["run"]: record["created"] for record in records(folder) if record["status"] == "done"}


def killed_until_done(arguments: list[str], log: Path, kills: int, seed: int, runs: int) -> dict[str, str]:
    """Start the same line again and again, killing it at random moments, until it comes through.

    Returns which runs a kill found done, and when they were begun.
    """
    draw = random.Random(seed)
    spared: dict[str, str] = {}
    outputs = Path(arguments[-1].removeprefix("output_dir="))
    for attempt in range(kills + 1):
        with log.open("a") as file:
            process = subprocess.Popen(
                [*SUBPROCESS, "train", "-m", *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            if attempt == kills:
                assert process.wait(600) == 0, log.read_text()
                return spared
            goal = (attempt + 1) * runs // (kills + 1)  # a kill in each part of the sweep, at any moment of a run
            deadline = time.monotonic() + 300
            while len(find_live(outputs, "record.json")) < goal and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 1.5))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            spared |= done(outputs)
    raise AssertionError("unreachable")


@pytest.mark.slow
def test_a_killed_sweep_ends_like_one_that_was_not(smoke: list[str], tmp_path: Path) -> None:
    """The first of two kills hits the first run or the second, the other a later one."""
    kills = 2
    arguments = [word for word in smoke if not word.startswith("trainer.max_steps")] + FOUR
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", "-m", *replaced(arguments, whole)]) == 0
    expected = outcome(whole)
    log = tmp_path / "log"
    spared = killed_until_done(replaced(arguments, parts), log, kills, seed=kills, runs=len(expected))
    assert outcome(parts) == expected
    # What was done was left alone; a kill may have hit a run whose training, but not its evaluation, was over.
    assert spared.items() <= done(parts).items()
    assert len(expected) <= trained(log.read_text()) <= len(expected) + kills
    assert f"{len(expected)} of {len(expected)} runs are done" in log.read_text().splitlines()[-1]


@pytest.mark.slow  # tests/training/test_checkpoint.py is the short form
@pytest.mark.parametrize("stage", ["train mam", "train the head alone"])
def test_a_killed_run_goes_on_from_its_checkpoint(stage: str, smoke: list[str], tmp_path: Path) -> None:
    """Killed once its checkpoint at step 7, in the second epoch, is whole, with batches accumulated."""
    settings = [*SMALL_MAM, "trainer.accumulation=2", "trainer.keep=best", "trainer.evaluate_every=3"]
    settings += ["task.baselines=[head]"]
    arguments = [word for word in smoke if not word.startswith("trainer.max_steps")]
    arguments += ["trainer.max_steps=11", "trainer.checkpoint_minutes=0", *settings]
    assert main(["train", *replaced(arguments, tmp_path / "whole")]) == 0
    code = (
        "import sys, os, signal\n"
        "from peftbench.training.checkpoint import SaveByTime\n"
        "def on_save(self, args, state, control, **kwargs):\n"
        f"    if state.global_step == 7 and {stage!r} in args.output_dir: os.kill(os.getpid(), signal.SIGKILL)\n"
        "SaveByTime.on_save = on_save\n"
        "from peftbench.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    parts = ["train", *replaced(arguments, tmp_path / "parts")]
    killed = subprocess.run([sys.executable, "-c", code, *parts], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = [file.parent for file in (tmp_path / "parts").rglob("record.json")]
    assert (record := find_record(folder)) is not None and record.status == "interrupted"
    (checkpoint,) = (folder / "checkpoints" / stage).glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-7"
    frozen = 4_737_408 * 4  # bytes of the backbone's weights, none of which are in it
    assert (checkpoint / "trained.safetensors").stat().st_size < frozen

    went_on = subprocess.run([*SUBPROCESS, *parts], capture_output=True, text=True)
    assert went_on.returncode == 0 and f"{stage}: goes on from step 7" in went_on.stdout
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert (record := find_record(folder)) is not None and record.timings["earlier_s"] > 0


@pytest.mark.slow
def test_a_torn_checkpoint_is_passed_over(smoke: list[str], tmp_path: Path) -> None:
    """A process that dies while it writes a checkpoint leaves a folder without Trainer's last file."""
    arguments = ["train", *smoke, "method=lora"]
    assert main(arguments) == 0
    expected = outcome(tmp_path / "outputs")
    (folder,) = [file.parent for file in (tmp_path / "outputs").rglob("record.json")]
    torn = folder / "checkpoints" / "train lora" / "checkpoint-1"
    torn.mkdir(parents=True)
    (torn / "trained.safetensors").write_bytes(b"\x08")
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "status": "running"}))
    assert main(arguments) == 0
    assert outcome(tmp_path / "outputs") == expected


@pytest.mark.slow  # test_a_run_that_another_process_is_at_is_refused is the short form
def test_two_processes_share_a_sweep(smoke: list[str], tmp_path: Path) -> None:
    arguments = [*SUBPROCESS, "train", "-m", *smoke, "method=lora,prefix,head"]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert [record["status"] for record in records(tmp_path / "outputs")] == ["done"] * 3
    assert sum(trained(out) for out, _ in printed) == 3
    for out, _ in printed:
        assert "3 of 3 runs are done" in out.splitlines()[-1]


@pytest.mark.slow
def test_an_interrupt_ends_a_sweep_with_its_table(
    smoke: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Ctrl-C does while the second run is scored."""
    really, scored = Evaluator.score, []

    def interrupted(self: Evaluator, role: str, *args: Any) -> Any:
        scored.append(role)
        if scored.count("report") == 2:
            raise KeyboardInterrupt
        return really(self, role, *args)

    monkeypatch.setattr(Evaluator, "score", interrupted)
    assert main(["train", "-m", *smoke, "method=lora,head,bitfit", "task.baselines=[]"]) == 130
    assert sorted(record["status"] for record in records(tmp_path / "outputs")) == ["done", "interrupted"]
    out = capsys.readouterr().out
    assert "1 of 3 runs are done. 2 unfinished; the same line" in " ".join(out.split())
    table = out[out.rindex("method  ") :]
    assert "head smoke" in table and "bitfit" not in table  # which has not begun


@pytest.mark.slow  # with a real Ctrl-C
def test_ctrl_c_ends_a_sweep_with_its_table(smoke: list[str], tmp_path: Path) -> None:
    arguments = [*SUBPROCESS, "train", "-m", *smoke, "method=lora", "trainer.max_steps=2,100000", "task.baselines=[]"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(find_live(tmp_path / "outputs", "record.json")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    try:
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in error
    assert sorted(record["status"] for record in records(tmp_path / "outputs")) == ["done", "interrupted"]
    assert "1 of 2 runs are done. 1 unfinished; the same line goes on with them." in " ".join(out.split())


@pytest.mark.slow  # tests/sweeps/test_live.py is the short form
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("interrupted", [False, True])
def test_on_a_terminal_a_sweep_is_one_growing_table(interrupted: bool, smoke: list[str], tmp_path: Path) -> None:
    """The last run has no such layer and fails, or it is stopped by Ctrl-C; either way the terminal is as before."""
    import pty

    last = "trainer.max_steps=2,100000" if interrupted else "modified_representation.layers=[0],[99]"
    arguments = [*SUBPROCESS, "train", "-m", *smoke, "method=lora", "task.baselines=[]", last]
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    master, slave = pty.openpty()
    process = subprocess.Popen(
        arguments, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    seen, stopped = "", False
    while True:
        try:
            seen += os.read(master, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            break
        if interrupted and not stopped and "1 done, 1 running" in seen and "1/100000" in seen:
            process.send_signal(signal.SIGINT)
            stopped = True
    os.close(master)
    assert process.wait(60) == (130 if interrupted else 1)
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l") >= 0  # the cursor
    live, final = seen[: seen.rindex("\x1b[?25h")], seen[seen.rindex("\x1b[?25h") :]
    assert "2 runs: 2 missing; time left is known once a run is done" in live
    assert "train lora" not in final and "run 1:" not in seen and "Traceback" not in seen
    assert final.count("accuracy") == 2  # one table, that of the end: its title and its column
    assert "1 of 2 runs are done." in final.splitlines()[-1]
    if interrupted:  # what is running is looked up once a second: two steps may be over before, 100,000 are not
        assert "train lora" in live
    else:  # the fault stays above the table, with the run that it is of
        assert "peftbench: task=sst2" in live and "layers=[99]" in live


def test_a_failed_run_is_kept_until_retry(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "-m", *smoke, "method=lora", "modified_representation.layers=[99],[0]", "task.baselines=[]"]
    assert main(arguments) == 1
    first = {record["status"]: record["created"] for record in records(tmp_path / "outputs")}
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert {record["status"]: record["created"] for record in records(tmp_path / "outputs")} == first
    assert (
        "failed before (refused: modified_representation.layers: 99 is" in captured.err and "retry=true" in captured.err
    )
    assert "1 of 2 runs are done, 1 of them before. 1 failed; retry=true" in " ".join(captured.out.split())
    assert "failed:" in captured.out and "done before" in " ".join(captured.out.split())
    assert main([*arguments, "retry=true"]) == 1
    second = {record["status"]: record["created"] for record in records(tmp_path / "outputs")}
    assert second["done"] == first["done"] and second["failed"] != first["failed"]


@pytest.mark.slow
def test_a_run_that_another_process_is_at_is_refused(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *smoke, "method=lora"]
    assert main(arguments) == 0
    (folder,) = [file.parent for file in (tmp_path / "outputs").rglob("record.json")]
    code = (
        "import sys, time; from pathlib import Path; from peftbench.records.lock import hold_run\n"
        "with hold_run(Path(sys.argv[1])): print('held', flush=True); time.sleep(300)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        capsys.readouterr()
        assert main([*arguments, "rerun=true"]) == 2
        assert f"is being trained by process {holder.pid} on " in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    assert main([*arguments, "rerun=true"]) == 0  # a dead process holds nothing


def test_the_record_of_a_newer_version_is_not_written_over(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "-m", *smoke, "method=lora", "task.baselines=[]"]
    assert main(arguments) == 0
    (file,) = (tmp_path / "outputs").rglob("record.json")
    newer = file.read_text().replace('"schema_version": 1', '"schema_version": 2')
    file.write_text(newer)
    for word in ("retry=true", "rerun=true"):
        capsys.readouterr()
        assert main([*arguments, word]) == 1
        assert f"{file}: a newer peftbench wrote it (schema_version 2" in capsys.readouterr().err
        assert file.read_text() == newer


@pytest.mark.slow
@pytest.mark.parametrize("task", ["docsum", pytest.param("doctopic", marks=pytest.mark.slow)])
def test_runs_of_one_process_leave_nothing_to_each_other(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A, B, A in one process, on data that is read and tokenised once: A twice, to the bit."""
    read: list[str] = []
    tokenised: list[bool] = []
    really_read, really_tokenise = peftbench.tasks.load.read_split, TaskData._tokenise

    def counted_read(task: Task, split: str) -> Source:
        read.append(split)
        return really_read(task, split)

    def counted_tokenise(self: TaskData, rows: Dataset, training: bool, fingerprint: str) -> Dataset:
        tokenised.append(training)
        return really_tokenise(self, rows, training, fingerprint)

    monkeypatch.setattr(peftbench.tasks.load, "read_split", counted_read)
    monkeypatch.setattr(TaskData, "_tokenise", counted_tokenise)
    monkeypatch.setattr(peftbench.tasks.load, "_recent", Recent())
    monkeypatch.setattr(peftbench.tasks.prepare, "_recent", Recent())
    a, b = ["method=mam", "seed=1"], ["method=prefix", "seed=2", "trainer.learning_rate=0.1"]
    folders = [tmp_path / name for name in ("first", "between", "second")]
    for run, folder in zip((a, b, a), folders, strict=True):
        assert main(["train", f"task={task}", "debug=smoke", "task.baselines=[]", *run, f"output_dir={folder}"]) == 0
    first, between, second = map(outcome, folders)
    assert first == second and first.keys() != between.keys()
    assert sorted(read) == ["test", "train", "validation"]
    assert sorted(tokenised) == [False, False, True]


@pytest.mark.slow
def test_changed_files_are_read_again(smoke: list[str], sentiment: Path, tmp_path: Path) -> None:
    arguments = ["train", *smoke, "method=head"]
    assert main(arguments) == 0
    (sentiment / "dev.tsv").write_text("sentence\tlabel\n" + "\n".join(f"odd film number {i}\t1" for i in range(40)))
    assert main(arguments) == 0
    assert len({record["data"]["fingerprint"] for record in records(tmp_path / "outputs")}) == 2


@pytest.mark.slow
def test_prepared_data_holds_no_model() -> None:
    """A model that an earlier run trained would fill the GPU."""
    run = compose_run(["task=docsum", "debug=smoke"])
    loaded = load_task(run.task)
    backbone = load_backbone(run.model, loaded.task)
    data = prepare_data(loaded, backbone.tokenizer, backbone.model)
    assert data.tokenizer in [kept.tokenizer for kept in peftbench.tasks.prepare._recent.values.values()]
    assert getattr(data.collator, "model", None) is backbone.model
    model = weakref.ref(backbone.model)
    del backbone, data
    gc.collect()
    assert model() is None
