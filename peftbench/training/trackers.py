"""Experiment trackers: `trackers=[tensorboard,wandb,mlflow,trackio]`.

transformers' own callbacks log the training. Each is given a run that was opened here, with the run's config, its name
and its group, and that is closed here with the score and the counts, and with how the run ended. When an interrupted
run goes on, the same run of the tracker is opened again. Files go below the output_dir unless the tracker's own
environment variables say otherwise. A tracker that fails is left out from then on, with one note.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock
from transformers import TrainerCallback

from peftbench.config.identity import to_plain
from peftbench.config.schema import Run
from peftbench.records.record import Record, Status
from peftbench.records.recording import is_interruption
from peftbench.records.run_files import CHECKPOINTS, TRACKED
from peftbench.utils.differences import flatten
from peftbench.utils.environment import keep_environment
from peftbench.utils.files import expand_home, read_json, replace_file

Say = Callable[[str], None]


class Tracker(Protocol):
    """One tracker, while a run is trained."""

    def open(self) -> TrainerCallback:
        """Open the run there; return transformers' callback, which logs into it."""
        ...

    def close(self, values: Mapping[str, float], status: Status) -> None:
        """Log the values at the end, and close the run.

        Args:
            values: none, of a run that was interrupted or failed.
            status: how the run ended.
        """
        ...


class Followed:
    """What trackers are told of a run."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.folder, self.group = folder, run.trackers_group or f"{run.task.name}-{run.model.name}"
        self.root = expand_home(run.output_dir)
        self.project = f"peftbench-{run.task.name}"
        self.name = f"{run.method}-{folder.name}"
        plain = {key: value for key, value in to_plain(run).items() if key not in ("sizes", "size")}
        self.config: dict[str, Any] = {key: value for key, value in flatten(plain) if value not in (None, [], {})}
        self.file = folder / CHECKPOINTS / TRACKED  # with the checkpoints, it is deleted when the run is done

    def find_earlier(self, tracker: str) -> str | None:
        """Return the id that an attempt before this one, which was stopped, has in a tracker."""
        found = self._read().get(tracker)
        return found if isinstance(found, str) else None

    def note(self, tracker: str, name: str) -> None:
        """Note under which id this attempt is in a tracker."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        known = self._read()
        with replace_file(self.file) as file:
            json.dump({**known, tracker: name}, file)

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self.file)
        except (OSError, ValueError):  # of the first attempt, or half written
            return {}
        return found if isinstance(found, dict) else {}


class _Follower:
    def __init__(self, followed: Followed) -> None:
        self.followed = followed


class _TensorBoard(_Follower):
    """Event files in the run's folder, so that `tensorboard --logdir OUTPUT_DIR` shows all runs."""

    def _write(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=str(self.followed.folder / "tensorboard"))

    def open(self) -> TrainerCallback:
        from transformers.integrations import TensorBoardCallback

        self.writer = writer = self._write()
        text = "\n".join(f"    {key}: {value}" for key, value in self.followed.config.items())
        writer.add_text("config", text)
        writer.add_text("group", self.followed.group)
        return TensorBoardCallback(writer)

    def close(self, values: Mapping[str, float], status: Status) -> None:
        self.writer.close()  # of an interrupted run, which the callback leaves open, with up to two minutes unwritten
        if not values:  # event files have no state in which a run ends
            return
        writer = self._write()
        for key, value in values.items():
            writer.add_scalar(f"final/{key}", value, 0)
        writer.close()


class _Wandb(_Follower):
    def open(self) -> TrainerCallback:
        import wandb
        from transformers.integrations import WandbCallback

        followed = self.followed
        earlier = followed.find_earlier("wandb")
        self.run = wandb.init(
            id=earlier,
            resume=None if earlier is None else "allow",
            project=os.environ.get("WANDB_PROJECT", followed.project),
            group=followed.group,
            name=followed.name,
            dir=os.environ.get("WANDB_DIR", str(followed.root)),
            config=followed.config,
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off"),
        )
        followed.note("wandb", self.run.id)
        return WandbCallback()

    def close(self, values: Mapping[str, float], status: Status) -> None:
        self.run.summary.update({"status": status, **{f"final/{key}": value for key, value in values.items()}})
        # 255 is what wandb itself gives a run that Ctrl-C has ended; any other code than 0 is a failure.
        self.run.finish(exit_code={"done": 0, "trained": 0, "interrupted": 255}.get(status, 1))


class _MLflow(_Follower):
    def open(self) -> TrainerCallback:
        import mlflow
        from transformers.integrations import MLflowCallback

        followed = self.followed
        while mlflow.active_run() is not None:
            with suppress(Exception):  # a run that mlflow lost, which it forgets all the same
                mlflow.end_run()  # in its own database, and so before we turn to another
        own = f"sqlite:///{(followed.root / 'mlflow.db').resolve()}"
        with keep_environment("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):
            mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or own)
            # Of processes that make the tables of a new database, or an experiment, at the same time, one succeeds.
            with FileLock(followed.root / ".mlflow.lock"):
                mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", followed.project))
        known = self._start(mlflow)
        config = {f"peftbench.{key}": str(value)[:500] for key, value in followed.config.items()}
        mlflow.log_params({key: value for key, value in config.items() if key not in known})
        return MLflowCallback()

    def _start(self, mlflow: Any) -> Mapping[str, str]:
        """Open the run of an earlier attempt, or a new one; return the params that it has, which nobody may change."""
        followed, run = self.followed, None
        if (earlier := followed.find_earlier("mlflow")) is not None:
            with suppress(Exception):  # it was deleted there, or is in another database
                run = mlflow.start_run(run_id=earlier)
        if run is None:
            run = mlflow.start_run(run_name=followed.name, tags={"group": followed.group})
        followed.note("mlflow", run.info.run_id)
        params: Mapping[str, str] = run.data.params
        return params

    def close(self, values: Mapping[str, float], status: Status) -> None:
        import mlflow

        mlflow.set_tag("peftbench.status", status)
        if values:
            mlflow.log_metrics({f"final/{key}": value for key, value in values.items()})
        mlflow.end_run({"done": "FINISHED", "trained": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED"))


class _Trackio(_Follower):
    def open(self) -> TrainerCallback:
        import trackio

        followed = self.followed
        self.trackio: Any = trackio
        with redirect_stdout(StringIO()):  # it prints how to open its dashboard
            with suppress(Exception):
                trackio.finish()  # a run that was lost, into its own folder
            _move_trackio(Path(os.environ.get("TRACKIO_DIR") or followed.root / "trackio").resolve())
            earlier = followed.find_earlier("trackio")
            trackio.init(
                project=followed.project,
                name=followed.name,
                group=followed.group,
                config=followed.config,
                embed=False,
                resume="never" if earlier is None else "allow",
            )
        followed.note("trackio", followed.name)
        return _LogToTrackio(trackio)

    def close(self, values: Mapping[str, float], status: Status) -> None:
        if values:  # it knows no state in which a run ends
            self.trackio.log({f"final/{key}": value for key, value in values.items()})
        with redirect_stdout(StringIO()):
            self.trackio.finish()


def _move_trackio(folder: Path) -> None:
    """Let trackio write to `folder`. It reads TRACKIO_DIR once in a process, when it is imported, and its modules keep
    the paths that follow from it; the runs of a process may have several folders."""
    before = sys.modules["trackio.utils"].TRACKIO_DIR
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio":
            for key, value in list(vars(module).items()):
                if isinstance(value, Path) and value.is_relative_to(before):
                    setattr(module, key, folder / value.relative_to(before))


class _LogToTrackio(TrainerCallback):
    """Logs into the open run. transformers' callback would open another, and close it before there is a score."""

    def __init__(self, trackio: Any) -> None:
        self.trackio = trackio

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.trackio.log({f"train/{key}": value for key, value in logs.items()}, step=state.global_step)


KINDS: dict[str, Callable[[Followed], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


class _Guarded(TrainerCallback):
    """Calls a tracker's callback at each event, until it fails."""

    def __init__(self, callback: TrainerCallback, fail: Callable[[Exception], None]) -> None:
        self.callback: TrainerCallback | None = callback
        self.fail = fail

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def call(*args: Any, **kwargs: Any) -> None:
            if self.callback is None:
                return
            try:
                getattr(self.callback, name)(*args, **kwargs)
            except Exception as error:
                self.callback = None
                self.fail(error)

        return call


class Trackers:
    """The trackers of a run. Nothing that goes wrong in one reaches the run."""

    def __init__(self, run: Run, record: Record, say: Say) -> None:
        self.run, self.record, self.say = run, record, say
        self.open: dict[str, Tracker] = {}
        self.begun = False

    def begin(self) -> list[TrainerCallback]:
        """Open the run in each tracker; return the callbacks that log the training."""
        self.begun = True
        found: list[TrainerCallback] = []
        for name in self.run.trackers:
            try:
                tracker = KINDS[name](Followed(self.run, self.record.folder))
                found.append(_Guarded(tracker.open(), partial(self._drop, name)))
                self.open[name] = tracker
            except Exception as error:
                self._note(name, error)
        return found

    def close(self) -> None:
        """Log the score and the counts of a run that has ended, and close it in all trackers."""
        if not self.begun:  # an earlier attempt had trained it
            self.begin()
        status: Status = "trained" if self.record.score is None else "done"
        status = status if self.record.diverged is None else "diverged"
        for name, tracker in list(self.open.items()):
            try:
                tracker.close(list_final_values(self.record), status)
            except Exception as error:
                self._drop(name, error)

    def abandon(self, error: BaseException) -> None:
        """Close what a run has open that `error` has interrupted, or failed."""
        for tracker in self.open.values():
            with suppress(Exception):
                tracker.close({}, "interrupted" if is_interruption(error) else "failed")

    def _drop(self, name: str, error: Exception) -> None:
        if self.open.pop(name, None) is not None:
            self._note(name, error)

    def _note(self, name: str, error: Exception) -> None:
        note = f"trackers: {name} is left out: {type(error).__name__}: {' '.join(str(error).split())}"
        self.say(note)
        self.record.data.setdefault("notes", []).append(note)


@contextmanager
def follow_run(run: Run, record: Record, say: Say) -> Iterator[Trackers]:
    """Yield the trackers of a run, and close them at the end of the block."""
    trackers = Trackers(run, record, say)
    try:
        yield trackers
    except BaseException as error:
        trackers.abandon(error)
        raise
    if run.trackers:
        trackers.close()


def list_final_values(record: Record) -> dict[str, float]:
    """Return what a tracker logs of a run at its end: its scores, counts and cost."""
    found: dict[str, float | None] = {"score": record.score, "steps": record.steps, "step_s": record.step_s}
    for role, score in record.scores.items():
        found |= {f"{role}/{metric}": value for metric, value in score.metrics.items()}
    if record.counts is not None:
        names = ("backbone", "trained", "stored", "head")
        found |= {name: getattr(record.counts, name) for name in names}
        found["percent"] = record.counts.percent.get("stored")
    if record.retention is not None and record.retention.after is not None:
        found |= {"general/loss": record.retention.after.loss, "general/loss_before": record.retention.before.loss}
    if record.speed is not None:
        found |= {"speed/tokens_per_s": record.speed.trained.tokens_per_s}
        found |= {"speed/bare_tokens_per_s": record.speed.bare.tokens_per_s}
    found |= {"memory_bytes": record.peak_memory_bytes, "adapter_bytes": record.adapter_bytes}
    return {key: float(value) for key, value in found.items() if value is not None}
