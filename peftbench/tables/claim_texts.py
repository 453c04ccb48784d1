"""The findings of `peftbench claims` in sentences: what would change a verdict, and what is to be known of the runs."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime

from peftbench.records.record import Record, Searched
from peftbench.tables.claims import CellFindings, Comparison, Estimate, Finding, count_seeds_needed, get_score
from peftbench.tables.fields import MANY_CUT_OFF
from peftbench.tables.flatness import find_steepest
from peftbench.tables.intervals import FEW_SEEDS, LEAST_SEEDS, describe_ways
from peftbench.tables.row import Row, is_scored, is_trial


def describe_cell(cell: CellFindings) -> str:
    """Return what the runs of a cell have in common: task, backbone, examples, steps, rates and seeds."""
    first = cell.first
    report = first.scores["report"]
    rates = "learning rates not searched"
    if first.search:
        rates = f"each with the best learning rate of search={first.search.name}{_describe_chosen_on(first.search)}"
    seeds = sorted({record.seed for row in cell.rows for record in row.scored})
    return (
        f"{first.task} with {first.model.name}: {first.metric} on {report.examples:,} {report.split} examples, "
        f"{first.steps:,} steps, {rates}, seeds {', '.join(map(str, seeds))}"
    )


def _describe_chosen_on(search: Searched) -> str:
    looked = search.selection
    return f" on {looked.examples:,} {looked.split} examples" if looked else ""


def describe_change(finding: Finding) -> str:
    """Return what would change a verdict."""
    claim, one = finding.claim, finding.estimate
    if one is None:
        names = ", ".join(dict.fromkeys(name for pair in claim.pairs for name in pair))
        bounds = [f"from {claim.least:g}%"] * (claim.least > 0) + [f"up to {claim.most:g}%"] * (claim.most < math.inf)
        sizes = " ".join(["two sizes" if claim.smaller else "a size", *bounds])
        return f"{LEAST_SEEDS} seeds or more of {names}, at {sizes}."
    said = [_describe_pairs(finding)]
    if finding.verdict != "not confirmed":
        near = min((one.low, one.high), key=lambda end: abs(end - claim.threshold))
        said.append(f"The interval ends {abs(near - claim.threshold):.2f} from {claim.threshold:g}.")
    elif claim.of == "mean" and claim.judge(one) != "not confirmed":
        said.append(f"The mean alone would have it {claim.judge(one)}.")
    elif not claim.is_met(one.difference) and any(pair.is_b_larger for pair, _ in finding.comparisons):
        said.append("Rows of the same size would show whether it is contradicted.")
    elif (seeds := count_seeds_needed(one, claim.threshold)) is None:
        said.append("More seeds would not do: the difference is too small for these examples and this spread.")
    else:
        side = "the claim" if claim.is_met(one.difference) else "the opposite"
        said.append(f"About {seeds} seeds would show {side}, if difference and spread stay.")
    return " ".join(filter(None, said))


def _describe_pairs(finding: Finding) -> str:
    """Return what must be known of the pairs: the closest, those that contradict the claim, and unequal sizes."""
    claim, said = finding.claim, []
    if claim.of == "least":
        said.append(f"Closest: {finding.comparisons[0][0].pair[1]}.")
    against = dict.fromkeys(
        " against ".join(one.pair)
        for one, estimate in finding.comparisons
        if claim.judge_pair(one, estimate) == "contradicted"
    )
    if against and finding.verdict != "contradicted":
        said.append(f"{', '.join(against)} {'contradicts' if len(against) == 1 else 'contradict'} it.")
    if not claim.smaller:
        said += _describe_sizes([one for one, _ in finding.comparisons])
    return " ".join([*said, *_describe_losers(finding)])


def _describe_sizes(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yield which rows store clearly more than those that they are compared with."""
    for place, larger, effect in (
        (1, [one for one in comparisons if one.is_b_larger], "can only hide the claim"),
        (0, [one for one in comparisons if one.is_a_larger], "cannot confirm the claim"),
    ):
        names = list(dict.fromkeys(one.pair[place] for one in larger))
        others = ", ".join(dict.fromkeys(one.pair[1 - place] for one in larger))
        if names:
            store = "stores" if len(names) == 1 else "store"
            yield f"Here {', '.join(names)} {store} more than {others}, which {effect}."


def _describe_losers(finding: Finding) -> Iterator[str]:
    """Yield which rows a verdict cannot rest on, because they may be better than their runs."""
    claim, mean = finding.claim, finding.estimate
    assert mean is not None
    judged = [(one, claim.judge(estimate if claim.of == "least" else mean)) for one, estimate in finding.comparisons]
    losers = [claim.find_loser(one, verdict) for one, verdict in judged if verdict != "not confirmed"]
    names = list(dict.fromkeys(name for name, row in losers if row.is_at_edge))
    if names:
        ones = "it may be better" if len(names) == 1 else "they may be better"
        yield f"The best rate of {' and '.join(names)} is the outermost that was tried, so {ones}."


def describe_chance(cell: CellFindings) -> str:
    """Return what was drawn for the intervals, and what is to be known of the runs behind them."""
    said = [f"Intervals: {describe_ways(list_estimates(cell))}."]
    return " ".join([*said, *_describe_spread(cell.rows), *_describe_edges(cell.rows), *_describe_runs(cell.rows)])


def list_estimates(cell: CellFindings) -> list[Estimate]:
    """Return the estimates of a cell's claims and of the pairs behind them."""
    return [
        estimate
        for finding in cell.findings
        for estimate in (finding.estimate, *(of_pair for _, of_pair in finding.comparisons))
        if estimate is not None
    ]


def _describe_spread(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how much the scores of a row's seeds differ: one seed of a row may have learned nothing."""
    spreads = sorted(
        (statistics.stdev(get_score(record) for record in row.scored), row.first.method)
        for row in rows
        if len(row.scored) > 1
    )
    if spreads:
        median, (most, method) = statistics.median(spread for spread, _ in spreads), spreads[-1]
        yield f"Standard deviation over seeds: {median:.2f} (median of rows), {most:.2f} at most ({method})."


def _describe_edges(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how many searches chose an outermost value: these rows may be better than the runs say."""
    searched = [row.first.search for row in rows if row.first.search is not None]
    if searched:
        number = sum(row.is_at_edge for row in rows)
        yield f"Outermost of the values that were tried: the best one of {number} of {len(searched)} rows."


def _describe_runs(rows: Sequence[Row]) -> Iterator[str]:
    """Yield which runs diverged or were cut off, and how flat the curves are."""
    runs = [record for row in rows for record in row.records]
    if diverged := sum(record.status == "diverged" for record in runs):
        yield f"Diverged, and in no mean: {diverged} of {len(runs)} runs."
    if cut_off := sum(record.cut_off.get("report", 0.0) > MANY_CUT_OFF for record in runs):
        yield f"With more than {MANY_CUT_OFF:.0%} of the texts cut off: {cut_off} of {len(runs)} runs."
    if steepest := find_steepest([record for record in runs if record.score is not None]):
        median, most, method = steepest
        gained = f"gained {median:.2f} on the selection split (median of runs), {most:.2f} at most ({method})"
        yield f"Curves: the last third of the steps {gained}."


def describe_few(cells: Sequence[CellFindings]) -> list[str]:
    """Return a sentence where there are few seeds."""
    seeds = [finding.estimate.seeds for cell in cells for finding in cell.findings if finding.estimate is not None]
    return [f"{min(seeds)} seeds say little about other seeds."] if seeds and min(seeds) < FEW_SEEDS else []


def describe_untested(cells: Sequence[CellFindings]) -> list[str]:
    """Return a sentence on the runs that test nothing."""
    if not cells:
        return []
    runs = sum(len(row.scored) for cell in cells for row in cell.rows)
    names = dict.fromkeys(f"{cell.first.task} with {cell.first.model.name}" for cell in cells)
    return [f"{runs} further runs test no claim, for want of seeds or pairs: {', '.join(names)}."]


def describe_cost(records: Sequence[Record]) -> str:
    """Return the number of runs and trials, and the hours in which at least one of them ran, by device."""
    trials = sum(map(is_trial, records))
    done = sum(map(is_scored, records)) - sum(is_trial(record) for record in records if is_scored(record))
    devices = dict.fromkeys(record.device for record in records if record.device)
    hours = [f"{_count_hours([r for r in records if r.device == device]):.1f} h of {device}" for device in devices]
    said = f"{done} runs and {trials} trials of searches, {' and '.join(hours) or 'no time recorded'}"
    alike = any(_get_gpu(one) is None for one in records if one.device and not one.device.startswith("cpu"))
    return f"{said}; GPUs of one kind count as one where a record does not say which." if alike else f"{said}."


def _get_gpu(record: Record) -> str | None:
    return record.attempts[-1].gpu if record.attempts else None


def _list_spans(record: Record) -> list[tuple[float, float, str | None]]:
    """Return when the attempts at a run began and ended, in seconds, with their GPU: of a trial that was chosen, its
    training and then its score. An earlier attempt may not say when it ended."""
    if not record.finished:
        return []
    spans = [(one.started, one.ended, one.gpu) for one in record.attempts[:-1] if one.ended is not None]
    spans.append((record.created, record.finished, _get_gpu(record)))
    return [
        (datetime.fromisoformat(began).timestamp(), datetime.fromisoformat(ended).timestamp(), gpu)
        for began, ended, gpu in spans
        if ended is not None
    ]


def _count_hours(records: Sequence[Record]) -> float:
    """Return the hours in which at least one run was trained, summed over GPUs. Runs that shared one count once."""
    total, until = 0.0, defaultdict[str | None, float](float)
    for began, ended, gpu in sorted((span for one in records for span in _list_spans(one)), key=lambda span: span[0]):
        total += max(0.0, ended - max(began, until[gpu]))
        until[gpu] = max(until[gpu], ended)
    return total / 3600
