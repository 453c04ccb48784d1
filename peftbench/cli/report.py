"""`peftbench report`: write one HTML file to browse runs, which needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftbench.tables.report.content import SAMPLES, build_content
from peftbench.tables.report.page import build_page
from peftbench.tables.select import read_records
from peftbench.utils.console import say
from peftbench.utils.errors import UserError
from peftbench.utils.files import replace_file


def main(argv: list[str]) -> int:
    """Write the file and return 0. Raises UserError if there is nothing to show."""
    parser = argparse.ArgumentParser(
        prog="peftbench report",
        description="Write one HTML file that shows the runs: a table to sort and filter, score against cost, training "
        "curves, and for chosen runs the axes, the settings that differ and sample predictions.",
        epilog="Filters and keys are those of peftbench results. The file contains sample predictions and the settings "
        "of the runs, including paths: check it before you publish it.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="FOLDER | KEY=VALUE,...", help="where (default: outputs) and which")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.add_argument(
        "--predictions", metavar="N", type=int, default=SAMPLES, help="samples of each run; default: %(default)s"
    )
    parser.add_argument("--paper", action="store_true", help="as for peftbench results")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.predictions < 0:
        raise UserError(f"--predictions {arguments.predictions}: it must be a whole number, or 0 for none.")
    if arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a folder; give the name of a file, such as report.html.")

    text = build_page(
        build_content(read_records(arguments.words), arguments.words, arguments.predictions, arguments.paper)
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(arguments.out) as file:
        file.write(text)
    say(str(arguments.out))
    return 0
