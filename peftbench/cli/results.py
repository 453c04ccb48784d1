"""`peftbench results`: print the runs below folders as a table, JSON, CSV, Markdown or LaTeX."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, get_args

from rich.text import Text

from peftbench.tables.columns import Column, Cost, beside_paper, chosen, columns
from peftbench.tables.formats import csv_of, latex, markdown, to_csv, to_json, values
from peftbench.tables.paper import printed
from peftbench.tables.pivot import pivot
from peftbench.tables.row import Row, Statistic, left_out, once, over_seeds, rank, single, tables, unscored
from peftbench.tables.select import read
from peftbench.tables.terminal import show_table, titles
from peftbench.utils.console import terminal
from peftbench.utils.errors import UserError
from peftbench.utils.files import dumped

EPILOG = """\
KEY is a column (method, task, model, seed, status, functional_form, bottleneck, learning_rate, stored, score, time,
device ...), a metric (rouge1 ...), a baseline, or a dotted key of the record (trainer.batch_size, versions.torch ...).

examples:
  peftbench results method=mam,lora task=xsum status=done
  peftbench results 'score>60' 'stored<1e6'                compare numbers, in quotes because of the shell
  peftbench results --mean --sort stored
  peftbench results --rows method --columns insertion_form
  peftbench results --show method,seed,score,searched      what search= tried; trials=true also shows its trials
  peftbench results task=xsum --mean --show method,percent,rouge1,rouge2,rougeL --latex
"""


def main(argv: list[str]) -> int:
    """Print the runs and return the exit code. Raises UserError if there are none."""
    arguments = _parser().parse_intermixed_args(argv)
    records = read(arguments.words)
    if arguments.reverse and not arguments.sort:
        raise UserError("--reverse needs --sort, whose order it reverses.")
    if arguments.paper and not any(map(printed, records)):
        print("None of these runs is a row of the paper's tables, at its size; row=NAME trains one.", file=sys.stderr)
    pivoted = arguments.rows or arguments.columns
    if (pivoted or arguments.statistic) and (again := len(records) - len(once(records))):
        runs = "1 run was" if again == 1 else f"{again} runs were"
        print(f"{runs} trained more than once; a mean uses the latest.", file=sys.stderr)
    if pivoted:
        _check_pivot(arguments)
        if missing := left_out([Row(tuple(records))]):
            print(missing, file=sys.stderr)
        heading, wanted, lines = pivot(
            records,
            arguments.rows or ["method"],
            arguments.columns,
            value=arguments.value,
            mixed=arguments.mix,
            statistic=arguments.statistic or "mean",
        )
        _print([(Text(heading), wanted, lines)], arguments)
        return 0
    if arguments.mix:
        raise UserError("--mix needs --rows or --columns; without them, runs that differ get separate tables.")
    plain = not (arguments.statistic or arguments.show)
    if plain and arguments.form in ("json", "csv"):
        rows = single(records)
        columns_beside = beside_paper(rows, arguments.paper)
        beside = dict(zip(map(id, records), values(columns_beside, rows), strict=True))
        form = to_json if arguments.form == "json" else to_csv
        print(form(records, lambda record: beside[id(record)]).rstrip("\n"))
    else:
        rows = over_seeds(records, arguments.statistic) if arguments.statistic else single(records)
        if missing := left_out(rows):
            print(missing, file=sys.stderr)
        found = tables(rows)
        headed = zip(titles(found), found, strict=True)
        _print([(heading, *_columns(table, arguments)) for heading, table in headed], arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftbench results",
        description="Show the runs found, best first: one table for each task, backbone, metric, split and size.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="FOLDER | KEY=VALUE,...", help="where (default: outputs) and which")
    group = parser.add_mutually_exclusive_group()
    for statistic in get_args(Statistic):
        group.add_argument(
            f"--{statistic}",
            dest="statistic",
            action="store_const",
            const=statistic,
            help=f"one row for the runs that differ only in their seed: {statistic} ± standard deviation, and n",
        )
    parser.add_argument("--sort", metavar="KEY", help="order by a column, lowest first; default: best score first")
    parser.add_argument("--reverse", action="store_true", help="with --sort: the largest first")
    parser.add_argument("--show", metavar="KEY,...", type=_listed, default=[], help="only these columns")
    parser.add_argument("--rows", metavar="KEY,...", type=_listed, default=[], help="a row for each value of these")
    parser.add_argument("--columns", metavar="KEY,...", type=_listed, default=[], help="and a column for each of these")
    parser.add_argument("--value", metavar="KEY", default="score", help="the cells of such a table; default: score")
    parser.add_argument("--mix", metavar="KEY,...", type=_listed, default=[], help="keys that may differ in a column")
    parser.add_argument(
        "--pareto", choices=get_args(Cost), default="stored", help="the cost of the marked Pareto front (◆)"
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="also show the paper's scores next to runs with another backbone or less data, and say what they are for",
    )
    form = parser.add_mutually_exclusive_group()
    for name, what in {
        "json": "a JSON array of the whole records, or of the chosen columns",
        "csv": "one line for each run or row",
        "markdown": "tables for GitHub",
        "latex": "tables with the rules of booktabs",
    }.items():
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=f"print {what}")
    return parser


def _listed(text: str) -> list[str]:
    return text.split(",")


def _check_pivot(arguments: argparse.Namespace) -> None:
    if arguments.show or arguments.sort:
        given = "--show" if arguments.show else "--sort"
        raise UserError(f"{given} needs a row for each run; with --rows and --columns use --value and filters.")


def _columns(table: list[Row], arguments: argparse.Namespace) -> tuple[list[Column[Row]], list[Row]]:
    """Return the columns of a table, and its rows in order."""
    table = sorted(table, key=rank)
    if arguments.sort:
        (by,) = chosen([arguments.sort], table, arguments.pareto, arguments.paper)
        table = _sorted(table, by, arguments.reverse)
    if arguments.show:
        return chosen(arguments.show, table, arguments.pareto, arguments.paper), table
    return columns(table, cost=arguments.pareto, paper=arguments.paper), table


def _sorted(table: list[Row], column: Column[Row], descending: bool) -> list[Row]:
    """Sort the rows by a column; rows without a value in it, or without a score, come last."""

    def place(row: Row) -> tuple[float, str]:
        number = 0.0 if column.value is None else column.value(row)
        return (math.nan if number is None else number, column.cell(row) if column.value is None else "")

    def is_last(row: Row) -> bool:
        return unscored(row) or math.isnan(place(row)[0])

    first = sorted((row for row in table if not is_last(row)), key=place, reverse=descending)
    return first + [row for row in table if is_last(row)]


def _print(tables: Sequence[tuple[Text, list[Column[Any]], Sequence[Any]]], arguments: argparse.Namespace) -> None:
    if arguments.form in ("json", "csv"):
        rows = [row for _, wanted, lines in tables for row in values(wanted, lines)]
        print(dumped(rows, indent=2, ensure_ascii=True) if arguments.form == "json" else csv_of(rows).rstrip("\n"))
        return
    console = terminal()
    for index, (heading, wanted, lines) in enumerate(tables):
        if index:
            print()
        if arguments.form == "markdown":
            print(f"{heading.plain}\n\n{markdown(wanted, lines)}", end="")
        elif arguments.form == "latex":
            print(f"% {heading.plain}\n{latex(wanted, lines)}", end="")
        else:
            console.print(heading)
            show_table(wanted, lines, console, labels=len(arguments.rows))
