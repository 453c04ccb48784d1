"""`peftbench results`: print the runs below folders as a table, JSON, CSV, Markdown or LaTeX."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, get_args

from rich.text import Text

from peftbench.tables.columns import COST, COST_NAMES, Column, Cost, choose_columns, find_columns, make_paper_columns
from peftbench.tables.fields import FIELDS
from peftbench.tables.formats import records_to_csv, records_to_json, rows_to_csv, rows_to_values, to_latex, to_markdown
from peftbench.tables.paper import find_printed
from peftbench.tables.pivot import pivot_records
from peftbench.tables.row import (
    Row,
    Statistic,
    describe_left_out,
    drop_retrained,
    get_rank,
    group_seeds,
    is_unscored,
    make_rows,
    split_tables,
)
from peftbench.tables.select import read_records
from peftbench.tables.terminal import describe_marks, make_titles, show_legend, show_table
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError, warn
from peftbench.utils.files import dump_json
from peftbench.utils.text import format_count, join_lines

EPILOG = """\
KEY is a column (method, row, task, model, seed, status, functional_form, bottleneck, learning_rate, stored, score,
time, device ...), a metric (rouge1 ...), a baseline, or a dotted key of the record (trainer.batch_size ...).

examples:
  peftbench results method=mam,lora task=xsum status=done
  peftbench results 'score>60' 'stored<1e6'                compare numbers, in quotes because of the shell
  peftbench results budget=2% method=lora,mam or method=full   what passes the filters before or after
  peftbench results task=webnlg group=unseen               scores of the groups of examples that were not trained on
  peftbench results --mean --sort stored
  peftbench results --mean --interval                      ± half the 95% interval, over seeds and examples
  peftbench results --rows method --columns insertion_form
  peftbench results --show method,seed,score,searched      what search= tried; trials=true also shows its trials
  peftbench results task=xsum --mean --show method,percent,rouge1,rouge2,rougeL --latex
"""


def main(argv: list[str]) -> int:
    """Print the runs and return the exit code. Raises UserError if there are none."""
    arguments = _build_parser().parse_intermixed_args(argv)
    records = read_records(arguments.words)
    if arguments.reverse and not arguments.sort:
        raise UserError("--reverse needs --sort, whose order it reverses.")
    if arguments.paper and not any(map(find_printed, records)):
        warn("None of these runs is a row of the paper's tables, at its size; row=NAME trains one.")
    pivoted = bool(arguments.rows or arguments.columns)
    _check_flags(arguments, pivoted)
    if arguments.interval and (arguments.statistic == "median" or not (pivoted or arguments.statistic)):
        raise UserError("--interval is that of a mean: it needs --mean, or --rows and --columns without --median.")
    if (pivoted or arguments.statistic) and (again := len(records) - len(drop_retrained(records))):
        were = "was" if again == 1 else "were"
        warn(f"{format_count(again, 'run')} {were} trained more than once; a mean uses the latest.")
    if pivoted:
        _check_pivot(arguments)
        if missing := describe_left_out([Row(tuple(records))]):
            warn(missing)
        heading, wanted, lines = pivot_records(
            records,
            arguments.rows or ["method"],
            arguments.columns,
            value=arguments.value or "score",
            mixed=arguments.mix,
            statistic=arguments.statistic or "mean",
            interval=arguments.interval,
        )
        _print_tables([(Text(heading), wanted, lines)], arguments)
        return 0
    plain = not (arguments.statistic or arguments.show)
    if plain and arguments.form in ("json", "csv"):
        rows = _sort_as_asked(make_rows(records), arguments)
        records = [row.first for row in rows]
        columns_beside = make_paper_columns(rows, arguments.paper)
        beside = dict(zip(map(id, records), rows_to_values(columns_beside, rows), strict=True))
        form = records_to_json if arguments.form == "json" else records_to_csv
        say(form(records, lambda record: beside[id(record)]).rstrip("\n"))
    else:
        rows = group_seeds(records, arguments.statistic) if arguments.statistic else make_rows(records)
        if missing := describe_left_out(rows):
            warn(missing)
        if arguments.pareto:
            _check_cost(rows, arguments.pareto)
        found = split_tables(rows)
        headed = zip(make_titles(found), found, strict=True)
        _print_tables([(heading, *_choose_columns(table, arguments)) for heading, table in headed], arguments)
    return 0


def _build_parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--interval",
        action="store_true",
        help="± half the 95%% interval of the mean in place of the standard deviation: over seeds and examples where "
        "it is known what each example contributed, else over the seeds",
    )
    parser.add_argument("--sort", metavar="KEY", help="order by a column, lowest first; default: best score first")
    parser.add_argument("--reverse", action="store_true", help="with --sort: the largest first")
    parser.add_argument("--show", metavar="KEY,...", type=_split_list, default=[], help="only these columns")
    parser.add_argument("--rows", metavar="KEY,...", type=_split_list, default=[], help="a row for each value of these")
    parser.add_argument(
        "--columns", metavar="KEY,...", type=_split_list, default=[], help="and a column for each of these"
    )
    parser.add_argument("--value", metavar="KEY", help="the cells of such a table; default: score")
    parser.add_argument(
        "--mix", metavar="KEY,...", type=_split_list, default=[], help="keys that may differ in a column"
    )
    parser.add_argument(
        "--pareto", choices=get_args(Cost), help=f"the cost of the marked Pareto front (◆); default: {COST}"
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


def _split_list(text: str) -> list[str]:
    return text.split(",")


def _check_flags(arguments: argparse.Namespace, pivoted: bool) -> None:
    """Raise UserError for an option that would change nothing beside the others."""
    if pivoted and arguments.pareto:
        raise UserError("--pareto marks a front among rows of runs; leave it out beside --rows and --columns.")
    if pivoted and arguments.paper:
        raise UserError("--paper shows scores beside rows of runs; leave it out beside --rows and --columns.")
    if not pivoted and arguments.value:
        raise UserError("--value needs --rows or --columns, whose cells it fills; --show chooses columns without them.")
    if not pivoted and arguments.mix:
        raise UserError("--mix needs --rows or --columns; without them, runs that differ get separate tables.")
    if arguments.pareto and arguments.form in ("json", "csv") and not (arguments.statistic or arguments.show):
        raise UserError(f"--pareto marks rows of a table; --{arguments.form} has no front: leave it out.")


def _check_cost(rows: Sequence[Row], cost: Cost) -> None:
    """Raise UserError where no run has the cost of the front."""
    if all(FIELDS[cost](record) is None for row in rows for record in row.records):
        where = ", which is measured on a GPU" if cost == "memory" else ""
        raise UserError(
            f"--pareto {cost}: none of these runs has its {COST_NAMES[cost]}{where}; leave it out, or give {COST}."
        )


def _check_pivot(arguments: argparse.Namespace) -> None:
    if arguments.show or arguments.sort:
        given = "--show" if arguments.show else "--sort"
        raise UserError(f"{given} needs a row for each run; with --rows and --columns use --value and filters.")


def _choose_columns(table: list[Row], arguments: argparse.Namespace) -> tuple[list[Column[Row]], list[Row]]:
    """Return the columns of a table, and its rows in order."""
    table = _sort_as_asked(sorted(table, key=get_rank), arguments)
    cost = arguments.pareto or COST
    if arguments.show:
        return find_columns(arguments.show, table, cost, arguments.paper, arguments.interval), table
    return choose_columns(table, cost=cost, paper=arguments.paper, interval=arguments.interval), table


def _sort_as_asked(table: list[Row], arguments: argparse.Namespace) -> list[Row]:
    if not arguments.sort:
        return table
    (by,) = find_columns([arguments.sort], table, arguments.pareto or COST, arguments.paper)
    return _sort_rows(table, by, arguments.reverse)


def _sort_rows(table: list[Row], column: Column[Row], descending: bool) -> list[Row]:
    """Sort the rows by a column; rows without a value in it, or without a score, come last."""

    def place(row: Row) -> tuple[float, str]:
        number = 0.0 if column.value is None else column.value(row)
        return (math.nan if number is None else number, column.cell(row) if column.value is None else "")

    def is_last(row: Row) -> bool:
        return is_unscored(row) or math.isnan(place(row)[0])

    first = sorted((row for row in table if not is_last(row)), key=place, reverse=descending)
    return first + [row for row in table if is_last(row)]


def _print_tables(
    tables: Sequence[tuple[Text, list[Column[Any]], Sequence[Any]]], arguments: argparse.Namespace
) -> None:
    if arguments.form in ("json", "csv"):
        rows = [row for _, wanted, lines in tables for row in rows_to_values(wanted, lines)]
        say(
            dump_json(rows, indent=2, ensure_ascii=True) if arguments.form == "json" else rows_to_csv(rows).rstrip("\n")
        )
        return
    console = make_console()
    for index, (heading, wanted, lines) in enumerate(tables):
        if index:
            say("")
        has_rows = all(isinstance(line, Row) for line in lines)
        marks = "; ".join(describe_marks(wanted, lines, {column.key for column in wanted})) if has_rows else ""
        if arguments.form == "markdown":
            say(f"{join_lines(heading.plain)}\n\n{to_markdown(wanted, lines)}".rstrip("\n"))
            if marks:
                say(f"\n{marks}")
        elif arguments.form == "latex":
            comment = "; ".join(filter(None, [join_lines(heading.plain), marks]))
            say(f"% {comment}\n{to_latex(wanted, lines)}".rstrip("\n"))
        else:
            console.print(heading)
            shown = show_table(wanted, lines, console, labels=len(arguments.rows))
            if has_rows:
                show_legend(wanted, lines, console, shown)
