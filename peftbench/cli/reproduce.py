"""`peftbench reproduce TABLE`: the runs of a table or figure of the paper, and its scores next to ours.

The rows of a table are in conf/experiment/paper, the paper's scores in conf/rows.yaml. Imports torch only to train.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from rich.console import Console

from peftbench.cli.train import main as train
from peftbench.config.compose import compose_points
from peftbench.config.schema import Run, find_conf_dir, index_by_key
from peftbench.config.search import split_trials
from peftbench.records.choice import try_settle
from peftbench.records.location import locate_run
from peftbench.records.record import Record, find_record, load_records
from peftbench.sweeps.resolve import resolve_points
from peftbench.tables.columns import Column, format_duration
from peftbench.tables.paper import find_score, is_papers_setting
from peftbench.tables.terminal import show_table
from peftbench.utils.console import make_console
from peftbench.utils.differences import find_differing
from peftbench.utils.errors import UserError, describe_unknown
from peftbench.utils.files import expand_home


@dataclass(frozen=True)
class TableRun:
    """One run of a table."""

    settings: dict[str, str]  # the keys in which the table's runs differ, as typed
    run: Run
    record: Record | None
    seconds: float | None  # the time that it took, or is expected to take
    paper: float | None  # the paper's score

    @property
    def is_done(self) -> bool:
        return self.record is not None and self.record.status == "done"

    @property
    def has_ended(self) -> bool:
        return self.record is not None and self.record.has_ended

    @property
    def ours(self) -> float | None:
        return self.record.score if self.record is not None and self.is_done else None


def main(argv: list[str]) -> int:
    """Train the missing runs and print the table. Return 0 if every run has ended, otherwise 1; 0 in a dry run.

    Raises:
        UserError: there is no such table, or the overrides are wrong.
    """
    names = sorted(file.stem for file in (find_conf_dir() / "experiment" / "paper").glob("*.yaml"))
    parser = argparse.ArgumentParser(
        prog="peftbench reproduce",
        description="Run a table or figure of the paper, and show its scores next to ours.",
        epilog=f"Tables: {', '.join(names)}. Overrides are those of peftbench train -m, such as model= or seed=1,2.",
        allow_abbrev=False,
    )
    parser.add_argument("table", metavar="TABLE", help="such as table5")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="as for peftbench train -m")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, which are done, and the expected time")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.table not in names:
        raise UserError(describe_unknown("table", arguments.table, names))

    overrides = [f"experiment=paper/{arguments.table}", *arguments.overrides]
    points = split_trials(resolve_points(compose_points(overrides, multirun=True)))[1]
    code = 0 if arguments.dry_run else train(["-m", *overrides])
    _print_table(
        arguments.table,
        describe_runs(arguments.table, [(overrides, try_settle(run)) for overrides, run in points]),
        make_console(),
    )
    return code


def describe_runs(table: str, points: Sequence[tuple[list[str], Run]]) -> list[TableRun]:
    """Return a line for each run, with its record, time and the paper's score as far as they are known."""
    given = [index_by_key(overrides) for overrides, _ in points]
    keys = find_differing(given) or ["row"]
    others = _read_records(expand_home(points[0][1].output_dir))
    found = []
    for values, (_, run) in zip(given, points, strict=True):
        record = find_record(locate_run(run))
        printed = find_score(values.get("row"), run.method, run.task.name, table)
        took = record.timings.get("total_s") if record is not None and record.has_ended else None
        found.append(
            TableRun(
                settings={key: values[key] for key in keys if key in values},
                run=run,
                record=record,
                seconds=_estimate_seconds(run, others) if took is None else took,
                paper=None if printed is None else printed[1],
            )
        )
    return found


def _read_records(folder: Path) -> list[Record]:
    found = load_records(folder)[0] if folder.is_dir() else []
    return [record for record in found if record.status == "done" and "total_s" in record.timings]


def _estimate_seconds(run: Run, records: Sequence[Record]) -> float | None:
    """Return the mean time of runs with the same method, task, backbone and steps; else of any method; else None."""
    alike = [
        record
        for record in records
        if (record.task, record.model.name, record.debug) == (run.task.name, run.model.name, run.debug)
        and all(record.trainer.get(key) == getattr(run.trainer, key) for key in ("max_steps", "epochs", "batch_size"))
    ]
    same = [record for record in alike if record.method == run.method] or alike
    return fmean(record.timings["total_s"] for record in same) if same else None


def _print_table(name: str, table: Sequence[TableRun], console: Console) -> None:
    keys = list(dict.fromkeys(key for line in table for key in line.settings))
    columns = [Column[TableRun](key, key, partial(_get_setting, key), words=True) for key in keys]
    columns += [
        Column("status", "status", lambda line: line.record.outcome if line.record else "missing", words=True, wrap=11),
        Column("time", "time", _format_time),
        Column("metric", "metric", lambda line: line.run.task.metric, words=True, dispensable=1),
        Column("paper", "paper", lambda line: _format_score(line.paper)),
        Column("ours", "ours", lambda line: _format_score(line.ours)),
        Column("difference", "ours -\npaper", _format_difference),
    ]
    of = dict.fromkeys(f"{line.run.task.name} with {line.run.model.name}" for line in table)
    console.print(f"\n{name}: {', '.join(of)}", highlight=False)
    show_table(columns, table, console)
    done = sum(line.is_done for line in table)
    left = [line.seconds for line in table if not line.has_ended]
    known = [seconds for seconds in left if seconds is not None]
    diverged = sum(line.has_ended for line in table) - done
    also = f", {diverged} diverged and {'has' if diverged == 1 else 'have'} no score" if diverged else ""
    console.print(f"\n{done} of {len(table)} runs are done{also}.", highlight=False)
    if known:
        others = f"the other {len(left)}" if len(known) == len(left) else f"{len(known)} of the other {len(left)}"
        take = "take" if len(known) > 1 else "takes"
        console.print(
            f"By the records of similar runs, {others} {take} about {format_duration(sum(known))}.", highlight=False
        )
    elif left:
        console.print("There is no record of a similar run, so the time of the others is unknown.", highlight=False)


def _get_setting(key: str, line: TableRun) -> str:
    return line.settings.get(key, "")


def _format_time(line: TableRun) -> str:
    if line.seconds is None:
        return ""
    return format_duration(line.seconds) if line.has_ended else f"~{format_duration(line.seconds)}"


def _format_difference(line: TableRun) -> str:
    if line.record is None or line.ours is None or line.paper is None or not is_papers_setting(line.record):
        return ""
    return f"{line.ours - line.paper:+.2f}"


def _format_score(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"
