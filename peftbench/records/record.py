"""The record of one run: what was trained, how it scored and what it cost.

It is stored in the run's folder as `record.json`; `load_records` reads the records below a folder. Tables, plots and
reports are made from records. `recording.py` writes them.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from peftbench.config.axes import format_axes, format_composition
from peftbench.config.fidelity import Deviation
from peftbench.records.lock import is_held
from peftbench.utils.errors import UserError
from peftbench.utils.files import dump_json, read_json, replace_file, resolve_folder

SCHEMA_VERSION = 1
FILE = "record.json"
# A folder with this file is left out when the records of a folder above it are read: outputs/reference came with the
# checkout, and its runs are not the user's.
APART = ".apart"
REPORT_SCORE = "score"  # of `Divergence.what`: that on the report split

# trained: a trial of a search that was scored on the selection split alone; it has an adapter and no score, and goes on
# if it is chosen. diverged: the training produced numbers that are not finite; such a run has no score and is not
# trained again automatically. missing: a run of a sweep that has not begun; it has no record.
Status = Literal["running", "done", "trained", "diverged", "failed", "interrupted", "missing"]


class NewerError(ValueError):
    """A later version of peftbench wrote the record, and this version cannot read it."""


@dataclass
class Failure:
    """The exception that ended a run; its traceback is in `error.txt`."""

    name: str  # the exception's class; "refused" for a UserError
    message: str

    @property
    def said(self) -> str:
        """The failure on one line."""
        return " ".join(f"{self.name}: {self.message}".split())


@dataclass
class Divergence:
    """Where a training was first seen to have numbers that are not finite."""

    what: str  # what was not finite: loss, gradient norm, weights, score, or selection score
    step: int | None = None  # optimiser steps done; None if the record does not say

    @property
    def said(self) -> str:
        """The divergence as part of a sentence."""
        verb = "were" if self.what == "weights" else "was"
        return f"the {self.what} {verb} not finite" + ("" if self.step is None else f" at step {self.step}")


@dataclass
class Attempt:
    """One start of a run. A run that was interrupted has several, each after the one before."""

    started: str  # ISO 8601 in UTC
    host: str
    step: int = 0  # the optimiser step from which the training went on
    gpu: str | None = None  # the UUID of the first, which tells cards of one kind apart
    ended: str | None = None  # None: its process was killed, or an earlier version wrote it


@dataclass
class RecordedBackbone:
    """The frozen model: a hub id at a revision, or the content stamp of a local folder."""

    name: str
    hub_id: str | None
    revision: str | None
    content: str | None
    parameters: int | None = None
    quantization: str | None = None  # model.quantization, or the format of a folder that is quantised already


@dataclass
class Axes:
    """One modification as a point on the four axes; `prefix` is the start of its config keys, "" or "mix.NAME."."""

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
        return format_composition(self.composition_function, self.scale, learned)

    @property
    def in_line(self) -> str:
        """The four axes in one line, as tables show them."""
        return format_axes(self.functional_form, self.modified_representation, self.insertion_form, self.composition)


@dataclass
class RecordedCounts:
    """Numbers of parameters. `percent` is derived: trained, stored and paper in % of the backbone."""

    backbone: int
    trained: int  # parameters that the optimiser updates
    stored: int  # parameters in a checkpoint, without the head and with the prefix MLP folded
    head: int
    paper: int | None  # by the formula of the paper's appendix B
    dead: int = 0  # what the paper's released code also trains, though nothing reads it (fidelity.dead_parameters)
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
    of: int | None = None  # examples in the split, if not all of them were taken


@dataclass
class Selection:
    """What a search compares: the task's selection metric on the selection split."""

    split: str
    examples: int
    metric: str
    value: float | None  # None: the training diverged
    of: int | None = None  # examples in the split, if not all of them were taken


@dataclass
class LanguageModelling:
    """The backbone's own language model on a text: its loss in nats for each token, and its accuracy in percent."""

    loss: float
    accuracy: float


@dataclass
class Retention:
    """What a training leaves of the backbone's general ability."""

    text: str  # its name
    stamp: str  # a hash of its content
    tokens: int  # that were predicted
    before: LanguageModelling
    after: LanguageModelling | None = None


@dataclass
class Throughput:
    """How fast a model predicts, and the GPU memory that it takes at most; None on a CPU."""

    tokens_per_s: float
    memory_bytes: int | None


@dataclass
class Speed:
    """The finished run beside the bare backbone, on the same inputs."""

    of: Literal["written", "read"]  # what is counted: generated tokens, or those of the inputs
    examples: int
    tokens: int
    bare: Throughput
    trained: Throughput


@dataclass
class Trial:
    """One of the runs that a search compared, and its result."""

    settings: dict[str, Any]
    run: str  # `run_hash`
    value: float | None  # of `Selection`; None: it failed or diverged
    status: str


@dataclass
class Searched:
    """The role of a run in a search: a trial, or the run with the values of the best of `trials`."""

    name: str
    role: Literal["trial", "final"]
    seed: int  # of the trials
    keys: dict[str, list[Any]]  # the values that were tried, by key
    chosen: dict[str, Any] = field(default_factory=dict)
    selection: Selection | None = None  # of the trial that was chosen
    reported: bool = False  # the selection split is also the report split
    trials: list[Trial] = field(default_factory=list)
    study: str | None = None  # the name of the study, whose trials were chosen one after another
    pruned: bool = False  # the study gave this trial up by a look, and its status is interrupted


@dataclass
class Record:
    """Everything that is recorded about a run. Times are in seconds, dates ISO 8601 in UTC."""

    run: str  # `run_hash`
    status: Status
    created: str
    method: str
    task: str
    model: RecordedBackbone
    axes: list[Axes]
    unfreeze: str
    metric: str  # the main one, by which runs are ranked
    seed: int
    folder: Path = field(compare=False)  # the record's location; not part of the record
    schema_version: int = SCHEMA_VERSION
    point: str | None = None  # `run_hash` without the seed
    attempts: list[Attempt] = field(default_factory=list)  # none in records of earlier versions
    error: Failure | None = None
    diverged: Divergence | None = None
    finished: str | None = None
    overrides: list[str] = field(default_factory=list)  # of the command line
    budget: str | None = None  # as typed; the bottlenecks in `axes` were solved for it
    debug: str | None = None
    test_file: str | None = None  # the user's files or folder with the scored rows, as typed
    fidelity: str = "paper"  # the set of switches between the paper's text and its released code
    notes: list[str] = field(default_factory=list)  # on the sizes, for example that they were fitted to the backbone
    deviations: list[Deviation] = field(default_factory=list)  # the switches that make this run differ from the text
    counts: RecordedCounts | None = None
    scores: dict[str, Score] = field(default_factory=dict)  # by role: selection, report, report_SPLIT
    score: float | None = None  # the main metric on the report split
    # By role: the share of generated texts that ended at the maximum length, not with an end token.
    cut_off: dict[str, float] = field(default_factory=dict)
    selection: Selection | None = None
    # The run is or was a trial with the status trained, and has no score yet. While it goes on, and if that fails, what
    # it came to on the selection split stays what its search compares.
    unreported: bool = False
    search: Searched | None = None
    studies: list[str] = field(default_factory=list)  # that this run is or was a trial of, besides what `search` says
    baselines: dict[str, float] = field(default_factory=dict)  # the main metric of: majority, head, lead1
    trainer: dict[str, Any] = field(default_factory=dict)
    # prepare_s, probe_s, train_s, evaluate_s, baseline_s, total_s; measure_s, of retention and speed, which is no part
    # of total_s; select_s, the part of evaluate_s that a trial took; and earlier_s, the part of these that earlier
    # attempts spent on training up to the checkpoints from which the run was resumed, and on select_s
    timings: dict[str, float] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)  # trainable tensors that the loss does not depend on
    steps: int | None = None
    tokens_per_s: float | None = None  # in training, without padding
    step_s: float | None = None  # the median optimiser step
    tflops: float | None = None  # 10^12 operations per second that the method needs, see arithmetic.py
    # With trainer.micro_batch: {"parts": 4, "halved_at": [0, 17]}: the number of parts of a batch at the end, and the
    # optimiser steps in which memory ran out; 0 is the try before the first step.
    micro_batch: dict[str, Any] = field(default_factory=dict)
    fast_paths: list[str] = field(default_factory=list)  # used in training: padding_free, fused_loss, ...
    peak_memory_bytes: int | None = None
    retention: Retention | None = None  # with retention=
    speed: Speed | None = None  # with speed=true
    adapter_bytes: int | None = None
    adapter_stamp: str | None = None  # a hash of the file with the trained tensors, see config/stamps.py
    data: dict[str, Any] = field(default_factory=dict)  # fingerprint, scored_on, package versions
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    own_code: dict[str, str] = field(default_factory=dict)  # a hash of the file of each own part, by its dotted name
    git: dict[str, Any] | None = None  # commit, dirty; of the checkout from which peftbench runs

    # When this process began with the run, by a clock that nobody sets back; not part of the record.
    clock: float | None = field(default=None, init=False, compare=False, repr=False)
    # In a table of some groups of the examples: which these are (tables/groups.py); not part of the record.
    restricted: Any = field(default=None, init=False, compare=False, repr=False)

    @property
    def outcome(self) -> str:
        """The status, with the error of a failed run, or the step at which a run was seen to diverge."""
        if self.diverged is not None and self.diverged.step is not None:
            return f"{self.status}: step {self.diverged.step}"
        return f"{self.status}: {self.error.name}" if self.error else self.status

    @property
    def has_ended(self) -> bool:
        """Whether the run is done or has diverged: it is not trained again unless `rerun=true`."""
        return self.status in ("done", "diverged")

    @property
    def compared(self) -> Selection | None:
        """What a search compares of the run, once that is known: of one that is done, or of a trial that is trained.

        It is also known of a trial while its report split is being scored, if that was interrupted or failed, and if
        that score is not finite.
        """
        return self.selection if self.has_ended or self.unreported else None

    @property
    def study(self) -> str | None:
        """The name of the study that had this run trained; None: none did."""
        return None if self.search is None else self.search.study

    @property
    def is_full(self) -> bool:
        """Whether this is full fine-tuning: the whole backbone is trained, and no representation is modified."""
        return self.unfreeze == "all" and not self.axes

    def to_json(self) -> dict[str, Any]:
        """Return the record as nested dicts and lists of JSON values."""
        values = asdict(self)
        del values["folder"], values["clock"], values["restricted"]
        return {"schema_version": values.pop("schema_version"), **values}

    @classmethod
    def from_json(cls, values: object, folder: Path) -> Record:
        """Return the record from `to_json`'s values; unknown keys are ignored. Raises ValueError for anything else."""
        if not isinstance(values, dict) or "schema_version" not in values:
            raise ValueError("it is not the record of a run")
        version = values["schema_version"]
        if type(version) is int and version > SCHEMA_VERSION:
            raise NewerError(f"a newer peftbench wrote it (schema_version {version}; this one reads {SCHEMA_VERSION})")
        if version != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {version!r}, not {SCHEMA_VERSION}")
        record: Record = decode(cls, {**values, "folder": folder})
        _check_values(record)
        return record

    def save(self) -> None:
        """Write `record.json`."""
        with replace_file(self.folder / FILE) as file:
            file.write(dump_json(self.to_json(), indent=2) + "\n")

    def diverge(self, divergence: Divergence) -> None:
        """Note that the training diverged. Such a run has no score, so that it is never compared.

        Only a search still compares it, if what is not finite is the score on the report split: no choice rests on it.
        """
        self.diverged, self.score, self.unreported = divergence, None, False
        if divergence.what != REPORT_SCORE:
            self.selection = None
        self.scores.clear()

    def take_up(self, trial: Record) -> None:
        """Take over what a trial, as which this run was trained, came to on the selection split.

        Other processes read it here until the run has ended: those that train what the search has chosen.
        """
        self.unreported, self.selection = trial.unreported, trial.selection
        self.counts, self.data, self.peak_memory_bytes = trial.counts, trial.data, trial.peak_memory_bytes
        self.scores = {role: score for role, score in trial.scores.items() if role == "selection"}
        self.cut_off = {role: share for role, share in trial.cut_off.items() if role == "selection"}
        self.adapter_stamp = trial.adapter_stamp
        if "select_s" in trial.timings:
            self.timings["select_s"] = trial.timings["select_s"]

    def forget_trial(self) -> None:
        """Forget what `take_up` took over: the run was trained again."""
        self.unreported, self.selection, self.peak_memory_bytes, self.adapter_stamp = False, None, None, None
        self.scores.clear()
        self.cut_off.clear()
        self.timings.pop("select_s", None)

    def finish(self, reported: bool = True) -> None:
        """Note that the run is done, or has diverged.

        Args:
            reported: its report split was scored; if not, it is a trial that is trained.
        """
        self.unreported = not reported and self.diverged is None
        if self.unreported and "evaluate_s" in self.timings:
            self.timings["select_s"] = self.timings["evaluate_s"]
        self._end("trained" if self.unreported else "done" if self.diverged is None else "diverged")

    def interrupt(self) -> None:
        """Note that the user stopped the run."""
        self._end("interrupted")

    def fail(self, error: BaseException) -> None:
        """Note that `error` ended the run, and write its traceback to `error.txt`."""
        self.error = Failure("refused" if isinstance(error, UserError) else type(error).__name__, str(error))
        with replace_file(self.folder / "error.txt") as file:
            file.writelines(traceback.format_exception(error))
        self._end("failed")

    def _end(self, status: Status) -> None:
        self.status, self.finished = status, get_time()
        if self.attempts:
            self.attempts[-1].ended = self.finished
        began, ended = datetime.fromisoformat(self.created), datetime.fromisoformat(self.finished)
        seconds = (ended - began).total_seconds() if self.clock is None else time.monotonic() - self.clock
        seconds = max(0.0, seconds - self.timings.get("measure_s", 0.0))
        self.timings["total_s"] = round(seconds, 3) + self.timings.get("earlier_s", 0.0)
        self.save()


def find_finished(folder: Path) -> Record | None:
    """Return the record of a run that is done or has diverged, or None if `folder` has none."""
    record = find_record(folder)
    return record if record is not None and record.has_ended else None


def find_trained(folder: Path) -> Record | None:
    """Return the record of a trial that is trained and not scored on its report split, or None if `folder` has none."""
    record = find_record(folder)
    return record if record is not None and record.unreported else None


def find_record(folder: Path) -> Record | None:
    """Return the record in `folder`, or None if there is none that can be read."""
    try:
        return _read_record(folder / FILE)
    except (OSError, ValueError):
        return None


def refuse_newer(folder: Path) -> None:
    """Raise UserError if a newer peftbench wrote the record in `folder`, which must not be overwritten."""
    try:
        _read_record(folder / FILE)
    except NewerError as error:
        raise UserError(f"{folder / FILE}: {error}; train with that version, or in another output_dir.") from None
    except (OSError, ValueError):  # no record, or an incomplete one
        pass


def describe_damage(folder: Path) -> str | None:
    """Return why the record in `folder` cannot be read; None if it can, or there is none."""
    try:
        _read_record(folder / FILE)
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        return "it is incomplete or not JSON"
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None


def load_records(folder: Path) -> tuple[list[Record], list[str]]:
    """Return the records anywhere below `folder`, and a sentence for each `record.json` or folder that cannot be read.

    Folders that are kept `APART` are skipped, unless `folder` is one or is in one. Raises UserError if `folder` is not
    a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the output_dir of runs, or make one with: peftbench train")
    records: list[Record] = []
    left_out: list[str] = []
    files, seen, resolved = [], set[str](), dict[str, str]()

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a checkpoint that was deleted meanwhile
            left_out.append(f"{error.filename} is left out: {error.strerror}.")

    # Some folders may be links to another disk, and links may form cycles.
    for place, below, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = resolve_folder(place, resolved)
        if real in seen or (APART in names and Path(place) != folder):
            below.clear()
        elif FILE in names:
            files.append(Path(place, FILE))
        seen.add(real)
        below.sort()
    for file in sorted(files):
        try:
            records.append(_read_record(file))
        except json.JSONDecodeError as error:
            left_out.append(f"{file} is left out: it is incomplete or not JSON (line {error.lineno}: {error.msg}).")
        except OSError as error:
            left_out.append(f"{file} is left out: {error.strerror or error}.")
        except ValueError as error:
            left_out.append(f"{file} is left out: {error}.")
    return records, left_out


def find_kept_apart(folder: Path) -> list[Path]:
    """Return the folders directly below `folder` that `load_records` skips."""
    return sorted(mark.parent for mark in folder.glob(f"*/{APART}"))


def get_time() -> str:
    """Return the time in UTC, in the format of records."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _read_record(file: Path) -> Record:
    record = Record.from_json(read_json(file), file.parent)
    if record.status == "running" and not is_held(record.folder):  # its process died without a word
        record.status = "interrupted"
    elif record.status == "done" and (divergence := detect_divergence(record)) is not None:
        record.status = "diverged"
        record.diverge(divergence)
    return record


def detect_divergence(record: Record) -> Divergence | None:
    """What of the scores of a run shows that it diverged: one that is not finite. An earlier version called it done."""
    if record.selection is not None and record.selection.value is None:
        return Divergence("selection score")
    if record.score is not None and not math.isfinite(record.score):
        return Divergence(REPORT_SCORE)
    return None


class _Schema(NamedTuple):
    """A dataclass: the types of the fields that it is made from, and the names of those without a default."""

    kinds: dict[str, Any]
    required: frozenset[str]


@cache
def _read_kind(kind: Any) -> tuple[Any, tuple[Any, ...], _Schema | None]:
    """Return the origin and the arguments of a type, such as list and (int,), and its schema if it is a dataclass."""
    schema = None
    if isinstance(kind, type) and is_dataclass(kind):
        hints, made_from = get_type_hints(kind), [item for item in fields(kind) if item.init]
        required = frozenset(item.name for item in made_from if item.default is item.default_factory is MISSING)
        schema = _Schema({item.name: hints[item.name] for item in made_from}, required)
    return get_origin(kind), get_args(kind), schema


def decode(kind: Any, value: Any, key: str = "") -> Any:
    """Convert `value`, as parsed from JSON, to the type `kind`. Raises ValueError with the key if it does not fit."""
    origin, arguments, schema = _read_kind(kind)
    if origin is UnionType:  # always X | None here
        return None if value is None else decode(arguments[0], value, key)
    if schema is not None and isinstance(value, dict):
        known = {
            name: decode(below, value[name], f"{key}.{name}".lstrip("."))
            for name, below in schema.kinds.items()
            if name in value
        }
        if missing := sorted(schema.required - known.keys()):
            raise ValueError(f"{key or 'it'} lacks {', '.join(missing)}")
        return kind(**known)
    if origin is list and isinstance(value, list):
        return [decode(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: decode(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and value is None:  # JSON has null for a number that is not finite
        return math.nan
    if kind is Any or (origin is Literal and value in arguments) or type(value) is kind or isinstance(value, Path):
        return value
    raise _describe_misplaced(value, key or "it")


def _check_values(record: Record) -> None:
    """Raise ValueError for values that have the right types, but on which the record's readers could not rely."""
    for name, moment in {"created": record.created, "finished": record.finished}.items():
        if moment is not None and not _has_zone(moment):
            raise _describe_misplaced(moment, name)
    for name, seconds in record.timings.items():
        if not math.isfinite(seconds):
            raise _describe_misplaced(seconds, f"timings.{name}")
    decode(dict[str, dict[str, Any]], record.data.get("splits", {}), "data.splits")
    decode(str, record.data.get("scored_on", ""), "data.scored_on")


def _has_zone(moment: str) -> bool:
    """Return whether the text is a date and time, and says in which time zone."""
    try:
        return datetime.fromisoformat(moment).tzinfo is not None
    except ValueError:
        return False


def _describe_misplaced(value: object, key: str) -> ValueError:
    return ValueError(f"{key} is {str(value)[:40]!r}, which is not valid there")
