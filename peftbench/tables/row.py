"""A row of a table: one run, or the runs that differ only in their seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from statistics import fmean, median, stdev
from typing import Any, Literal

from peftbench.records.choice import list_edges
from peftbench.records.record import Record, Score
from peftbench.tables.fields import get_baseline, get_test_file

Statistic = Literal["mean", "median"]
SHARED = 5  # parts of `identify_setting` that a run without a score has too


@dataclass(frozen=True)
class Row:
    """Runs of one point of the experiment, each with its own seed. Numbers are over the runs that have a score."""

    records: tuple[Record, ...]
    statistic: Statistic = "mean"

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def scored(self) -> list[Record]:
        return [record for record in self.records if is_scored(record)]

    @property
    def is_at_edge(self) -> bool:
        """Whether its search chose an outermost value: the row may be better than its runs say."""
        return self.first.search is not None and bool(list_edges(self.first.search))

    @property
    def score(self) -> float | None:
        return self.number(lambda record: record.score)

    def number(self, of: Callable[[Record], float | None]) -> float | None:
        """Return the mean, or the median, of a number over the runs that have it, or None if none has it."""
        values = self._values(of)
        return None if not values else fmean(values) if self.statistic == "mean" else float(median(values))

    def spread(self, of: Callable[[Record], float | None]) -> float | None:
        """Return the standard deviation (with n - 1) of a number over two runs or more."""
        values = self._values(of)
        return stdev(values) if len(values) > 1 else None

    def _values(self, of: Callable[[Record], float | None]) -> list[float]:
        # A single run shows every known number; a mean is over the runs with a score, if they have the number.
        alone = len(self.records) == 1
        values = [of(record) for record in (self.records if alone else self.scored)]
        return [float(value) for value in values if value is not None and (alone or math.isfinite(value))]


def make_rows(records: Iterable[Record]) -> list[Row]:
    """Return a row for each run."""
    return [Row((record,)) for record in records]


def group_seeds(records: Iterable[Record], statistic: Statistic) -> list[Row]:
    """Return a row for each group of runs that differ only in their seed."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault((identify_point(record), *identify_setting(record)[:SHARED]), []).append(record)
    return [Row(tuple(sorted(drop_retrained(runs), key=lambda run: run.seed)), statistic) for runs in found.values()]


def drop_retrained(records: Iterable[Record]) -> list[Record]:
    """Return each run once: if it was trained several times, in several folders, the one with a score that began last.

    A second run with the same seed adds nothing to a mean.
    """
    in_turn = sorted(records, key=lambda record: (is_scored(record), record.created))
    return list({record.run: record for record in in_turn}.values())


def identify_point(record: Record) -> str:
    """Return the identity that is shared by runs that differ only in their seed."""
    if record.point is not None:
        return record.point
        # A record that is older than `identify_point` has this part of it.
    seen = (record.method, record.unfreeze, record.debug, record.trainer, record.data.get("splits"))
    return json.dumps([seen, [asdict(axes) for axes in record.axes]], sort_keys=True)


def is_scored(record: Record) -> bool:
    return record.status == "done" and record.score is not None and math.isfinite(record.score)


def is_trial(record: Record) -> bool:
    """Return whether a search trained this run as a candidate and did not choose it."""
    return record.search is not None and record.search.role == "trial"


def identify_data(record: Record) -> tuple[Any, Any]:
    """Return on how many examples a run was trained, and the split that chose its state and its learning rate.

    Runs that differ in it can be scored on the same examples, but what sets them apart is not the method alone.
    """
    splits = record.data.get("splits", {})
    return splits.get("train", {}).get("examples"), splits.get("selection", {}).get("split")


def identify_setting(record: Record) -> tuple[str, ...]:
    """Return what the runs of a comparison must share: task, backbone, metric, debug preset, split, its size and its
    content.

    The content is that of the scored rows, because the name of a user's files does not identify them. It is "" if the
    record is older than this field.
    """
    report = record.scores.get("report")
    content = str(record.data.get("scored_on", ""))[:8]
    split = (report.split, _format_examples(report), content) if report and is_scored(record) else ("", "", "")
    model = record.model
    version = model.content or model.revision or ""
    return (record.task, model.hub_id or model.name, version, record.metric, record.debug or "", *split)


def _format_examples(report: Score) -> str:
    return f"{report.examples:,}" + (f" of {report.of:,}" if report.of else "")


def describe_left_out(rows: Iterable[Row]) -> str | None:
    """The sentence that names the runs that diverged, which a mean beside them has not in it; None without any.

    A mean over those seeds alone that went well says too much of a setting.
    """
    groups = (row.records for row in rows if len(row.records) > 1)
    found = [record for records in groups for record in records if record.status == "diverged"]
    if not found:
        return None
    named = ", ".join(f"{record.run} ({record.method}, seed {record.seed})" for record in found)
    return f"{len(found)} diverged and {'is' if len(found) == 1 else 'are'} in no mean: {named}."


def is_unscored(row: object) -> bool:
    """Return whether a row of a table is of runs without a score; it is ranked last and never the best."""
    return isinstance(row, Row) and not row.scored


def split_tables(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows into tables of comparable runs; rows without a score are with their task, backbone and metric."""
    contents: dict[tuple[str, ...], set[str]] = {}
    for *known, content in (identify_setting(row.scored[0]) for row in rows if row.scored):
        contents.setdefault(tuple(known), set()).update([content] if content else [])

    def key(row: Row) -> tuple[str, ...]:
        *known, content = identify_setting(row.scored[0])
        others = contents[tuple(known)]
        return (*known, min(others) if len(others) == 1 else content)  # a record without it joins the others

    found = [list(group) for _, group in groupby(sorted((row for row in rows if row.scored), key=key), key=key)]
    for row in rows:
        if not row.scored:
            _find_home(found, row).append(row)
    return sorted(found, key=lambda table: table[0].first.debug is not None)  # what is no result comes last


def _find_home(found: list[list[Row]], row: Row) -> list[Row]:
    """Return the table in which a row without a score is listed: the first of its task, backbone, metric and data.

    The data are the scored rows, or for a run that was stopped before it had read them the files that were typed.
    """

    def is_home(table: Sequence[Row]) -> bool:
        one, other = table[0].first, row.first
        if identify_setting(one)[:SHARED] != identify_setting(other)[:SHARED]:
            return False
        contents = [str(record.data.get("scored_on", "")) for record in (one, other)]
        return contents[0] == contents[1] if all(contents) else get_test_file(one) == get_test_file(other)

    for table in found:
        if is_home(table):
            return table
    found.append([])
    return found[-1]


def get_rank(row: Row) -> tuple[float, str, int]:
    """Return the sort key of a table's rows: the highest score first, rows without one last."""
    score = row.score if row.scored else None
    return (math.inf if score is None else -score, row.first.method, row.first.seed)


def find_baselines(row: Row) -> dict[str, float]:
    """Return the main metric of each baseline, over the row's runs."""
    names = dict.fromkeys(name for record in row.scored for name in record.baselines)
    values = {name: row.number(partial(get_baseline, name)) for name in names}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def is_below_baseline(row: Row) -> bool:
    """Return whether a baseline, such as copying the source, has a higher score than the row."""
    return row.score is not None and any(value > row.score for value in find_baselines(row).values())


def find_front(rows: Sequence[Row], cost: Callable[[Record], float | None]) -> list[Row]:
    """Return the Pareto front: the rows that no other row beats in score or cost while it equals them in the other.

    A row below a baseline, which costs nothing, is never on it.
    """
    priced = [(row.number(cost), row.score, row) for row in rows if row.scored and not is_below_baseline(row)]
    known = [(price, score, row) for price, score, row in priced if price is not None and score is not None]
    found: list[tuple[float, float, Row]] = []
    for price, score, row in sorted(known, key=lambda one: (one[0], -one[1])):
        if not found or score > found[-1][1] or (price, score) == found[-1][:2]:
            found.append((price, score, row))
    return [row for _, _, row in found]
