"""`peftbench claims`: which of the paper's claims the recorded runs confirm, and what would change the verdicts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.cli.searched import show_study, to_json, write_study
from peftbench.records.record import Record
from peftbench.tables.advice import find_reference
from peftbench.tables.claim_texts import (
    describe_cell,
    describe_chance,
    describe_change,
    describe_cost,
    describe_few,
    describe_untested,
    list_estimates,
)
from peftbench.tables.claims import CellFindings, Comparison, Estimate, Finding, judge_records
from peftbench.tables.fields import FIELDS
from peftbench.tables.intervals import describe_ways_of
from peftbench.tables.row import identify_data
from peftbench.tables.searches import find_studies
from peftbench.tables.select import is_filter, load_folders, select_records
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError
from peftbench.utils.files import dump_json
from peftbench.utils.text import format_count, strip_controls

EPILOG = """\
The claims and the comparisons that test them are in conf/claims.yaml. Runs are compared within one task and backbone,
trained for as long and with the same search of the learning rate, over the seeds that both have. A verdict is one of
four: confirmed (the whole interval is on the claimed side), contradicted (all of it is on the other side), not
confirmed (neither), not tested. A confirmed mean is not confirmed if one of its pairs is contradicted, and a pair whose
second row stores clearly more than the first contradicts nothing.

examples:
  peftbench claims outputs/reference
  peftbench claims outputs/reference --short
  peftbench claims outputs/reference/reproduction search=lr5 task=sst2 --each
  peftbench claims outputs/reference --searches
"""
HEADERS = ("claim", "claimed", "difference", "95% interval", "pairs", "runs", "verdict")
CHANGE = "what would change it"
DECIDED = re.compile(r"^(confirmed|contradicted)")  # what stands out in a table of all verdicts


def main(argv: list[str]) -> int:
    """Print the claims and return 0. Raises UserError where there are no runs."""
    arguments = _build_parser().parse_intermixed_args(argv)
    if arguments.resamples < 100:
        raise UserError(f"--resamples {arguments.resamples}: it must be a whole number of at least 100.")
    if arguments.short and (arguments.each or arguments.searches or arguments.form == "json"):
        raise UserError("--short is one table of all verdicts; leave --each, --searches and --json out.")
    records = _read_records(arguments.words)
    if arguments.searches:
        return _show_searches(records, arguments.resamples, arguments.form)
    cells = judge_records(records, arguments.resamples)
    if arguments.form == "json":
        say(dump_json([_to_json(cell) for cell in cells], indent=2, ensure_ascii=True))
        return 0
    tested = [cell for cell in cells if any(finding.comparisons for finding in cell.findings)]
    console = make_console()
    if arguments.short and tested:
        _show_short(tested, arguments.form, console)
    for cell in [] if arguments.short else tested:
        if arguments.form == "markdown":
            say(_to_markdown(cell, arguments.each))
        else:
            _show(cell, arguments.each, console)
    untested = [cell for cell in cells if cell not in tested]
    for line in (*describe_few(tested), *describe_untested(untested), describe_cost(records)):
        say(line) if arguments.form == "markdown" else console.print(line, highlight=False)
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftbench claims",
        description="Say which of the paper's claims the recorded runs confirm or contradict: differences with their\n"
        "95% intervals over seeds and examples, verdicts, and what would change them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="FOLDER | KEY=VALUE,...", help="where (default: outputs) and which")
    parser.add_argument("--each", action="store_true", help="also each pair of rows that a verdict rests on")
    parser.add_argument("--short", action="store_true", help="one table of all verdicts, a column for each cell")
    parser.add_argument("--searches", action="store_true", help="what searches over the axes found, beside the methods")
    parser.add_argument("--resamples", type=int, default=2000, help="draws of the bootstrap; default: %(default)s")
    for form, what in (("json", "JSON"), ("markdown", "tables for GitHub")):
        parser.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"print {what}")
    return parser


def _show_searches(records: Sequence[Record], resamples: int, form: str | None) -> int:
    """Print what the studies among the records have found, and return 0. Raises UserError where there is none."""
    studies = find_studies(records, resamples)
    if not studies:
        raise UserError(
            f"None of {format_count(len(records), 'record')} is a trial of a search over the axes; "
            "scripts/reproduction.sh makes some, search_0.5% and search_2%, or train with search=optuna budget=2% "
            "search.seed=42 seed=1,2,3."
        )
    if form == "json":
        say(dump_json([to_json(one) for one in studies], indent=2, ensure_ascii=True))
        return 0
    console = make_console()
    for one in studies:
        say(write_study(one)) if form == "markdown" else show_study(one, console)
    names = {one.name for one in studies}
    cost = describe_cost([one for one in records if one.study in names])
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
    console.print(describe_cell(cell), highlight=False)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("claim", min_width=22)
    for header in ("difference", "95% interval", "runs"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for finding in cell.findings:
        _, _, difference, interval, _, runs, verdict = _list_cells(finding)
        cells = (_name_claim(finding), difference, interval, runs, verdict)
        table.add_row(*cells, style="dim" if finding.estimate is None else None)
    console.print(table)
    console.print()
    if each:
        _show_pairs(cell, console)
    console.print(f"{CHANGE[0].upper()}{CHANGE[1:]}:")
    for finding in cell.findings:
        console.print(f"- {finding.claim.says}: {describe_change(finding)}", highlight=False)
    console.print(describe_chance(cell), style="dim", highlight=False)
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


def _show_short(cells: Sequence[CellFindings], form: str | None, console: Console) -> None:
    """Print one table: a line for each claim, a column for each cell; on a terminal, as many columns as fit at once."""
    names = _name_cells(cells)
    if form == "markdown":
        lines = [("claim", *names), ("---",) * (1 + len(cells))]
        for of_cells in zip(*(cell.findings for cell in cells), strict=True):
            verdicts = [": ".join(_write_verdict(one)) for one in of_cells]
            lines.append((_name_claim(of_cells[0]), *(DECIDED.sub(r"**\1**", verdict) for verdict in verdicts)))
        say("\n".join([*map(_make_line, lines), "", _explain_intervals(cells, names), ""]))
        return
    fitting = max(1, (console.width - _SHORT) // (_SHORT + 2))
    for start in range(0, len(cells), fitting):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for header in ("claim", *names[start : start + fitting]):
            table.add_column(strip_controls(header), width=_SHORT)
        for of_cells in zip(*(cell.findings for cell in cells[start : start + fitting]), strict=True):
            verdicts = ["\n".join(_write_verdict(one)) for one in of_cells]
            table.add_row(_name_claim(of_cells[0]), *verdicts)
        console.print(table)
        console.print()
    console.print(_explain_intervals(cells, names), style="dim", highlight=False)
    console.print()


_SHORT = 24  # characters of a column of the short table


def _name_cells(cells: Sequence[CellFindings]) -> list[str]:
    """Return the name of each cell: its task and backbone, and as much more as tells it from the others."""
    ways: list[Callable[[CellFindings], str]] = [
        lambda cell: f"{cell.first.task} with {cell.first.model.name}",
        lambda cell: f"{cell.first.task} with {cell.first.model.name}, {cell.first.steps:,} steps",
        lambda cell: f"{cell.first.task} with {cell.first.model.name}, chosen on {identify_data(cell.first)[1]}",
        describe_cell,
    ]
    named = [[way(cell) for cell in cells] for way in ways]
    return [next((one[i] for one in named if one.count(one[i]) == 1), named[-1][i]) for i in range(len(cells))]


def _explain_intervals(cells: Sequence[CellFindings], names: Sequence[str]) -> str:
    """Return what was drawn for the intervals: once, or for each cell where they differ in it."""
    told = describe_ways_of({name: list_estimates(cell) for cell, name in zip(cells, names, strict=True)})
    return f"Intervals: {strip_controls(told)}."


def _name_claim(finding: Finding) -> str:
    return f"{finding.claim.says}, {finding.claim.claimed}"


def _write_verdict(finding: Finding) -> list[str]:
    """Return a verdict, and the difference that it rests on."""
    one = finding.estimate
    return [finding.verdict, *([] if one is None else [f"{one.difference:+.2f} ({_format_interval(one)})"])]


def _to_markdown(cell: CellFindings, each: bool) -> str:
    """Return the tables of a cell in GitHub's Markdown."""
    rows = [(*_list_cells(finding), describe_change(finding)) for finding in cell.findings]
    lines = [f"### {strip_controls(describe_cell(cell))}", "", _make_line((*HEADERS, CHANGE))]
    lines += [_make_line(("---", "---:", "---:", "---", "---:", "---:", "---", "---")), *map(_make_line, rows), ""]
    if each:
        lines += [_make_line(("claim", *_EACH)), _make_line(("---",) * (1 + len(_EACH)))]
        for finding in cell.findings:
            lines += [_make_line((finding.claim.name, *_list_pair(finding, *one))) for one in finding.comparisons]
        lines.append("")
    return "\n".join([*lines, describe_chance(cell), ""])


def _make_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(strip_controls(cell).replace('|', chr(92) + '|') for cell in cells)} |"


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
        finding.claim.judge_pair(one, estimate),
    )


def _format_interval(one: Estimate) -> str:
    return f"{one.low:+.2f} to {one.high:+.2f}"


def _to_json(cell: CellFindings) -> dict[str, Any]:
    return {
        "cell": describe_cell(cell),
        "claims": [
            {
                "name": finding.claim.name,
                "says": finding.claim.says,
                "verdict": finding.verdict,
                "runs": finding.runs,
                "estimate": None if finding.estimate is None else asdict(finding.estimate),
                "change": describe_change(finding),
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
