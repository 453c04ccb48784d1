"""`peftbench params`: the counts of one run, or of a sweep, before anything is loaded. Imports torch only to count."""

from __future__ import annotations

import argparse

from peftbench.cli.own_parts import check_own_forms
from peftbench.config.compose import compose_points
from peftbench.counts.table import counts_to_json, show_run, show_sweep
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError, print_faults
from peftbench.utils.quick_imports import speed_up_imports


def main(argv: list[str]) -> int:
    """Print the counts and return 0, or 1 if a point of a sweep does not fit its backbone.

    Raises:
        UserError: the command line is refused, or its one run does not fit its backbone.
    """
    args = _parse_arguments(argv)
    points = compose_points(args.overrides, multirun=args.multirun, config_dir=args.config_dir, reads_data=False)
    check_own_forms([run for _, run in points])
    with speed_up_imports():
        from peftbench.counts.run_counts import Known, RunCounts, count_run
    counted: list[RunCounts] = []
    known = Known()
    for _, run in points:
        try:
            counted.append(count_run(run, known))
        except UserError as error:
            if not args.multirun:
                raise
            for sentence in error.faults:
                print_faults([f"{run.method} on {run.model.name}: {sentence}"])
    if args.json:
        say(counts_to_json(counted))
    elif args.multirun:
        show_sweep(counted, make_console())
    else:
        show_run(counted[0], make_console())
    return 0 if len(counted) == len(points) else 1


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="peftbench params",
        description="Count what a run would train and store, without loading any weights.",
        epilog="The overrides are those of peftbench train; peftbench train --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for peftbench train")
    parser.add_argument("-m", "--multirun", action="store_true", help="count every combination of KEY=A,B")
    parser.add_argument("-cd", "--config-dir", help="a folder of your own with method/, model/ ... below it")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object for each run")
    return parser.parse_intermixed_args(argv)
