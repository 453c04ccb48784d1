"""The columns of a table of runs, each under its name for --show and --sort."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from peftbench.config.axes import UNFROZEN
from peftbench.config.identity import IGNORED
from peftbench.config.schema import index_by_key
from peftbench.records.record import Record
from peftbench.records.wording import format_value
from peftbench.tables.fields import (
    AVERAGE,
    FIELDS,
    MANY_CUT_OFF,
    average_scores,
    find_field,
    get_baseline,
    get_further_score,
    list_further_splits,
)
from peftbench.tables.paper import Printed, find_printed
from peftbench.tables.row import Row, find_front, identify_data, identify_point, is_below_baseline, is_unscored
from peftbench.utils.differences import find_differing

if TYPE_CHECKING:
    from peftbench.tables.intervals import Interval

T = TypeVar("T")
Cost = Literal["stored", "memory", "time"]
COST: Cost = "stored"  # unless another one is asked for


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column of a table: `cell` returns a row's text, with one line for each modification of a mixture.

    If the table is too wide, columns with the highest `dispensable` are dropped first; those with 0 stay.
    """

    key: str
    header: str
    cell: Callable[[T], str]
    value: Callable[[T], float | None] | None = None  # for numbers: the sort key, and the value in CSV and JSON
    spread: Callable[[T], float | None] | None = None  # its standard deviation
    better: Literal["higher", "lower"] | None = None  # which value of the column is marked as the best
    dispensable: int = 0
    words: bool = False  # left-aligned; numbers are right-aligned
    wrap: int | None = None  # minimum width in characters to which cells may wrap; None: they never wrap
    marks: tuple[tuple[str, str], ...] = ()  # signs in the cells, each with its meaning
    interval: Callable[[T], Interval | None] | None = None  # shown in place of the standard deviation


# Paths of files: only their content counts, and other content would be another data set or backbone.
PATHS = ("model.path", "task.data_dir", "task.train_file", "task.validation_file", "task.test_file")

PAPER = ("paper", "difference")  # columns of `make_paper_columns`

RUNS = Column[Row]("n", "n", lambda row: str(len(row.scored)), lambda row: len(row.scored))  # runs with a score

FRONT_MARK, BELOW_MARK = "◆", "▽"
COST_NAMES: dict[Cost, str] = {"stored": "stored parameters", "memory": "peak memory", "time": "time"}

OUTCOME = attrgetter("outcome")  # outcome of a record

# The places at which a run follows the paper's released code instead of its text.
DEVIATIONS = Column[Row](
    "deviations",
    "as in the code",
    lambda row: "\n".join(deviation.name.replace("_", " ") for deviation in row.first.deviations),
    words=True,
    wrap=16,
)


def choose_columns(
    rows: Sequence[Row],
    status: Callable[[Record], str] | None = None,
    cost: Cost = COST,
    paper: bool = False,
    interval: bool = False,
) -> list[Column[Row]]:
    """Return the default columns of a table of comparable runs.

    Args:
        status: text for how a run ended; None: its outcome, shown only if some run is not done.
        cost: the cost of the Pareto front that is marked.
        paper: show the paper's scores also next to runs with another backbone or less data.
        interval: show the 95% interval of a mean in place of the standard deviation.
    """
    records = [record for row in rows for record in row.records]
    seeds = {record.seed for record in records}
    grouped = any(len(row.records) > 1 for row in rows)
    baselines = dict.fromkeys(name for record in records for name in record.baselines)
    apart = find_distinguishing(rows)
    found: list[Column[Row]] = [
        Column("method", "method", lambda r: f"{r.first.method} {r.first.debug or ''}".rstrip(), words=True, wrap=17),
        Column("axes", "four axes", _format_axes, words=True, wrap=20),
        Column("bottleneck", "bottle-\nneck", _format_bottlenecks),
        *apart,
        make_number("trained", "trained", _format_count, dispensable=6),
        make_number("stored", "stored", _format_count, better="lower", dispensable=5),
        # ± needs space, and so do the seeds and the other settings that distinguish rows.
        make_number("percent", "% of\nmodel", _format_two, dispensable=2 if grouped or apart or len(seeds) > 1 else 0),
        # For every metric of the tasks, higher is better.
        _make_score_column(records[0].metric, _estimate(FIELDS["score"], rows, True) if interval else None),
        *([SELECTION] if any(record.status == "trained" for record in records) else []),
        *([CUT_OFF] if any((FIELDS["cut_off"](record) or 0) > MANY_CUT_OFF for record in records) else []),
        *([_make_average_column(rows, interval)] if len(list_further_splits(records)) > 1 else []),
        *(_make_further_column(split, rows, interval) for split in list_further_splits(records)),
        *make_delta_columns(rows),
        *make_paper_columns(rows, paper),
        *([RUNS] if grouped else []),
        *(make_number(name, name, _format_two, dispensable=6, of=partial(get_baseline, name)) for name in baselines),
        *make_measured_columns(rows, interval),
        make_number("tokens_per_s", "tokens\n/s", _format_count, better="higher", dispensable=10),
        make_number("memory", "peak\nGiB", _format_two, better="lower", dispensable=9),
        make_number("time", "time", format_duration, better="lower", dispensable=7),
        Column("seed", "seed", _format_seeds, dispensable=1 if len(seeds) > 1 and not grouped else 8, words=grouped),
        *make_front_columns(rows, cost),
    ]
    found = [c for c in found if c.key not in ("tokens_per_s", "memory") or any(c.cell(row) for row in rows)]
    if any(record.deviations for record in records):
        found.insert(2, DEVIATIONS)
    if status is not None or any(record.status != "done" for record in records):
        found.append(Column("status", "status", partial(_format_status, status or OUTCOME), words=True, wrap=11))
    return found


def find_columns(
    keys: Sequence[str], rows: Sequence[Row], cost: Cost, paper: bool = False, interval: bool = False
) -> list[Column[Row]]:
    """Return the columns that were asked for by name. Raises UserError for an unknown name."""
    known = {column.key: column for column in choose_columns(rows, OUTCOME, cost, paper, interval)}
    known |= {"n": RUNS, "deviations": DEVIATIONS, "cut_off": CUT_OFF}
    known |= {key: Column(key, key, lambda r: "", lambda r: None) for key in PAPER if key not in known}
    known["front"] = next(iter(make_front_columns(rows, cost)), Column("front", "front", lambda r: ""))
    records = [record for row in rows for record in row.records]
    found = []
    for key in keys:
        if key in known:
            found.append(known[key])
            continue
        of = find_field(key, records)
        if all(isinstance(of(record), int | float | None) for record in records) and key != "seed":
            scores = key not in FIELDS and "." not in key  # a metric or a baseline
            found.append(
                make_number(
                    key,
                    key,
                    _format_shortest,
                    of=of,
                    spread=scores,
                    better="higher" if scores else None,
                    intervals=_estimate(of, rows, key == records[0].metric) if interval and scores else None,
                )
            )
        else:
            found.append(Column(key, key, partial(_format_texts, of), words=True, wrap=16))
    return found


def make_number(
    key: str,
    header: str,
    form: Callable[[float], str],
    *,
    better: Literal["higher", "lower"] | None = None,
    dispensable: int = 0,
    of: Callable[[Record], float | None] | None = None,
    spread: bool = False,
    intervals: Mapping[int, Interval] | None = None,
) -> Column[Row]:
    """Return a column with a number of each run: its mean or median over a row's runs, followed by ± its standard
    deviation if `spread` is set, or ± half its interval if the rows' `intervals` are given."""
    read = of or FIELDS[key]

    def cell(row: Row) -> str:
        value, deviation = row.number(read), row.spread(read) if spread else None
        if intervals is not None:
            deviation = intervals[id(row)].half if id(row) in intervals else None
        return "" if value is None else form(value) + ("" if deviation is None else f" ± {form(deviation).lstrip('+')}")

    return Column(
        key,
        header,
        cell,
        lambda row: row.number(read),
        (lambda row: row.spread(read)) if spread and intervals is None else None,
        better,
        dispensable,
        marks=_explain_intervals(key, intervals),
        interval=None if intervals is None else (lambda row: intervals.get(id(row))),
    )


def _estimate(of: Callable[[Record], float | None], rows: Sequence[Row], is_score: bool) -> dict[int, Interval]:
    from peftbench.tables.intervals import estimate_means  # slow to import, and most tables show no interval

    return estimate_means(rows, of, is_score)


def _explain_intervals(key: str, intervals: Mapping[int, Interval] | None) -> tuple[tuple[str, str], ...]:
    """Return what ± means in a column of intervals."""
    if not intervals:
        return ()
    from peftbench.tables.intervals import describe_ways

    return (("±", f"of {key} is half the 95% interval of the mean: {describe_ways(intervals.values())}"),)


def _make_score_column(metric: str, intervals: Mapping[int, Interval] | None) -> Column[Row]:
    """Return the column of the main metric; a score below a baseline is marked."""
    plain = make_number("score", f"{metric} ↑", _format_two, better="higher", spread=True, intervals=intervals)

    def cell(row: Row) -> str:
        return f"{plain.cell(row)} {BELOW_MARK}" if is_below_baseline(row) else plain.cell(row)

    return replace(plain, cell=cell, marks=((BELOW_MARK, "below a baseline"), *plain.marks))


# The score by which a search chooses: shown beside trials that have no other.
SELECTION = make_number("selection", "selec-\ntion", "{:.2f}".format)
# The share of generated texts that ended by their length: shown where it is large, for such a score says little.
CUT_OFF = make_number("cut_off", "cut\noff", "{:.1%}".format, dispensable=2)


def _make_further_column(split: str, rows: Sequence[Row], interval: bool) -> Column[Row]:
    """Return the column of a split scored in addition to the report split; each line has one word of its name."""
    header = f"{split} ↑".replace("_", "\n")
    of = partial(get_further_score, split)
    intervals = _estimate(of, rows, False) if interval else None
    return make_number(
        split, header, _format_two, better="higher", dispensable=4, of=of, spread=True, intervals=intervals
    )


def _make_average_column(rows: Sequence[Row], interval: bool) -> Column[Row]:
    """Return the column of the average over the report split and the further ones, several sets of one task."""
    records = [record for row in rows for record in row.records]
    header = f"average\nof {len(list_further_splits(records)) + 1} ↑"
    of = average_scores(records)
    intervals = _estimate(of, rows, False) if interval else None
    return make_number(
        AVERAGE, header, _format_two, better="higher", dispensable=1, of=of, spread=True, intervals=intervals
    )


def find_distinguishing(rows: Sequence[Row]) -> list[Column[Row]]:
    """Return columns for the settings in which rows differ that would otherwise look alike.

    They are the trainer's settings, such as its learning rate, and the options of the axes, such as their layers. For
    rows that differ in none of these, or in their data too, they are also the keys of the task and the model that were
    typed.
    """
    alike: dict[tuple[str, ...], list[Row]] = {}
    grouped = any(len(row.records) > 1 for row in rows)  # then seeds alone distinguish no rows
    for row in rows:
        looks = (row.first.method, _format_axes(row), _format_bottlenecks(row), "" if grouped else _format_seeds(row))
        alike.setdefault(looks, []).append(row)
    settings: dict[str, Callable[[Record], Any]] = {}
    for group in alike.values():
        runs = [row.first for row in group]
        keys = _list_differing(_read_recorded, runs)
        settings |= {key: partial(_get_setting, _read_recorded, key) for key in keys}
        # Rows that were trained or chosen on other data differ in more than their rates.
        if len(set(map(identify_data, runs))) > 1 or (not keys and len({identify_point(run) for run in runs}) > 1):
            settings |= {key: partial(_get_setting, _read_typed, key) for key in _list_differing(_read_typed, runs)}
    return [
        Column(key, _name_setting(key), partial(_format_texts, settings[key]), dispensable=1, wrap=16)
        for key in sorted(settings)
    ]


def _list_differing(of: Callable[[Record], dict[str, Any]], runs: Sequence[Record]) -> list[str]:
    return [key for key in find_differing(list(map(of, runs))) if key not in (*IGNORED, *PATHS)]


def _read_recorded(run: Record) -> dict[str, Any]:
    """Return the settings of a run's trainer, and the options of its axes."""
    options = {f"{axes.prefix}{key}": value for axes in run.axes for key, value in axes.options.items()}
    return {**{f"trainer.{key}": value for key, value in run.trainer.items()}, **options}


def _read_typed(run: Record) -> dict[str, Any]:
    """Return the keys of a run's task and model that were typed."""
    return {key: value for key, value in index_by_key(run.overrides).items() if key.startswith(("task.", "model."))}


def _get_setting(of: Callable[[Record], dict[str, Any]], key: str, run: Record) -> Any:
    value = of(run).get(key)
    return ", ".join(map(format_value, value)) if isinstance(value, list) else value


def _name_setting(key: str) -> str:
    """Return the key's last part; for a modification in a mixture, with the modification's name."""
    *groups, last = key.split(".")
    name = [groups[1]] if groups[0] == "mix" else []
    return "\n".join([*name, last.replace("_", "\n")])


def make_delta_columns(rows: Sequence[Row]) -> list[Column[Row]]:
    """Return a column with the difference from the best full fine-tuning on a row's data, if the table has one."""
    best: dict[tuple[Any, Any], float] = {}
    for row in rows:
        if row.first.is_full and row.scored and row.score is not None:
            data = identify_data(row.first)
            best[data] = max(row.score, best.get(data, row.score))
    if not best or len(rows) < 2:
        return []

    def value(row: Row) -> float | None:
        reference = best.get(identify_data(row.first))
        return row.score - reference if row.scored and row.score is not None and reference is not None else None

    return [Column("delta", "Δ full", lambda row: _format_signed(value(row)), value, dispensable=3)]


def make_paper_columns(rows: Sequence[Row], everywhere: bool = False) -> list[Column[Row]]:
    """Return columns of the paper's scores and our difference from them; none if no row is one of the paper's.

    They are shown for runs that had the paper's backbone and data. With `everywhere`, they are also shown for other
    runs of the paper's rows, with a column that says what the paper printed them for, and without a difference.
    """
    known: dict[int, Printed] = {}
    for row in rows:
        found = next(filter(None, map(find_printed, row.records)), None)
        if found is not None and (found.same or everywhere):
            known[id(row)] = found
    if not known:
        return []

    def score(row: Row) -> float | None:
        return known[id(row)].score if id(row) in known else None

    def text_of(row: Row) -> str:
        return _format_two(known[id(row)].score) if id(row) in known else ""

    def difference(row: Row) -> float | None:
        found = known.get(id(row))
        return row.score - found.score if found and found.same and row.scored and row.score is not None else None

    def source(row: Row) -> str:
        return f"{known[id(row)].table}, {known[id(row)].backbone}" if id(row) in known else ""

    columns: list[Column[Row]] = [
        Column("paper", "paper", text_of, score, dispensable=0 if everywhere else 1),
        Column("paper_of", "printed for", source, words=True, wrap=10),
        Column("difference", "Δ paper", lambda row: _format_signed(difference(row)), difference, dispensable=1),
    ]
    return columns if everywhere else [columns[0], columns[2]]


def make_measured_columns(rows: Sequence[Row], interval: bool = False) -> list[Column[Row]]:
    """Return columns of what was measured where it was asked for: how much general ability a training costs, and the
    speed of the finished run in percent of the bare backbone's.

    Losses on different texts are not comparable, and are no column then.
    """
    found: list[Column[Row]] = []
    records = [record for row in rows for record in row.records]
    if len({one.retention.stamp for one in records if one.retention is not None and one.retention.after}) == 1:
        found.append(
            make_number(
                "forgetting",
                "general\nΔ loss",
                "{:+.3f}".format,
                better="lower",
                dispensable=1,
                spread=True,
                intervals=_estimate(FIELDS["forgetting"], rows, False) if interval else None,
            )
        )
    if any(record.speed is not None for record in records):
        found.append(make_number("speed", "speed, %\nof bare", "{:.0f}".format, better="higher", dispensable=1))
    return found


def make_front_columns(rows: Sequence[Row], cost: Cost) -> list[Column[Row]]:
    """Return a column that marks the rows that no other row beats in both score and cost; none if there is no
    choice."""
    best = {id(row) for row in find_front(rows, FIELDS[cost])}
    if sum(1 for row in rows if row.scored) < 3 or not best:
        return []
    marks = ((FRONT_MARK, f"on the Pareto front of score against {COST_NAMES[cost]}"),)
    return [Column("front", "front", lambda row: FRONT_MARK if id(row) in best else "", dispensable=4, marks=marks)]


def find_best_rows(column: Column[T], rows: Sequence[T]) -> set[int]:
    """Return the indices of the rows with the column's best value; none if all are equal."""
    if column.better is None or column.value is None:
        return set()
    values = {index: column.value(row) for index, row in enumerate(rows) if not is_unscored(row)}
    known = {index: value for index, value in values.items() if value is not None and not math.isnan(value)}
    if len(set(known.values())) < 2:
        return set()
    goal = (max if column.better == "higher" else min)(known.values())
    return {index for index, value in known.items() if value == goal}


def flatten_header(column: Column[T]) -> str:
    """Return a column's header on one line."""
    return column.header.replace("-\n", "").replace("\n", " ")


def format_duration(seconds: float) -> str:
    """Format as hours, minutes and seconds, such as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _format_bottlenecks(row: Row) -> str:
    """Return the bottleneck of each modification."""
    return "\n".join(_format_count(one.bottleneck) for one in row.first.axes)


def _format_axes(row: Row) -> str:
    """Return the four axes of each modification, then what else is trained."""
    lines = [one.in_line for one in row.first.axes]
    unfreeze = row.first.unfreeze
    if unfreeze != "none":
        lines.append(UNFROZEN.get(unfreeze, unfreeze))
    return "\n".join(lines)


def _format_seeds(row: Row) -> str:
    seeds = [str(record.seed) for record in row.records]
    return ", ".join(seeds) if len(seeds) < 6 else f"{len(seeds)} seeds"


def _format_texts(of: Callable[[Record], Any], row: Row) -> str:
    return ", ".join(dict.fromkeys(format_value(of(record)) for record in row.records))


def _format_status(outcome: Callable[[Record], str], row: Row) -> str:
    counted = Counter(map(outcome, row.records))
    if len(counted) > 1:  # the errors are in the table of single runs
        counted = Counter(record.status for record in row.records)
    if len(counted) == 1:
        return next(iter(counted))
    return ", ".join(f"{number} {status}" for status, number in counted.items())


def _format_count(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"


def _format_shortest(number: float) -> str:
    return f"{number:,.0f}" if number % 1 == 0 else _format_two(number) if number >= 0.1 else f"{number:g}"


def _format_two(number: float) -> str:
    return f"{number:.2f}"


def _format_signed(number: float | None) -> str:
    return "" if number is None else f"{number:+.2f}"
