"""The columns of a table of runs, each under the name by which --show and --sort ask for it. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from peftbench.errors import meant
from peftbench.results.identity import IGNORED
from peftbench.results.paper import Printed, printed
from peftbench.results.record import Record, Searched, differing, flatten
from peftbench.results.row import Row, front, unscored

T = TypeVar("T")
Cost = Literal["stored", "memory", "time"]


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column of a table: `cell` gives a row's text in it, with one line for each modification of a mixture.

    Where the table is too wide, columns with the highest `dispensable` go first, and those with 0 stay.
    """

    key: str
    header: str
    cell: Callable[[T], str]
    value: Callable[[T], float | None] | None = None  # of a number: what is sorted by, and written to CSV and JSON
    spread: Callable[[T], float | None] | None = None  # its standard deviation
    better: Literal["higher", "lower"] | None = None  # which value of the column is marked as the best
    dispensable: int = 0
    words: bool = False  # on the left; numbers stand on the right
    wrap: int | None = None  # width in characters down to which cells may wrap; None: they never do


# What a run has one value of, by the names that filters, --rows, --columns, --show and --sort know.
FIELDS: dict[str, Callable[[Record], Any]] = {
    "method": lambda r: r.method,
    "task": lambda r: r.task,
    "model": lambda r: r.model.name,
    "seed": lambda r: r.seed,
    "status": lambda r: r.status,
    "error": lambda r: r.error.name if r.error else None,
    "debug": lambda r: r.debug,
    "unfreeze": lambda r: r.unfreeze,
    "functional_form": lambda r: [axes.functional_form for axes in r.axes],
    "modified_representation": lambda r: [axes.modified_representation for axes in r.axes],
    "insertion_form": lambda r: [axes.insertion_form for axes in r.axes],
    "composition_function": lambda r: [axes.composition_function for axes in r.axes],
    "scale": lambda r: [axes.scale for axes in r.axes],
    "bottleneck": lambda r: [axes.bottleneck for axes in r.axes],
    "learning_rate": lambda r: r.trainer.get("learning_rate"),
    "search": lambda r: r.search.name if r.search else None,
    "searched": lambda r: described(r.search) if r.search else None,
    "fidelity": lambda r: r.fidelity,
    "deviations": lambda r: [deviation.name for deviation in r.deviations],
    "budget": lambda r: r.budget,
    "metric": lambda r: r.metric,
    "split": lambda r: r.scores["report"].split if "report" in r.scores else None,
    "examples": lambda r: r.scores["report"].examples if "report" in r.scores else None,
    "data": lambda r: r.data.get("scored_on", "")[:8] or None,
    "train_examples": lambda r: r.data.get("splits", {}).get("train", {}).get("examples"),
    "backbone": lambda r: r.counts.backbone if r.counts else None,
    "trained": lambda r: r.counts.trained if r.counts else None,
    "stored": lambda r: r.counts.stored if r.counts else None,
    "percent": lambda r: r.counts.percent.get("stored") if r.counts else None,
    "score": lambda r: r.score if r.status == "done" else None,
    "steps": lambda r: r.steps,
    "tokens_per_s": lambda r: r.tokens_per_s,
    "step": lambda r: r.step_s,
    "tflops": lambda r: r.tflops,
    "memory": lambda r: None if r.peak_memory_bytes is None else r.peak_memory_bytes / 2**30,
    "time": lambda r: r.timings.get("total_s"),
    "device": lambda r: r.device,
    "run": lambda r: r.run,
    "created": lambda r: r.created,
}
COSTS = ("trained", "stored", "percent", "steps", "memory", "time")  # better when lower

PAPER = ("paper", "difference")  # columns of `beside_paper`


def described(search: Searched) -> str:
    """The values that a search tried, with the scores on the selection split or with why there is none."""
    if search.role == "trial":
        return f"trial: {typed(search.chosen)}"
    name = typed if len(search.keys) > 1 else lambda settings: text(*settings.values())
    scores = [trial.status if trial.value is None else _two(trial.value) for trial in search.trials]
    listed = (f"{name(trial.settings)}: {score}" for trial, score in zip(search.trials, scores, strict=True))
    return ("" if len(search.keys) > 1 else f"{next(iter(search.keys))} ") + ", ".join(listed)


def typed(setting: dict[str, Any]) -> str:
    """Values as they are typed."""
    return " ".join(f"{key}={text(value)}" for key, value in setting.items())


RUNS = Column[Row]("n", "n", lambda row: str(len(row.scored)), lambda row: len(row.scored))  # that have a score


# Where a run follows the paper's released code instead of its text.
DEVIATIONS = Column[Row](
    "deviations",
    "as in the code",
    lambda row: "\n".join(deviation.name.replace("_", " ") for deviation in row.first.deviations),
    words=True,
    wrap=16,
)


def field(key: str, records: Sequence[Record]) -> Callable[[Record], Any]:
    """What `key` stands for: one of `FIELDS`, a metric or a baseline of the report split, or a dotted key of a record.

    Raises KeyError, with the sentence that says so, for a key that none of the records has.
    """
    if key in FIELDS:
        return FIELDS[key]
    if any(key in r.scores["report"].metrics for r in records if "report" in r.scores):
        return partial(_metric, key)
    if any(key in r.baselines for r in records):
        return partial(_baseline, key)
    flat = {id(record): dict(flatten(record.to_json())) for record in records} if "." in key else {}
    if any(key in values for values in flat.values()):
        return lambda record: flat[id(record)].get(key)
    metrics = dict.fromkeys(name for r in records if "report" in r.scores for name in r.scores["report"].metrics)
    raise KeyError(f"{key} is no column{meant(key, [*FIELDS, *metrics])}")


def text(value: Any) -> str:
    """A value as it is shown and typed: a mixture's joined by " + ", nothing for none."""
    if isinstance(value, list):
        return " + ".join(map(text, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def columns(
    rows: Sequence[Row],
    status: Callable[[Record], str] | None = None,
    cost: Cost = "stored",
    paper: bool = False,
) -> list[Column[Row]]:
    """The columns of a table of what may be compared, as it is shown unless it is told otherwise.

    Args:
        status: says how a run ended; None: that is shown only where some run is not done.
        cost: of the Pareto front that is marked.
        paper: show the paper's scores also beside runs with another backbone or less data.
    """
    records = [record for row in rows for record in row.records]
    seeds = {record.seed for record in records}
    grouped = any(len(row.records) > 1 for row in rows)
    baselines = dict.fromkeys(name for record in records for name in record.baselines)
    apart = telling_apart(rows)
    found: list[Column[Row]] = [
        Column("method", "method", lambda r: f"{r.first.method} {r.first.debug or ''}".rstrip(), words=True, wrap=16),
        Column("axes", "four axes", _four, words=True, wrap=20),
        Column("bottleneck", "bottle-\nneck", _bottlenecks),
        *apart,
        number("trained", "trained", _count, dispensable=6),
        number("stored", "stored", _count, better="lower", dispensable=5),
        # ± needs its room, and so do seeds and what else tells rows apart
        number("percent", "% of\nmodel", _two, dispensable=2 if grouped or apart or len(seeds) > 1 else 0),
        # Every metric of the tasks is better when higher.
        number("score", f"{records[0].metric} ↑", _two, better="higher", of=FIELDS["score"], spread=True),
        *delta(rows),
        *beside_paper(rows, paper),
        *([RUNS] if grouped else []),
        *(number(name, name, _two, dispensable=6, of=partial(_baseline, name)) for name in baselines),
        number("tokens_per_s", "tokens\n/s", _count, better="higher", dispensable=10),
        number("memory", "peak\nGiB", _two, better="lower", dispensable=9),
        number("time", "time", duration, better="lower", dispensable=7),
        Column("seed", "seed", _seeds, dispensable=1 if len(seeds) > 1 and not grouped else 8, words=grouped),
        *pareto(rows, cost),
    ]
    found = [column for column in found if column.key not in ("tokens_per_s", "memory") or _any(column, rows)]
    if any(record.deviations for record in records):
        found.insert(2, DEVIATIONS)
    if status is not None or any(record.status != "done" for record in records):
        found.append(Column("status", "status", partial(_status, status or _ended), words=True, wrap=11))
    return found


def chosen(keys: Sequence[str], rows: Sequence[Row], cost: Cost, paper: bool = False) -> list[Column[Row]]:
    """The columns that were asked for by name. Raises KeyError, with a sentence, for a name that is none."""
    known = {column.key: column for column in columns(rows, _ended, cost, paper)}
    known |= {"n": RUNS, "deviations": DEVIATIONS}
    known |= {key: Column(key, key, lambda r: "", lambda r: None) for key in PAPER if key not in known}
    known["front"] = next(iter(pareto(rows, cost)), Column("front", "front", lambda r: ""))
    records = [record for row in rows for record in row.records]
    found = []
    for key in keys:
        if key in known:
            found.append(known[key])
            continue
        of = field(key, records)
        if all(isinstance(of(record), int | float | None) for record in records) and key != "seed":
            scores = key not in FIELDS and "." not in key  # a metric or a baseline
            found.append(number(key, key, _shortest, of=of, spread=scores, better="higher" if scores else None))
        else:
            found.append(Column(key, key, partial(_texts, of), words=True, wrap=16))
    return found


def number(
    key: str,
    header: str,
    form: Callable[[float], str],
    *,
    better: Literal["higher", "lower"] | None = None,
    dispensable: int = 0,
    of: Callable[[Record], float | None] | None = None,
    spread: bool = False,
) -> Column[Row]:
    """A column of a number of each run: its mean or median over a row's runs, with ± its standard deviation if told."""
    read = of or FIELDS[key]

    def cell(row: Row) -> str:
        value, deviation = row.number(read), row.spread(read) if spread else None
        return "" if value is None else form(value) + ("" if deviation is None else f" ± {form(deviation)}")

    return Column(
        key,
        header,
        cell,
        lambda row: row.number(read),
        (lambda row: row.spread(read)) if spread else None,
        better,
        dispensable,
    )


def telling_apart(rows: Sequence[Row]) -> list[Column[Row]]:
    """The trainer's settings, such as its learning rate, in which rows differ that would otherwise look alike."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    grouped = any(len(row.records) > 1 for row in rows)  # their seeds tell nothing apart that does not differ otherwise
    for row in rows:
        looks = (row.first.method, _four(row), _bottlenecks(row), "" if grouped else _seeds(row))
        alike.setdefault(looks, []).append(row)
    keys = {key for group in alike.values() for key in differing([row.first.trainer for row in group])}
    return [
        Column(f"trainer.{key}", key.replace("_", "\n", 1), partial(_texts, partial(_setting, key)), dispensable=1)
        for key in sorted(keys)
        if f"trainer.{key}" not in IGNORED
    ]


def delta(rows: Sequence[Row]) -> list[Column[Row]]:
    """The difference to the best full fine-tuning of the table, where there is one."""
    full = [row.score for row in rows if row.scored and row.first.unfreeze == "all" and not row.first.axes]
    best = max((score for score in full if score is not None), default=None)
    if best is None or len(rows) < 2:
        return []

    def value(row: Row) -> float | None:
        return row.score - best if row.scored and row.score is not None else None

    return [Column("delta", "Δ full", lambda row: _signed(value(row)), value, dispensable=3)]


def beside_paper(rows: Sequence[Row], everywhere: bool = False) -> list[Column[Row]]:
    """The paper's scores, and our difference to them; none where no row of the table is one of the paper's.

    They stand beside runs that had the paper's backbone and data. With `everywhere` they do beside other runs of the
    paper's rows too, with a column that says what they were printed for, and no difference.
    """
    known: dict[int, Printed] = {}
    for row in rows:
        found = next(filter(None, map(printed, row.records)), None)
        if found is not None and (found.same or everywhere):
            known[id(row)] = found
    if not known:
        return []

    def score(row: Row) -> float | None:
        return known[id(row)].score if id(row) in known else None

    def text_of(row: Row) -> str:
        return _two(known[id(row)].score) if id(row) in known else ""

    def difference(row: Row) -> float | None:
        found = known.get(id(row))
        return row.score - found.score if found and found.same and row.scored and row.score is not None else None

    def source(row: Row) -> str:
        return f"{known[id(row)].table}, {known[id(row)].backbone}" if id(row) in known else ""

    columns: list[Column[Row]] = [
        Column("paper", "paper", text_of, score, dispensable=0 if everywhere else 1),
        Column("paper_of", "printed for", source, words=True, wrap=10),
        Column("difference", "Δ paper", lambda row: _signed(difference(row)), difference, dispensable=1),
    ]
    return columns if everywhere else [columns[0], columns[2]]


def pareto(rows: Sequence[Row], cost: Cost) -> list[Column[Row]]:
    """A mark at the rows that no other one beats in both score and cost; none where there is nothing to choose."""
    best = {id(row) for row in front(rows, FIELDS[cost])}
    if sum(1 for row in rows if row.scored) < 3 or not best:
        return []
    return [Column("front", "front", lambda row: "◆" if id(row) in best else "", dispensable=4)]


def best_of(column: Column[T], rows: Sequence[T]) -> set[int]:
    """The indices of the rows with the column's best value; none where all are equal."""
    if column.better is None or column.value is None:
        return set()
    values = {index: column.value(row) for index, row in enumerate(rows) if not unscored(row)}
    known = {index: value for index, value in values.items() if value is not None and not math.isnan(value)}
    if len(set(known.values())) < 2:
        return set()
    goal = (max if column.better == "higher" else min)(known.values())
    return {index for index, value in known.items() if value == goal}


def flat_header(column: Column[T]) -> str:
    """A column's header on one line."""
    return column.header.replace("-\n", "").replace("\n", " ")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _any(column: Column[Row], rows: Sequence[Row]) -> bool:
    return any(column.cell(row) for row in rows)


def _setting(key: str, record: Record) -> Any:
    return record.trainer.get(key)


def _bottlenecks(row: Row) -> str:
    """Of each modification."""
    return "\n".join(_count(one.bottleneck) for one in row.first.axes)


def _four(row: Row) -> str:
    """The four axes of each modification, then what else is trained."""
    lines = []
    for axes in row.first.axes:
        names = (axes.functional_form, axes.modified_representation, axes.insertion_form, axes.composition)
        lines.append(" · ".join(names))
    unfreeze = row.first.unfreeze
    if unfreeze != "none":
        named = {"bias": "the biases", "norm": "the norms", "all": "all parameters"}
        lines.append(named.get(unfreeze, unfreeze))
    return "\n".join(lines)


def _seeds(row: Row) -> str:
    seeds = [str(record.seed) for record in row.records]
    return ", ".join(seeds) if len(seeds) < 6 else f"{len(seeds)} seeds"


def _texts(of: Callable[[Record], Any], row: Row) -> str:
    return ", ".join(dict.fromkeys(text(of(record)) for record in row.records))


def _status(ended: Callable[[Record], str], row: Row) -> str:
    counted = Counter(map(ended, row.records))
    if len(counted) > 1:  # the errors stand in the table of single runs
        counted = Counter(record.status for record in row.records)
    if len(counted) == 1:
        return next(iter(counted))
    return ", ".join(f"{number} {status}" for status, number in counted.items())


def _ended(record: Record) -> str:
    return f"{record.status}: {record.error.name}" if record.error else record.status


def _metric(name: str, record: Record) -> float | None:
    return record.scores["report"].metrics.get(name) if "report" in record.scores else None


def _baseline(name: str, record: Record) -> float | None:
    return record.baselines.get(name)


def _count(number: float | None) -> str:
    return "" if number is None else f"{round(number):,}"


def _shortest(number: float) -> str:
    return f"{number:,.0f}" if number == round(number) else _two(number) if number >= 0.1 else f"{number:g}"


def _two(number: float) -> str:
    return f"{number:.2f}"


def _signed(number: float | None) -> str:
    return "" if number is None else f"{number:+.2f}"
