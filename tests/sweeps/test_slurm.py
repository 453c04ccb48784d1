"""A sweep on Slurm: arrays, tasks preempted, queued again and followed. tests/sweeps/fake_slurm.py is Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.launchers import Slurm, parse_minutes, read_launcher
from peftbench.records.location import locate_run
from peftbench.records.record import load_records
from peftbench.records.recording import start_record
from peftbench.sweeps.jobs import Job, train_job
from peftbench.sweeps.slurm import NOTES, SlurmTasks
from peftbench.utils.errors import UserError
from tests.cli.test_train import SUBPROCESS
from tests.live_files import find_live
from tests.sweeps.fake_slurm import install
from tests.sweeps.test_extension import REAL

pytest.importorskip("submitit")

WORDS = ["task=doctopic", "debug=smoke", "method=head", "task.baselines=[]"]


def jobs(folder: Path, *seeds: int, rerun: bool = False) -> list[Job]:
    found = []
    for seed in seeds:
        words = [*WORDS, f"seed={seed}", f"output_dir={folder}", f"rerun={rerun}"]
        run = compose_run(words)
        found.append(Job(seed, words, f"seed={seed}", run, locate_run(run), since="2026-01-02T00:00:00.000+00:00"))
    return found


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("90:01", 91), ("4:00:00", 240), ("1-0", 1440), ("1-2:30", 1590), ("0-0:0:1", 1)],
)
def test_a_time_is_read_as_slurm_does(time: str, minutes: int) -> None:
    assert parse_minutes(time) == minutes


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("time=soon", "hydra.launcher.time=soon is no time of Slurm"),
        ("time=0", "hydra.launcher.time=0 is no time of Slurm"),
        ("partitoin=a", "hydra.launcher.partitoin is not a key of the config (in hydra.launcher); did you mean part"),
        ("at_once=${nokey}", "hydra.launcher.at_once: Interpolation key 'nokey' not found."),
        ("at_once=many", "hydra.launcher.at_once=many: a whole number is expected."),
        ('partition="a\\nreboot"', "hydra.launcher: 'a\\nreboot' has control characters."),
    ],
)
def test_what_is_refused(setting: str, sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        read_launcher(["hydra/launcher=slurm", "hydra.launcher." + setting.replace("\\n", "\n")])
    assert raised.value.faults[0].startswith(sentence), raised.value.faults


def test_without_slurm_nothing_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", *WORDS, "seed=1,2", "hydra/launcher=slurm", f"output_dir={tmp_path / 'outputs'}"]) == 2
    assert "hydra/launcher=slurm: sbatch is not on PATH" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_runs_are_one_array_that_the_same_line_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No controller runs, so that the tasks stay in the queue until the test takes them out."""
    with install(tmp_path / "slurm", at_once=0) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        asked = {"partition": "a b", "gpus": "h100:2", "time": "1-0", "memory": "8G", "at_once": 2, "poll_s": 0.1}
        settings = Slurm(**asked, options={"nice": 5})  # type: ignore[arg-type]
        logs, wanted = tmp_path / ".sweeps" / "logs", jobs(tmp_path, 1, 2, 3)
        queued = tmp_path / "slurm" / "tasks"

        def follow(sent: Any) -> list[tuple[int, tuple[str, ...]]]:
            threading.Timer(0.5, lambda: [task.unlink() for task in queued.iterdir()]).start()
            return [(job.number, ended.faults) for job, ended in SlurmTasks(settings, logs).run(sent)]

        (first, *_), lost = wanted, "of Slurm ended before its run was done"
        ended = follow(wanted)
        assert [number for number, _ in ended] == [1, 2, 3] and all(lost in fault for _, (fault,) in ended)
        options = json.loads((tmp_path / "slurm" / "1.json").read_text())
        expected = {"array": "0-2%2", "partition": "'a b'", "gpus-per-node": "h100:2", "time": "1440", "mem": "8G"}
        assert options.items() >= {**expected, "nice": "5", "requeue": "", "cpus-per-task": "4"}.items()

        for index in range(3):
            (queued / f"1_{index}").touch()
        assert [number for number, _ in follow([first])] == [1]
        assert len(list((tmp_path / "slurm").glob("*.sh"))) == 1  # it was not submitted again
        assert [number for number, _ in follow([first])] == [1]
        assert len(list((tmp_path / "slurm").glob("*.sh"))) == 2  # now that Slurm has it no more
        assert [file.name for file in (tmp_path / ".sweeps" / NOTES).iterdir()] == ["2.json"]


def test_a_task_that_finds_its_run_done_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `rerun=true` only if it was done after the sweep began."""
    trained: list[Any] = []
    monkeypatch.setattr("peftbench.sweeps.jobs.train_attempt", lambda run, *args, **kwargs: trained.append(run.rerun))
    (plain,), (again,) = jobs(tmp_path, 1), jobs(tmp_path, 1, rerun=True)
    train_job(plain)
    assert trained == [False]
    record = start_record(plain.run, plain.folder, [])
    record.finish()
    train_job(plain)
    assert trained == [False]
    train_job(again)  # the record is of after `since`
    assert trained == [False]
    record.created = "2026-01-01T00:00:00.000+00:00"
    record.save()
    train_job(again)
    assert trained == [False, True]
    record.status = "interrupted"
    record.created = "2026-01-03T00:00:00.000+00:00"
    record.save()
    train_job(again)  # goes on from its checkpoint instead of from the start
    assert trained == [False, True, False]


@pytest.mark.slow
def test_the_further_values_of_a_search_are_tasks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trials are an array, each further one is a job by itself, and the runs with the chosen values are an array:
    that with the trials' seed is scored, the other one trained."""
    runs, slurm = tmp_path / "runs", tmp_path / "slurm"
    settings = ["hydra/launcher=slurm", "hydra.launcher.gpus=null", "hydra.launcher.poll_s=0.5"]
    searching = [*REAL, "method=lora", "trainer.learning_rate=3e-4", "seed=1,2"]
    with install(slurm) as found:
        for name, value in found.items():
            monkeypatch.setenv(name, value)
        for _ in range(2):  # the second time nothing is submitted
            assert main(["train", "-m", *searching, f"output_dir={runs}", *settings]) == 0
    arrays = [
        "array" in json.loads((slurm / f"{script.stem}.json").read_text()) for script in sorted(slurm.glob("*.sh"))
    ]
    assert arrays == [True, False, False, True] and len(load_records(runs)[0]) == 6
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("takes trainer.learning_rate=0.003;") == 2 and printed.endswith("2 of them before.")


@pytest.mark.slow
def test_tasks_that_are_preempted_train_no_step_twice(tmp_path: Path) -> None:
    """Warned before its time limit; preempted with a grace time; on a node that fails. The sweep is killed, too."""
    runs, slurm = tmp_path / "runs", tmp_path / "slurm"
    settings = ["hydra/launcher=slurm", "hydra.launcher.gpus=null", "hydra.launcher.poll_s=0.5"]
    more = ["trainer.max_steps=60", "trainer.checkpoint_minutes=0", "seed=1,2,3", f"output_dir={runs}"]
    line = [*SUBPROCESS, "train", "-m", *WORDS, *more, *settings]
    kinds, asked = ["USR2", "TERM", "KILL"], dict[Path, str]()
    with install(slurm) as found:
        environment = {**os.environ, **found}
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while process.poll() is None or len(asked) < 3:
            assert time.monotonic() < deadline
            for file in find_live(runs, "metrics.jsonl"):
                if file not in asked and len(file.read_text().splitlines()) >= 15:
                    note = json.loads((runs / ".sweeps" / NOTES / "1.json").read_text())
                    (task,) = [task for task, folder in note.items() if folder == str(file.parent)]
                    asked[file] = kinds[len(asked)]
                    (slurm / "preempt" / task).write_text(asked[file])
                    if len(asked) == 2:  # whoever started the sweep is gone; its tasks go on
                        process.send_signal(signal.SIGKILL)
                        process.wait()
                        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
            time.sleep(0.1)
        out = process.communicate()[0]
        assert process.returncode == 0 and "3 of 3 runs are done" in out, out
        assert len(list(slurm.glob("*.sh"))) == 1  # the tasks were followed
    for record in load_records(runs)[0]:
        first, second = record.attempts
        assert record.status == "done" and first.step == 0 and 15 <= second.step < 60
        lines = [json.loads(line) for line in (record.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == list(range(1, 61))
