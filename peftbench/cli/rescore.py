"""`peftbench rescore RUN [METRIC]`: compute any metric of a finished run from its predictions, without a model."""

from __future__ import annotations

import argparse

from peftbench.evaluation.rescore import rescore
from peftbench.records.saved import find_run_folder, read_saved_record
from peftbench.tables.scores import show_scores
from peftbench.utils.console import make_console, say
from peftbench.utils.files import dump_json


def main(argv: list[str]) -> int:
    """Print the scores and return the exit code. Raises UserError if RUN is not finished or has no such METRIC."""
    parser = argparse.ArgumentParser(
        prog="peftbench rescore", description="Compute a metric of a finished run from its saved predictions."
    )
    parser.add_argument("run", type=find_run_folder, help="its folder, or the first digits of its name")
    parser.add_argument("metric", nargs="?", help="default: the metric of the run")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object for each split")
    arguments = parser.parse_args(argv)
    found = rescore(arguments.run, arguments.metric)
    if arguments.json:
        say(dump_json(found, indent=2, ensure_ascii=True))
    else:
        show_scores(found, read_saved_record(arguments.run), make_console())
    return 0
