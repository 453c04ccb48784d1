"""`peftbench compare A B`: whether the difference between two runs is more than chance, and which settings differ.

A and B are each a run, or the seeds of one setting. Their saved predictions are compared example by example.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.metrics.bootstrap import Difference
from peftbench.records.record import FILE, Record, load_records
from peftbench.records.wording import format_value
from peftbench.tables.comparison import compare_rows, find_differing_settings, read_settings
from peftbench.tables.fields import FIELDS
from peftbench.tables.intervals import FEW_SEEDS
from peftbench.tables.row import Row, describe_left_out, group_seeds, is_trial, is_unscored
from peftbench.tables.select import TRIALS, is_filter, select_records
from peftbench.utils.console import make_console, say
from peftbench.utils.differences import find_differing
from peftbench.utils.errors import UserError, warn
from peftbench.utils.files import dump_json

EPILOG = """\
A and B are each the folder of a run, the first digits of its name, or filters as for peftbench results. Runs that
differ only in their seed are compared together.

examples:
  peftbench compare 3f2a91c0 77d01b2e
  peftbench compare method=mam method=lora
  peftbench compare "method=lora task=sst2 bottleneck=8" "method=lora task=sst2 bottleneck=32" --folder outputs
"""


def main(argv: list[str]) -> int:
    """Print the comparison and return 0. Raises UserError for sides that cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="peftbench compare",
        description="Compare two runs, or two settings over their seeds, by a paired bootstrap over the examples.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for side in ("A", "B"):
        parser.add_argument(side, help="a run, or filters")
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="where the runs are; default: %(default)s")
    parser.add_argument("--resamples", type=int, default=10_000, help="draws of the bootstrap; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    if arguments.resamples < 1:
        raise UserError(f"--resamples {arguments.resamples}: it must be a whole number of at least 1.")

    a, b = (
        _read_side(name, word, arguments.folder) for name, word in zip("AB", (arguments.A, arguments.B), strict=True)
    )
    _check_comparable(a, b)
    differences = compare_rows(a, b, arguments.resamples)
    settings = find_differing_settings(a, b)
    if arguments.json:
        scores = {name: {**asdict(one), "difference": one.difference} for name, one in differences.items()}
        runs = {name: [record.run for record in row.scored] for name, row in (("a", a), ("b", b))}
        say(dump_json({**runs, "metrics": scores, "settings": settings}, indent=2, ensure_ascii=True))
    else:
        _print_comparison(a, b, differences, settings, make_console())
    if missing := describe_left_out([a, b]):
        warn(missing)
    return 0


def _read_side(name: str, word: str, folder: Path) -> Row:
    """Return the runs that a word of the command line selects."""
    records = _find_records(word, folder)
    rows = [row for row in group_seeds(records, "mean") if not is_unscored(row)]
    if not records:
        raise UserError(
            f"{name}={word} is neither the folder of a run nor the first digits of one below {folder}, nor a filter "
            "such as method=lora; peftbench results --show method,run,score lists them, --folder sets where to look."
        )
    if not rows:
        ended = ", ".join(sorted({record.outcome for record in records}))
        raise UserError(f"{name}={word} has no score to compare: it is {ended}.")
    if len(rows) > 1:
        keys = find_differing([read_settings(row.first) for row in rows])
        raise UserError(
            f"{name}={word} matches {len(rows)} settings, which differ in {', '.join(keys[:6]) or 'no key'}; choose "
            'one with further filters, as in "method=lora bottleneck=8", or name a run.'
        )
    return rows[0]


def _find_records(word: str, folder: Path) -> list[Record]:
    if (Path(word) / FILE).is_file():
        return load_records(Path(word))[0]
    records, _ = load_records(folder)
    if is_filter(word):
        filters = shlex.split(word)
        compared = [record for record in records if TRIALS in filters or not is_trial(record)]
        return select_records(compared, [one for one in filters if one != TRIALS])
    return [record for record in records if record.run.startswith(word)]


def _check_comparable(a: Row, b: Row) -> None:
    one, other = a.scored[0], b.scored[0]
    for key in ("task", "metric", "split", "examples", "data"):
        values = [FIELDS[key](record) for record in (one, other)]
        if values[0] != values[1] and not (key == "data" and None in values):  # an early record does not say which data
            raise UserError(f"A and B cannot be compared, because they differ in {key}: {values[0]} and {values[1]}.")


def _print_comparison(
    a: Row, b: Row, differences: dict[str, Difference], settings: dict[str, list[Any]], console: Console
) -> None:
    one = a.scored[0]
    report = one.scores["report"]
    console.print(f"{one.task}, {report.examples:,} {report.split} examples", highlight=False)
    for name, row in (("A", a), ("B", b)):
        runs = ", ".join(f"{record.run} (seed {record.seed})" for record in row.scored)
        preset = f" (debug={row.first.debug})" if row.first.debug else ""
        console.print(f"{name}: {row.first.method}{preset}, {runs}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("metric")
    for header in ("A", "B", "A - B", "95% interval", "p"):
        table.add_column(header, justify="right")
    for name, found in differences.items():
        interval = f"{found.low:+.2f} to {found.high:+.2f}"
        cells = (name, f"{found.a:.2f}", f"{found.b:.2f}", f"{found.difference:+.2f}", interval, f"{found.p:.4f}")
        table.add_row(*cells, style="bold" if name == one.metric else None)
    console.print()
    console.print(table)
    seeds = min(len(a.scored), len(b.scored))
    drawn = "examples only; one seed does not show how much another one would change"
    if seeds > 1:
        drawn = "examples and seeds" + ("; so few seeds say little about other seeds" if seeds < FEW_SEEDS else "")
    console.print(f"Chance over {drawn}.", style="dim", highlight=False)
    console.print()
    if not settings:
        console.print("The settings do not differ.")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("settings that differ", "A", "B"):
        table.add_column(header, overflow="fold")
    for key, values in settings.items():
        table.add_row(key, *(_format_setting(value) for value in values))
    console.print(table)


def _format_setting(value: Any) -> str:
    return "–" if value is None else format_value(value)[:60]
