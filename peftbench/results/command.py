"""`peftbench results`: the runs below a folder as a table, JSON or CSV. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from peftbench.errors import UserError
from peftbench.results.record import load_records
from peftbench.results.table import show, to_csv, to_json


def main(argv: list[str]) -> int:
    """Prints the runs and returns the exit code. Raises UserError where there are none."""
    parser = argparse.ArgumentParser(prog="peftbench results", description="Show the runs found, best first.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="default: %(default)s")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON array of the whole records")
    form.add_argument("--csv", action="store_true", help="print one line for each run")
    arguments = parser.parse_args(argv)

    records, left_out = load_records(arguments.folder)
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    if not records:
        raise UserError(f"{arguments.folder} holds no record of a run; make one with: peftbench train")
    if arguments.json:
        print(to_json(records))
    elif arguments.csv:
        print(to_csv(records), end="")
    else:
        show(records, Console())
    return 0
