"""`peftbench plot`: plot score against cost, or training curves. Imports matplotlib only to draw."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from peftbench.tables.columns import COST
from peftbench.tables.curves import draw_curves, list_curves, place_curves
from peftbench.tables.figure import ENDINGS, save_figure
from peftbench.tables.plot import NAMES, draw_scores, list_marks, place_scores
from peftbench.tables.row import Statistic, describe_left_out, group_seeds, make_rows
from peftbench.tables.select import read_records
from peftbench.utils.console import say
from peftbench.utils.errors import UserError, warn


def main(argv: list[str]) -> int:
    """Write the plot and return 0. Raises UserError if there is nothing to draw."""
    parser = argparse.ArgumentParser(
        prog="peftbench plot",
        description="Plot scores against stored parameters, with a line for each method over its sizes.",
        epilog="Filters and keys are those of peftbench results.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="FOLDER | KEY=VALUE,...", help="where (default: outputs) and which")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, action="append", help="PNG, SVG or PDF, by extension; default: scores.png"
    )
    parser.add_argument("--x", choices=list(NAMES), help=f"the cost; default: {COST}")
    parser.add_argument(
        "--y",
        metavar="KEY",
        help="a metric (default: the main one); of curves a logged value (default: loss), or selection: the looks",
    )
    parser.add_argument("--by", metavar="KEY", default="method", help="a line for each value; default: method, axes")
    parser.add_argument("--curves", action="store_true", help="plot the values logged in training, a line for each run")
    parser.add_argument(
        "--interval",
        action="store_true",
        help="bars are the 95%% interval of the mean, not the standard deviation over seeds: over seeds and examples "
        "where it is known what each example contributed, else over the seeds",
    )
    parser.add_argument("--statistic", choices=get_args(Statistic), help="over seeds; default: mean")
    arguments = parser.parse_intermixed_args(argv)

    files = arguments.out or [Path("scores.png")]
    for file in files:
        if file.suffix.lower() not in ENDINGS:
            raise UserError(f"--out {file}: the extension must be one of {', '.join(ENDINGS)}.")
    if arguments.curves and (idle := [name for name in ("x", "interval", "statistic") if getattr(arguments, name)]):
        raise UserError(
            f"--{idle[0]} is for scores, and --curves draws each run over its steps; leave one of them out."
        )
    statistic: Statistic = arguments.statistic or "mean"
    if arguments.interval and statistic != "mean":
        raise UserError(f"--interval is that of a mean score; leave --statistic {statistic} out.")
    records = read_records(arguments.words)
    marks: list[dict[str, Any]] = []
    if arguments.curves:
        curves = place_curves(make_rows(records), y=arguments.y or "loss", by=arguments.by)
        figure, marks = draw_curves(curves), list_curves(curves)
    else:
        rows = group_seeds(records, statistic)
        if missing := describe_left_out(rows):
            warn(missing)
        scores = place_scores(
            rows, x=arguments.x or COST, y=arguments.y or "score", by=arguments.by, interval=arguments.interval
        )
        figure, marks = draw_scores(scores), list_marks(scores)
    for file in files:
        save_figure(figure, file, marks)
        say(str(file))
    return 0
