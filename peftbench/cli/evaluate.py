"""`peftbench evaluate RUN [KEY=VALUE ...]`: load a finished run's adapter and score it again, on any split."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftbench.records.saved import find_run_folder, read_saved_record
from peftbench.tables.scores import show_scores
from peftbench.utils.console import say
from peftbench.utils.errors import UserError
from peftbench.utils.files import dump_json
from peftbench.utils.quiet import make_quiet_console


def main(argv: list[str]) -> int:
    """Print the scores and return the exit code.

    Raises:
        UserError: there is no finished run, an override is wrong, or the backbone is not that of the run.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench evaluate",
        description="Load the adapter of a finished run and score it again.",
        epilog="task.split=SPLIT scores another split; other keys are those of peftbench train that begin with task., "
        "trainer. or model., such as task.generation.num_beams=1 or trainer.eval_batch_size=8. A key that only the "
        "training read is refused.",
    )
    parser.add_argument("run", type=find_run_folder, help="its folder, or the first digits of its name")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object for each split")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write the split's predictions there")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.predictions is not None and not arguments.predictions.parent.is_dir():
        raise UserError(f"--predictions {arguments.predictions}: {arguments.predictions.parent} is not a folder.")
    record = read_saved_record(arguments.run)
    from peftbench.evaluation.finished import (  # imports torch, which a refusal above does without
        evaluate_run,
        read_changed_run,
    )

    run = read_changed_run(arguments.run, record, arguments.overrides)
    console = make_quiet_console(stderr=arguments.json)
    found = evaluate_run(arguments.run, run, console, arguments.predictions)
    if arguments.json:
        say(dump_json(found, indent=2, ensure_ascii=True))
    else:
        show_scores(found, record, console)
    return 0
