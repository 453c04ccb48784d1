"""`peftbench claims`: which of the paper's claims the recorded runs confirm, and what would change the verdicts."""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.cli.searched import show_study, to_json, write_study
from peftbench.records.choice import list_edges
from peftbench.records.record import Record
from peftbench.tables.advice import find_reference
from peftbench.tables.claims import (
    LEAST_SEEDS,
    CellFindings,
    Comparison,
    Estimate,
    Finding,
    count_seeds_needed,
    get_score,
    judge_records,
)
from peftbench.tables.fields import FIELDS, MANY_CUT_OFF
from peftbench.tables.flatness import find_steepest
from peftbench.tables.row import Row, is_scored, is_trial
from peftbench.tables.searches import find_studies
from peftbench.tables.select import is_filter, load_folders, select_records
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError
from peftbench.utils.files import dump_json
from peftbench.utils.text import strip_controls

EPILOG = """\
The claims and the comparisons that test them are in conf/claims.yaml. Runs are compared within one task and backbone,
trained for as long and with the same search of the learning rate, over the seeds that both have. A verdict is one of
four: confirmed (the whole interval is on the claimed side), contradicted (all of it is on the other side), not
confirmed (neither), not tested. A confirmed mean is not confirmed if one of its pairs is contradicted, and a pair whose
second row stores clearly more than the first contradicts nothing.

examples:
  peftbench claims outputs/reference
  peftbench claims outputs/reference/reproduction search=lr5 task=sst2 --each
  peftbench claims outputs/reference --searches
"""
HEADERS = ("claim", "claimed", "difference", "95% interval", "pairs", "runs", "verdict")
CHANGE = "what would change it"
FEW = 5  # below so many seeds, they are said to be few


def main(argv: list[str]) -> int:
    """Print the claims and return 0. Raises UserError where there are no runs."""
    arguments = _build_parser().parse_intermixed_args(argv)
    if arguments.resamples < 100:
        raise UserError(f"--resamples {arguments.resamples}: it must be a whole number of at least 100.")
    records = _read_records(arguments.words)
    if arguments.searches:
        return _show_searches(records, arguments.resamples, arguments.form)
    cells = judge_records(records, arguments.resamples)
    if arguments.form == "json":
        say(dump_json([_to_json(cell) for cell in cells], indent=2, ensure_ascii=True))
        return 0
    tested = [cell for cell in cells if any(finding.comparisons for finding in cell.findings)]
    console = make_console()
    for cell in tested:
        if arguments.form == "markdown":
            say(_to_markdown(cell, arguments.each))
        else:
            _show(cell, arguments.each, console)
    untested = [cell for cell in cells if cell not in tested]
    for line in (*_describe_few(tested), *_describe_untested(untested), _describe_cost(records)):
        say(line) if arguments.form == "markdown" else console.print(line, highlight=False)
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftbench claims",
        description="Say which of the paper's claims the recorded runs confirm or contradict: differences with their "
        "95%% intervals over seeds and examples, verdicts, and what would change them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="FOLDER | KEY=VALUE,...", help="where (default: outputs) and which")
    parser.add_argument("--each", action="store_true", help="also each pair of rows that a verdict rests on")
    parser.add_argument("--searches", action="store_true", help="what searches over the axes found, beside the methods")
    parser.add_argument("--resamples", type=int, default=2000, help="draws of the bootstrap; default: %(default)s")
    for form in ("json", "markdown"):
        parser.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"print {form}")
    return parser


def _show_searches(records: Sequence[Record], resamples: int, form: str | None) -> int:
    """Print what the studies among the records have found, and return 0. Raises UserError where there is none."""
    studies = find_studies(records, resamples)
    if not studies:
        raise UserError(
            f"None of {len(records)} records is a trial of a search over the axes; scripts/reproduction.sh makes some, "
            "search_0.5% and search_2%, or train with search=optuna budget=2% search.seed=42 seed=1,2,3."
        )
    if form == "json":
        say(dump_json([to_json(one) for one in studies], indent=2, ensure_ascii=True))
        return 0
    console = make_console()
    for one in studies:
        say(write_study(one)) if form == "markdown" else show_study(one, console)
    names = {one.name for one in studies}
    cost = _describe_cost([one for one in records if one.search is not None and one.search.study in names])
    say(cost) if form == "markdown" else console.print(cost, highlight=False)
    return 0


def _read_records(words: Sequence[str]) -> list[Record]:
    """Return the records of the folders among the words that pass the filters among them, with trials of searches."""
    folders = [Path(word) for word in words if not is_filter(word)]
    if not folders:
        folders = [place for place in (Path("outputs"), find_reference()) if place is not None and place.is_dir()]
    found = load_folders(folders)
    if not found:
        raise UserError("No record, no claim: scripts/reproduction.sh makes the runs, or train some with row=NAME.")
    return select_records(found, [word for word in words if is_filter(word)])


def _show(cell: CellFindings, each: bool, console: Console) -> None:
    console.print(_describe_cell(cell), highlight=False)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("claim", min_width=22)
    for header in ("difference", "95% interval", "runs"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for finding in cell.findings:
        says, claimed, difference, interval, _, runs, verdict = _list_cells(finding)
        cells = (f"{says}, {claimed}", difference, interval, runs, verdict)
        table.add_row(*cells, style="dim" if finding.estimate is None else None)
    console.print(table)
    console.print()
    if each:
        _show_pairs(cell, console)
    console.print(f"{CHANGE[0].upper()}{CHANGE[1:]}:")
    for finding in cell.findings:
        console.print(f"- {finding.claim.says}: {_describe_change(finding)}", highlight=False)
    console.print(_describe_chance(cell), style="dim", highlight=False)
    console.print()


def _show_pairs(cell: CellFindings, console: Console) -> None:
    """Print the pairs of rows that each verdict rests on: A above B."""
    for finding in cell.findings:
        if not finding.comparisons:
            continue
        table = Table(
            title=finding.claim.says, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
        )
        for header in ("A, B", "% stored", "seeds", "A - B", "95% interval", "verdict"):
            table.add_column(header, justify="left" if header in ("A, B", "verdict") else "right", no_wrap=True)
        for comparison, estimate in finding.comparisons:
            a, b, sizes, *others = _list_pair(finding, comparison, estimate)
            table.add_row(f"{a}\n{b}", sizes.replace(", ", "\n"), *others)
        console.print(table)
        console.print()


def _to_markdown(cell: CellFindings, each: bool) -> str:
    """Return the tables of a cell in GitHub's Markdown."""
    rows = [(*_list_cells(finding), _describe_change(finding)) for finding in cell.findings]
    lines = [f"### {strip_controls(_describe_cell(cell))}", "", _make_line((*HEADERS, CHANGE))]
    lines += [_make_line(("---", "---:", "---:", "---", "---:", "---:", "---", "---")), *map(_make_line, rows), ""]
    if each:
        lines += [_make_line(("claim", *_EACH)), _make_line(("---",) * (1 + len(_EACH)))]
        for finding in cell.findings:
            lines += [_make_line((finding.claim.name, *_list_pair(finding, *one))) for one in finding.comparisons]
        lines.append("")
    return "\n".join([*lines, _describe_chance(cell), ""])


def _make_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(strip_controls(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _describe_cell(cell: CellFindings) -> str:
    first = cell.first
    report = first.scores["report"]
    rates = (
        f"each with the best learning rate of search={first.search.name}"
        if first.search
        else "learning rates not searched"
    )
    seeds = sorted({record.seed for row in cell.rows for record in row.scored})
    return (
        f"{first.task} with {first.model.name}: {first.metric} on {report.examples:,} {report.split} examples, "
        f"{first.steps:,} steps, {rates}, seeds {', '.join(map(str, seeds))}"
    )


def _list_cells(finding: Finding) -> tuple[str, ...]:
    one, claim = finding.estimate, finding.claim
    if one is None:
        return claim.says, claim.claimed, "", "", "", "", finding.verdict
    counts = (str(len(finding.comparisons)), str(finding.runs))
    return claim.says, claim.claimed, f"{one.difference:+.2f}", _format_interval(one), *counts, finding.verdict


_EACH = ("A", "B", "% stored", "seeds", "A - B", "95% interval", "verdict")


def _list_pair(finding: Finding, one: Comparison, estimate: Estimate) -> tuple[str, ...]:
    sizes = [row.number(FIELDS["percent"]) for row in (one.a, one.b)]
    return (
        *one.pair,
        ", ".join("" if size is None else f"{size:.2f}" for size in sizes),
        str(len(one.seeds)),
        f"{estimate.difference:+.2f}",
        _format_interval(estimate),
        finding.claim.judge(estimate, [one]),
    )


def _format_interval(one: Estimate) -> str:
    return f"{one.low:+.2f} to {one.high:+.2f}"


def _describe_change(finding: Finding) -> str:
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
    elif claim.of == "mean" and claim.judge(one, []) != "not confirmed":
        said.append(f"The mean alone would have it {claim.judge(one, [])}.")
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
        if claim.judge(estimate, [one]) == "contradicted"
    )
    if against and finding.verdict != "contradicted":
        said.append(f"{', '.join(against)} {'contradicts' if len(against) == 1 else 'contradict'} it.")
    larger = [one for one, _ in finding.comparisons if one.is_b_larger and not claim.smaller]
    if larger:
        names = ", ".join(dict.fromkeys(one.pair[1] for one in larger))
        said.append(f"Here {names} {'stores' if len(larger) == 1 else 'store'} more, which can only hide the claim.")
    return " ".join(said)


def _describe_chance(cell: CellFindings) -> str:
    """Return what was drawn for the intervals, and what is to be known of the runs behind them."""
    known = [finding.estimate for finding in cell.findings if finding.estimate is not None]
    seeds = min(estimate.seeds for estimate in known)
    ways = {
        True: f"a bootstrap over {seeds} seeds and the examples",
        False: f"Student's t over {seeds} seeds, for these examples only",
    }
    over = sorted({estimate.by_examples is not None for estimate in known}, reverse=True)
    said = [f"Intervals: {'; '.join(ways[way] for way in over)}."]
    return " ".join([*said, *_describe_spread(cell.rows), *_describe_edges(cell.rows), *_describe_runs(cell.rows)])


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
        number = sum(bool(list_edges(search)) for search in searched)
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


def _describe_few(cells: Sequence[CellFindings]) -> list[str]:
    """Return a sentence where there are few seeds."""
    seeds = [finding.estimate.seeds for cell in cells for finding in cell.findings if finding.estimate is not None]
    return [f"{min(seeds)} seeds say little about other seeds."] if seeds and min(seeds) < FEW else []


def _describe_untested(cells: Sequence[CellFindings]) -> list[str]:
    """Return a sentence on the runs that test nothing."""
    if not cells:
        return []
    runs = sum(len(row.scored) for cell in cells for row in cell.rows)
    names = dict.fromkeys(f"{cell.first.task} with {cell.first.model.name}" for cell in cells)
    return [f"{runs} further runs test no claim, for want of seeds or pairs: {', '.join(names)}."]


def _describe_cost(records: Sequence[Record]) -> str:
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


def _count_hours(records: Sequence[Record]) -> float:
    """Return the hours in which at least one run was trained, summed over GPUs. Runs that shared one count once."""
    total, until = 0.0, defaultdict[str | None, float](float)
    for one in sorted((one for one in records if one.finished), key=lambda one: one.created):
        assert one.finished is not None
        gpu = _get_gpu(one)
        began, ended = (datetime.fromisoformat(time).timestamp() for time in (one.created, one.finished))
        total += max(0.0, ended - max(began, until[gpu]))
        until[gpu] = max(until[gpu], ended)
    return total / 3600


def _to_json(cell: CellFindings) -> dict[str, Any]:
    return {
        "cell": _describe_cell(cell),
        "claims": [
            {
                "name": finding.claim.name,
                "says": finding.claim.says,
                "verdict": finding.verdict,
                "runs": finding.runs,
                "estimate": None if finding.estimate is None else asdict(finding.estimate),
                "change": _describe_change(finding),
                "pairs": [
                    {
                        "a": {"point": one.pair[0], "runs": [run.run for run in one.runs[0]]},
                        "b": {"point": one.pair[1], "runs": [run.run for run in one.runs[1]]},
                        **asdict(estimate),
                    }
                    for one, estimate in finding.comparisons
                ],
            }
            for finding in cell.findings
        ],
    }
