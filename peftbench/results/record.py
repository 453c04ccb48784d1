"""The record of one run: what was trained, how it scored and what it cost. Imports no torch.

`recording` keeps `record.json` in the run's folder true from the first second to the last; `load_records` reads the
records below a folder. Tables, plots and reports read records and nothing else. A file of a run is written beside its
place and then renamed, so that no reader ever sees half of it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TextIO, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

import peftbench
from peftbench.axes import composed
from peftbench.config import Modification, Run, modifications
from peftbench.errors import UserError
from peftbench.fidelity import Deviation
from peftbench.results.identity import content_stamp, plain, run_hash
from peftbench.results.lock import is_held

SCHEMA_VERSION = 1
FILE = "record.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints, gone once it is done
# A folder with this file in it is passed over by who asks for a folder above it: outputs/reference came with the
# checkout, and its runs are no rivals of one's own.
APART = ".apart"

# A run that is missing has not begun: no file says so, but the tables of a sweep do.
Status = Literal["running", "done", "failed", "interrupted", "missing"]


@dataclass
class Failure:
    """The exception that ended a run; its traceback stands in `error.txt`."""

    name: str  # the exception's class; refused: a UserError
    message: str

    @property
    def said(self) -> str:
        """The failure on one line."""
        return " ".join(f"{self.name}: {self.message}".split())


@dataclass
class Backbone:
    """The frozen model: a hub id at a revision, or the content stamp of a local folder."""

    name: str
    hub_id: str | None
    revision: str | None
    content: str | None
    parameters: int | None = None


@dataclass
class Axes:
    """One modification as a point on the four axes; `prefix` is what its config keys start with, "" or "mix.NAME."."""

    prefix: str
    functional_form: str
    modified_representation: str
    insertion_form: str
    composition_function: str
    scale: float
    bottleneck: int | None
    options: dict[str, Any]  # the other keys that differ from their defaults, dotted

    @property
    def composition(self) -> str:
        """The composition function with its scale."""
        learned = bool(self.options.get("composition_function.learned"))
        return composed(self.composition_function, self.scale, learned)


@dataclass
class Counts:
    """Numbers of parameters. `percent` is derived: trained, stored and paper in % of the backbone."""

    backbone: int
    trained: int  # what the optimiser holds
    stored: int  # what a checkpoint needs, without the head and with the prefix MLP folded
    head: int
    paper: int | None  # by the formula of the paper's appendix B
    dead: int = 0  # what the paper's released code trains besides, though nothing reads it (fidelity.dead_parameters)
    percent: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        numbers = {"trained": self.trained, "stored": self.stored, "paper": self.paper}
        self.percent = {key: 100 * n / self.backbone for key, n in numbers.items() if n is not None and self.backbone}


@dataclass
class Score:
    """Metrics on a split, each on the paper's scale of 0 to 100 and better when higher."""

    split: str
    examples: int
    metrics: dict[str, float]
    of: int | None = None  # examples that the split has, where not all of them were taken


@dataclass
class Selection:
    """What a search compares: the task's selection metric on the selection split."""

    split: str
    examples: int
    metric: str
    value: float | None  # None: the training diverged
    of: int | None = None  # examples that the split has, where not all of them were taken


@dataclass
class Trial:
    """One of the runs that a search compared, and how it came out."""

    settings: dict[str, Any]
    run: str  # `run_hash`
    value: float | None  # of `Selection`; None: it failed or diverged
    status: str


@dataclass
class Searched:
    """The part of a run in a search: it was a trial, or it has the values of the best of `trials`."""

    name: str
    role: Literal["trial", "final"]
    seed: int  # of the trials
    keys: dict[str, list[Any]]  # the values that were tried
    chosen: dict[str, Any] = field(default_factory=dict)
    selection: Selection | None = None  # of the trial that was chosen
    reported: bool = False  # the selection split is the one that the score is reported on
    trials: list[Trial] = field(default_factory=list)


@dataclass
class Record:
    """All that is kept of a run. Times are in seconds, dates ISO 8601 in UTC."""

    run: str  # `run_hash`
    status: Status
    created: str
    method: str
    task: str
    model: Backbone
    axes: list[Axes]
    unfreeze: str
    metric: str  # the main one, by which runs are ranked
    seed: int
    folder: Path = field(compare=False)  # where the record lies; not part of it
    schema_version: int = SCHEMA_VERSION
    point: str | None = None  # `run_hash` without the seed
    error: Failure | None = None
    finished: str | None = None
    overrides: list[str] = field(default_factory=list)  # of the command line
    budget: str | None = None  # as typed; the bottlenecks in `axes` were solved for it
    debug: str | None = None
    fidelity: str = "paper"  # the set of switches between the paper's text and its released code
    deviations: list[Deviation] = field(default_factory=list)  # the switches that make this run differ from the text
    counts: Counts | None = None
    scores: dict[str, Score] = field(default_factory=dict)  # by role: selection, report, report_SPLIT
    score: float | None = None  # the main metric on the report split
    selection: Selection | None = None
    search: Searched | None = None
    baselines: dict[str, float] = field(default_factory=dict)  # the main metric of: majority, head, lead1
    trainer: dict[str, Any] = field(default_factory=dict)
    # prepare_s, probe_s, train_s, evaluate_s, baseline_s, total_s; and earlier_s, the part of these that tries before
    # spent on training up to the checkpoints that this one went on from
    timings: dict[str, float] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # trainable tensors that the loss does not depend on
    steps: int | None = None
    tokens_per_s: float | None = None  # of training, padding not counted
    step_s: float | None = None  # the median optimiser step
    tflops: float | None = None  # 10^12 operations a second that the method needs, see arithmetic.py
    # With trainer.micro_batch: {"parts": 4, "halved_at": [0, 17]}: what a batch was split into at last, and the
    # optimiser steps in which memory ran out, 0 where it was tried.
    micro_batch: dict[str, Any] = field(default_factory=dict)
    fast_paths: list[str] = field(default_factory=list)  # that the training took: padding_free, fused_loss, ...
    peak_memory_bytes: int | None = None
    adapter_bytes: int | None = None
    data: dict[str, Any] = field(default_factory=dict)  # fingerprint, scored_on, package versions
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] | None = None  # commit, dirty; of the checkout that peftbench runs from

    def to_json(self) -> dict[str, Any]:
        """The record as nested dicts and lists of JSON values."""
        values = asdict(self)
        del values["folder"]
        return {"schema_version": values.pop("schema_version"), **values}

    @classmethod
    def from_json(cls, values: object, folder: Path) -> Record:
        """The record that `to_json` gave; unknown keys are passed over. Raises ValueError for anything else."""
        if not isinstance(values, dict) or "schema_version" not in values:
            raise ValueError("it is not the record of a run")
        if values["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {values['schema_version']}, not {SCHEMA_VERSION}")
        record: Record = _decode(cls, {**values, "folder": folder})
        return record

    def save(self) -> None:
        """Writes `record.json`."""
        with replacing(self.folder / FILE) as file:
            file.write(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """The run is done."""
        self._end("done")

    def interrupt(self) -> None:
        """The user stopped the run."""
        self._end("interrupted")

    def fail(self, error: BaseException) -> None:
        """The run ended by `error`, whose traceback goes to `error.txt`."""
        self.error = Failure("refused" if isinstance(error, UserError) else type(error).__name__, str(error))
        with replacing(self.folder / "error.txt") as file:
            file.writelines(traceback.format_exception(error))
        self._end("failed")

    def _end(self, status: Status) -> None:
        self.status, self.finished = status, _now()
        began, ended = datetime.fromisoformat(self.created), datetime.fromisoformat(self.finished)
        self.timings["total_s"] = (ended - began).total_seconds() + self.timings.get("earlier_s", 0.0)
        self.save()


@contextmanager
def recording(run: Run, folder: Path, overrides: Sequence[str]) -> Iterator[Record]:
    """The record of what happens inside: done at its end, interrupted by Ctrl-C, failed by any other exception."""
    record = start(run, folder, overrides)
    try:  # so that nothing half-done is ever called done
        yield record
        record.finish()
    except KeyboardInterrupt:
        record.interrupt()
        raise
    except BaseException as error:
        record.fail(error)
        raise


def forget_refused(folder: Path) -> None:
    """No record of a run that was refused while it was prepared: else a mistyped path would be a row of every table."""
    record = find(folder)
    if record is not None and record.status == "failed" and "prepare_s" not in record.timings:
        for name in (FILE, "config.yaml", "error.txt"):
            (folder / name).unlink(missing_ok=True)


def start(run: Run, folder: Path, overrides: Sequence[str]) -> Record:
    """A record of status running, and the resolved `config.yaml` beside it.

    What an earlier try left is cleared away, but for its checkpoints and the metrics up to them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = describe(run, folder, overrides)
    record.save()  # first of all: from here on the folder of an earlier run, if it is one, no longer says done
    for stale in (folder / "error.txt", folder / "predictions.jsonl", *folder.glob("*.tmp")):
        stale.unlink(missing_ok=True)
    if not (folder / CHECKPOINTS).is_dir():
        (folder / METRICS).unlink(missing_ok=True)
    with replacing(folder / "config.yaml") as file:
        OmegaConf.save(OmegaConf.structured(replace(run, sizes=None, size=None)), file)
    return record


def describe(run: Run, folder: Path, overrides: Sequence[str], status: Status = "running") -> Record:
    """The record of a run that has no results yet."""
    content = content_stamp(run.model.path) if run.model.path else None
    return Record(
        run=run_hash(run),
        point=run_hash(replace(run, seed=0)),
        status=status,
        created=_now(),
        method=run.method,
        task=run.task.name,
        model=Backbone(
            run.model.name,
            hub_id=None if content else run.model.hub_id,
            revision=None if content else run.model.revision,
            content=content,
        ),
        axes=axes_of(run),
        unfreeze=run.unfreeze.name,
        metric=run.task.metric,
        seed=run.seed,
        folder=folder,
        overrides=list(overrides),
        budget=run.budget,
        debug=run.debug,
        fidelity=run.fidelity.name,
        trainer=plain(run.trainer),
        versions=_versions(),
        git=_git(),
    )


def finished(folder: Path) -> Record | None:
    """The record of a run that is done, or None if `folder` holds none."""
    record = find(folder)
    return record if record is not None and record.status == "done" else None


def find(folder: Path) -> Record | None:
    """The record in `folder`, or None if it holds none that can be read."""
    try:
        return _read(folder / FILE)
    except (OSError, ValueError):
        return None


def load_records(folder: Path) -> tuple[list[Record], list[str]]:
    """The records anywhere below `folder`, and a sentence for each `record.json` that could not be read as one.

    Folders that are kept `APART` are passed over, unless `folder` is one or lies in one. Raises UserError where there
    is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the output_dir of runs, or make one with: peftbench train")
    files = []
    for place, below, names in os.walk(folder):
        if APART in names and Path(place) != folder:
            below.clear()
        elif FILE in names:
            files.append(Path(place, FILE))
    records, left_out = [], []
    for file in sorted(files):
        try:
            records.append(_read(file))
        except json.JSONDecodeError as error:
            left_out.append(f"{file} is left out: it is torn or no JSON (line {error.lineno}: {error.msg}).")
        except (OSError, ValueError, RecursionError) as error:
            left_out.append(f"{file} is left out: {error}.")
    return records, left_out


def kept_apart(folder: Path) -> list[Path]:
    """The folders right below `folder` that `load_records` passes over."""
    return sorted(mark.parent for mark in folder.glob(f"*/{APART}"))


def rewind_metrics(folder: Path, stage: str, step: int) -> None:
    """Drops the lines of `metrics.jsonl` that a training wrote after `step`, from which it now goes on."""
    file = folder / METRICS
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the last line of a process that died may be torn
            values = json.loads(line)
            if values["stage"] != stage or values["step"] <= step:
                kept.append(line + "\n")
    with replacing(file) as replacement:
        replacement.writelines(kept)


def append_metrics(folder: Path, values: dict[str, Any]) -> None:
    """Appends one line to `metrics.jsonl`, which can be read while the run goes on."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def predictions_file(role: str) -> str:
    """What the file with a role's predictions is called: `predictions.jsonl`, or `predictions.SPLIT.jsonl`."""
    return f"predictions{role.removeprefix('report').replace('_', '.', 1)}.jsonl"


def write_predictions(folder: Path, predictions: Iterable[dict[str, Any]], role: str = "report") -> None:
    """Writes `predictions.jsonl`, one line for each example."""
    write_lines(folder / predictions_file(role), predictions)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object on each line of a file."""
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that do not have the same value in all of `values`, in the order in which they first come."""
    keys = dict.fromkeys(key for one in values for key in one)
    absent = object()
    return [key for key in keys if any(one.get(key, absent) != values[0].get(key, absent) for one in values)]


def distinctive(typed: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys in which what was typed for runs differs, but for those below a group that differs and says as much:
    task.data_dir where each task has one."""

    def says_as_much(group: str, key: str) -> bool:
        values = {one.get(group) for one in typed}
        return group != key and len(values) == len({(one.get(group), one.get(key)) for one in typed})

    keys = differing(typed)
    return [key for key in keys if not ((group := key.partition(".")[0]) in keys and says_as_much(group, key))]


def axes_of(run: Run) -> list[Axes]:
    """The modifications of a run, each with the options in which it differs from a bare one."""
    bare = dict(flatten(plain(Modification())))
    shown = {"bottleneck", "composition_function.scale"} | {key for key in bare if key.endswith(".name")}
    return [
        Axes(
            prefix=prefix,
            functional_form=modification.functional_form.name,
            modified_representation=modification.modified_representation.name.name,
            insertion_form=modification.insertion_form.name.name,
            composition_function=modification.composition_function.name.name,
            scale=modification.composition_function.scale,
            bottleneck=modification.bottleneck,
            options={
                key: value
                for key, value in flatten(plain(modification))
                if key in bare and key not in shown and value != bare[key]
            },
        )
        for prefix, modification in modifications(run).items()
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "peftbench": peftbench.__version__}
    for package in ("torch", "transformers", "datasets"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@lru_cache(maxsize=1)
def _git() -> dict[str, Any] | None:
    """Commit and state of the checkout that peftbench runs from; None if it is installed, or git is not."""
    checkout = Path(peftbench.__file__).resolve().parent.parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=checkout, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top) != checkout:  # installed in an environment that lies inside somebody else's checkout
            return None
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _read(file: Path) -> Record:
    record = Record.from_json(json.loads(file.read_text(encoding="utf-8")), file.parent)
    if record.status == "running" and not is_held(record.folder):  # its process died without a word
        record.status = "interrupted"
    return record


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write to that takes the place of `path` once it is complete."""
    if path.exists() and not path.is_file():  # nothing takes the place of /dev/stdout
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # Half a surrogate pair, which UTF-8 cannot hold, becomes \udxxx: what JSON calls it too.
        with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


_hints = lru_cache(get_type_hints)


def _decode(kind: Any, value: Any, key: str = "") -> Any:
    """`value`, as JSON gives it, as the type `kind`. Raises ValueError that names the key where it does not fit."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:  # always X | None here
        return None if value is None else _decode(arguments[0], value, key)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        known = {
            item.name: _decode(_hints(kind)[item.name], value[item.name], f"{key}.{item.name}".lstrip("."))
            for item in fields(kind)
            if item.init and item.name in value
        }
        required = {item.name for item in fields(kind) if item.init and item.default is item.default_factory is MISSING}
        if missing := sorted(required - known.keys()):
            raise ValueError(f"{key or 'it'} lacks {', '.join(missing)}")
        return kind(**known)
    if origin is list and isinstance(value, list):
        return [_decode(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _decode(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is Any or (origin is Literal and value in arguments) or type(value) is kind or isinstance(value, Path):
        return value
    raise ValueError(f"{key or 'it'} is {str(value)[:40]!r}, which no record holds there")
