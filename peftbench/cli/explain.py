"""`peftbench explain`: what a method is and where it is in the network. Imports torch only to build the method."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from peftbench.cli.own_parts import check_own_forms
from peftbench.config.compose import compose_run
from peftbench.config.schema import Run, resolve_config
from peftbench.counts.show import explanation_to_json, show_explanation
from peftbench.records.record import find_record
from peftbench.records.saved import OUTPUTS, find_run_folder, read_saved_config
from peftbench.tables.row import is_scored
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError
from peftbench.utils.quick_imports import speed_up_imports


def main(argv: list[str]) -> int:
    """Print the explanation of one run and return 0.

    Raises:
        UserError: the command line is refused, or the run does not fit its backbone.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench explain",
        description="Explain a method on a backbone, or a run of it: its four axes, its place in the network, its "
        "parameters.",
        epilog="The overrides are those of peftbench train; peftbench train --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="RUN | KEY=VALUE", help="a run, or keys as for peftbench train")
    parser.add_argument("-cd", "--config-dir", help="a folder of your own with method/, model/ ... below it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(argv)
    folder = _find_run(args.words)
    run = compose_run(args.words, config_dir=args.config_dir, reads_data=False) if folder is None else _read_run(folder)
    check_own_forms([run])
    with speed_up_imports():
        from peftbench.counts.explanation import explain
    explained = explain(run)
    if args.json:
        say(explanation_to_json(explained))
    else:
        console = make_console()
        if folder is not None:
            console.print(_describe_run(folder), highlight=False, soft_wrap=True)
        show_explanation(explained, console)
    return 0


def _find_run(words: list[str]) -> Path | None:
    """Return the folder of the run that is to be explained; None if keys describe one.

    Raises UserError for a run that is named next to other words.
    """
    named = [word for word in words if "=" not in word and find_run_folder(word).is_dir()]
    if not named:
        if others := [word for word in words if "=" not in word and not word.startswith("~")]:
            raise UserError(
                f"{others[0]} is neither the folder of a run, nor the first digits of one below {OUTPUTS}, nor "
                "KEY=VALUE, such as method=lora."
            )
        return None
    if len(words) > 1:
        raise UserError(f"{named[0]} is a run, which is explained as it was trained; leave the other words out.")
    return find_run_folder(named[0])


def _read_run(folder: Path) -> Run:
    """Return the run in a folder, with the labels that its data had."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no run; give the folder that peftbench train named at the end of a run.")
    run = resolve_config(read_saved_config(folder))
    record = find_record(folder)
    if record is not None and not run.task.labels:
        run.task.labels = record.data.get("labels", [])
    return replace(run, budget=None, budget_split=None)  # the bottlenecks are those that were trained


def _describe_run(folder: Path) -> str:
    """Return the run's folder and how it ended."""
    record = find_record(folder)
    if record is None:
        return str(folder)
    score = f", {record.metric} {record.score:.2f}" if is_scored(record) and record.score is not None else ""
    return f"{folder}: {record.outcome}{score}, seed {record.seed}, {record.task}"
