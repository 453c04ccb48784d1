"""Trackers: what they log is read back by their own APIs; a tracker that fails never stops a run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.config.schema import TRACKERS
from peftbench.records.record import Divergence, Record, load_records
from peftbench.records.recording import record_run
from peftbench.records.run_files import CHECKPOINTS
from peftbench.training import trackers
from peftbench.training.looks import Pruned
from peftbench.training.trackers import follow_run
from peftbench.utils.errors import LostProcess, UserError
from peftbench.utils.stopping import Stopped
from tests.live_files import find_live
from tests.sweeps.test_workers import until

SMOKE = ("debug=smoke", "trainer.max_steps=3", "method=lora")


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlflow puts the database that a test has read into the environment."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)


def swept(folder: Path, *overrides: str) -> list[Record]:
    assert main(["train", "-m", *SMOKE, f"output_dir={folder}", "seed=1,2", *overrides]) == 0
    records, _ = load_records(folder)
    return records


@pytest.mark.slow
def test_tensorboard_has_the_log_the_score_and_the_counts(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for record in swept(tmp_path, "trackers=[tensorboard]"):
        events = accumulator.EventAccumulator(str(record.folder / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
        assert record.counts is not None
        assert events.Scalars("final/stored")[0].value == record.counts.stored
        assert events.Scalars("final/score")[0].value == pytest.approx(record.score)


def follow_in_mlflow(folder: Path, barrier: Any) -> None:
    """The main function of a process, as of a worker that begins its first run."""
    run = compose_run([*SMOKE, f"output_dir={folder}"])
    barrier.wait()
    trackers.KINDS["mlflow"](trackers.Followed(run, folder / str(os.getpid()))).open()  # its own, which it holds


@pytest.mark.slow
def test_workers_that_begin_together_all_reach_mlflow(tmp_path: Path) -> None:
    """Each would make the tables of the database, which is not there yet."""
    mlflow = pytest.importorskip("mlflow")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [context.Process(target=follow_in_mlflow, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert len(mlflow.search_runs(search_all_experiments=True)) == 3


@pytest.mark.slow
def test_mlflow_has_a_run_for_each_with_its_sweep(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    records = {record.run: record for record in swept(tmp_path, "trackers=[mlflow]")}
    assert "MLFLOW_TRACKING_URI" not in os.environ  # the next run of a process has its own
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = mlflow.search_runs(search_all_experiments=True)
    (plan,) = (tmp_path / ".sweeps").glob("*.sweep.json")
    assert set(found["tags.group"]) == {plan.name.partition(".")[0]} and len(found) == 2
    for _, row in found.iterrows():
        record = records[row["tags.mlflow.runName"].removeprefix("lora-")]
        assert row["status"] == "FINISHED" and row["params.peftbench.seed"] == str(record.seed)
        assert row["metrics.final/score"] == pytest.approx(record.score)
        assert record.counts is not None and row["metrics.final/trained"] == record.counts.trained
        assert row["metrics.loss"] > 0


@pytest.mark.slow
def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert len(swept(tmp_path, "trackers=[wandb]")) == 2
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(next(run.glob("*.wandb")).stat().st_size > 1000 for run in runs)


def open_and_close(kind: str, folder: Path, *overrides: str) -> None:
    """Follow a run that ends at once."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    run = compose_run([*SMOKE, f"output_dir={folder}", *overrides])
    tracker = trackers.KINDS[kind](trackers.Followed(run, folder / "run"))
    tracker.open()
    tracker.close({"score": float(folder.name)}, "done")


def read_tensorboard(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("final/score")]


def read_wandb(folder: Path) -> list[float]:
    return [float(folder.name) for _ in (folder / "wandb").glob("offline-run-*/*.wandb")]


def read_mlflow(folder: Path) -> list[float]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [run.data.metrics["final/score"] for run in found]


def read_trackio(folder: Path) -> list[float]:
    found = []
    for database in (folder / "trackio").glob("*.db"):
        with closing(sqlite3.connect(database)) as connection:
            found += [json.loads(row)["final/score"] for (row,) in connection.execute("SELECT metrics FROM metrics")]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "read"),
    [("tensorboard", read_tensorboard), ("wandb", read_wandb), ("mlflow", read_mlflow), ("trackio", read_trackio)],
)
def test_each_run_of_a_process_is_in_its_own_folder(
    kind: str, read: Callable[[Path], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries keep the folder of the first one, in their own variables or in the environment."""
    pytest.importorskip(kind)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = {name for name in os.environ if name.startswith(("MLFLOW_", "TRACKIO_"))}
    for name, more in (("1", []), ("2", ["task=docsum"]), ("3", [])):
        open_and_close(kind, tmp_path / name, *more)
    assert [read(tmp_path / name) for name in "123"] == [[1], [2], [3]]
    assert {name for name in os.environ if name.startswith(("MLFLOW_", "TRACKIO_"))} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "read", "variable", "value"),
    [
        ("mlflow", read_mlflow, "MLFLOW_TRACKING_URI", "sqlite:///{}/mlflow.db"),
        ("trackio", read_trackio, "TRACKIO_DIR", "{}/trackio"),
    ],
)
def test_the_environment_has_the_last_word_for_a_later_run_too(
    kind: str,
    read: Callable[[Path], list[float]],
    variable: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(kind)
    open_and_close(kind, tmp_path / "1")
    (tmp_path / "theirs").mkdir()
    monkeypatch.setenv(variable, value.format(tmp_path / "theirs"))
    open_and_close(kind, tmp_path / "2")
    assert os.environ[variable] == value.format(tmp_path / "theirs")
    assert (read(tmp_path / "1"), read(tmp_path / "theirs")) == ([1], [2])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "read"), [("mlflow", read_mlflow), ("trackio", read_trackio)])
def test_a_run_that_a_tracker_lost_does_not_disturb_the_next(
    kind: str, read: Callable[[Path], list[float]], tmp_path: Path
) -> None:
    """It is still open there, in another folder."""
    pytest.importorskip(kind)
    (tmp_path / "1").mkdir()
    trackers.KINDS[kind](trackers.Followed(compose_run([*SMOKE, f"output_dir={tmp_path / '1'}"]), tmp_path)).open()
    open_and_close(kind, tmp_path / "2")
    assert read(tmp_path / "2") == [2]


def make_record(folder: Path, *, diverged: bool = False) -> Any:
    """Make what trackers read of a record."""
    record: Any = SimpleNamespace(data={}, folder=folder, score=1.0, steps=2, step_s=None, scores={}, counts=None)
    record.peak_memory_bytes = record.adapter_bytes = record.retention = record.speed = None
    record.diverged = Divergence("loss", 2) if diverged else None
    return record


def follow(folder: Path, kind: str, ending: BaseException | str) -> Any:
    """Follow a run to its end in `folder`; return its tracker."""
    run = replace(compose_run([*SMOKE, f"output_dir={folder}"]), trackers=[kind])
    stopping = suppress(KeyboardInterrupt, LostProcess, OSError, ValueError, UserError)
    record = make_record(folder / "run", diverged=ending == "diverged")
    with stopping, follow_run(run, record, print) as followed:
        followed.begin()
        if isinstance(ending, BaseException):
            raise ending
    return followed.open[kind]


ENDINGS: list[Any] = [
    ("done", "done"),
    ("diverged", "diverged"),
    (KeyboardInterrupt(), "interrupted"),
    (Stopped(signal.SIGTERM), "interrupted"),
    (Pruned(), "interrupted"),
    (LostProcess("gone"), "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device"), "interrupted"),
    (ValueError("x"), "failed"),
    (UserError("x"), "failed"),
]


@pytest.mark.parametrize(("ending", "status"), ENDINGS)
def test_trackers_are_told_how_a_run_ended_as_its_record_is(
    ending: BaseException | str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listening(Failing):
        def close(self, values: Any, status: str) -> None:
            told.append((bool(values), status))

    told: list[tuple[bool, str]] = []
    monkeypatch.setitem(trackers.KINDS, "wandb", lambda followed: Listening("", []))
    follow(tmp_path, "wandb", ending)
    assert told == [(isinstance(ending, str), status)]
    if isinstance(ending, BaseException):
        run = compose_run([*SMOKE, f"output_dir={tmp_path}"])
        with pytest.raises(type(ending)), record_run(run, tmp_path / "run", []) as record:
            raise ending
        assert record.status == status


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "status"),
    [("done", "FINISHED"), ("diverged", "FAILED"), (Stopped(signal.SIGTERM), "KILLED"), (ValueError("x"), "FAILED")],
)
def test_mlflow_has_the_state_in_which_a_run_ended(ending: BaseException | str, status: str, tmp_path: Path) -> None:
    """All were FINISHED."""
    mlflow = pytest.importorskip("mlflow")
    follow(tmp_path, "mlflow", ending)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert found.info.status == status and ("final/score" in found.data.metrics) == isinstance(ending, str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"), [("done", 0), ("diverged", 1), (KeyboardInterrupt(), 255), (ValueError("x"), 1)]
)
def test_wandb_has_the_exit_code_with_which_a_run_ended(
    ending: BaseException | str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow(tmp_path, "wandb", ending).run._exit_code == code


@pytest.mark.slow
def test_tensorboard_has_all_that_was_logged_before_ctrl_c(tmp_path: Path) -> None:
    """Of the last two minutes there was nothing: transformers closes its file only at the end of a training."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = replace(compose_run([*SMOKE, f"output_dir={tmp_path}"]), trackers=["tensorboard"])
    with suppress(KeyboardInterrupt), follow_run(run, make_record(tmp_path / "run"), print) as followed:
        (callback,) = followed.begin()
        callback.callback.tb_writer.add_scalar("train/loss", 1.5, 7)
        raise KeyboardInterrupt
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 1.5)]


def list_mlflow(folder: Path) -> list[str]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [run.info.run_id for run in found]


def list_wandb(folder: Path) -> list[str]:
    return sorted({path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")})


def list_trackio(folder: Path) -> list[str]:
    (database,) = (folder / "trackio").glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        return [row for (row,) in connection.execute("SELECT DISTINCT run_id FROM metrics")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "list_runs"), [("mlflow", list_mlflow), ("wandb", list_wandb), ("trackio", list_trackio)]
)
def test_a_run_that_goes_on_is_the_same_run_of_a_tracker(
    kind: str, list_runs: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the evaluation is repeated. A run that is trained anew is another."""
    pytest.importorskip(kind)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for ending in (KeyboardInterrupt(), ValueError("x"), "done"):
        tracker = follow(tmp_path, kind, ending)
        if kind == "trackio":
            assert tracker.trackio.context_vars.current_run.get() is None
    first = list_runs(tmp_path)
    assert len(first) == 1
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)  # as of a run that is done
    follow(tmp_path, kind, "done")
    assert len(list_runs(tmp_path)) == 2 and first[0] in list_runs(tmp_path)


@pytest.mark.slow
def test_a_run_that_mlflow_no_longer_has_is_a_new_one(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    follow(tmp_path, "mlflow", KeyboardInterrupt())
    (gone,) = list_mlflow(tmp_path)
    mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").delete_run(gone)
    follow(tmp_path, "mlflow", "done")
    assert len(list_mlflow(tmp_path)) == 1 and gone not in list_mlflow(tmp_path)


@pytest.mark.slow
def test_a_run_that_sigterm_stopped_goes_on_in_mlflow(tmp_path: Path) -> None:
    """With its checkpoint, and with transformers' own parameters, which mlflow lets nobody change."""
    mlflow = pytest.importorskip("mlflow")
    words = [
        "train",
        "debug=smoke",
        "trainer.max_steps=400",
        "method=lora",
        "trackers=[mlflow]",
        f"output_dir={tmp_path}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "peftbench", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until(lambda: any(len(file.read_text().splitlines()) > 5 for file in find_live(tmp_path, "metrics.jsonl")))
    process.terminate()
    output, _ = process.communicate(timeout=100)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (name,) = list_mlflow(tmp_path)
    assert client.get_run(name).info.status == "KILLED", output
    assert main(words) == 0
    assert list_mlflow(tmp_path) == [name] and client.get_run(name).info.status == "FINISHED"
    (record,) = load_records(tmp_path)[0]
    assert record.attempts[-1].step > 0 and not [note for note in record.data["notes"] if "mlflow" in note]
    assert client.get_run(name).data.metrics["final/score"] == pytest.approx(record.score)
    assert max(metric.step for metric in client.get_metric_history(name, "loss")) == 400


class Failing:
    """A tracker that fails at the event that it is told."""

    def __init__(self, event: str, seen: list[str]) -> None:
        self.event, self.seen = event, seen

    def _meet(self, event: str) -> None:
        self.seen.append(event)
        if event == self.event:
            raise ConnectionError("no route\nto host")

    def open(self) -> TrainerCallback:
        self._meet("open")
        callback: Any = TrainerCallback()
        callback.on_log = lambda *args, **kwargs: self._meet("log")
        return callback  # type: ignore[no-any-return]

    def close(self, values: Any, status: str) -> None:
        self._meet("close")


@pytest.mark.parametrize(
    ("event", "seen"),
    [("open", ["open"]), ("log", ["open", "log"]), ("close", ["open", "log", "log", "close"]), ("", None)],
)
def test_a_tracker_that_fails_is_left_out_with_one_note(
    event: str, seen: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setitem(trackers.KINDS, "wandb", lambda followed: Failing(event, events))
    run = replace(compose_run([]), trackers=["wandb"])
    record = make_record(tmp_path)
    said: list[str] = []
    with follow_run(run, record, said.append) as followed:
        for callback in followed.begin():
            callback.on_log(None, None, None)
            callback.on_log(None, None, None)
    assert events == (seen or ["open", "log", "log", "close"])
    note = "trackers: wandb is left out: ConnectionError: no route to host"
    assert said == record.data.get("notes", []) == ([note] if event else [])


def test_trackers_are_no_part_of_a_name_and_unknown_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compose_run([])
    assert hash_run(replace(plain, trackers=["wandb"], trackers_group="a")) == hash_run(plain)
    assert set(TRACKERS) == set(trackers.KINDS)
    with pytest.raises(UserError, match=r"trackers=wanbd is unknown; did you mean wandb\?"):
        compose_run(["trackers=[wanbd]"])
    monkeypatch.setattr("peftbench.config.validity.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackers=\[mlflow\] needs mlflow, which is not installed: pip install mlf"):
        compose_run(["trackers=[mlflow]"])


def test_a_run_without_trackers_imports_none(tmp_path: Path) -> None:
    record: Any = SimpleNamespace(data={}, folder=tmp_path)
    with follow_run(compose_run([]), record, print) as followed:
        assert followed.begin() == []
    assert json.dumps(record.data) == "{}"
