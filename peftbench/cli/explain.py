"""`peftbench explain`: what a method is and where it is in the network. Imports torch only to build the method."""

from __future__ import annotations

import argparse

from peftbench.config.compose import compose_run
from peftbench.counts.show import explanation_to_json, show_explanation
from peftbench.utils.console import make_console, say
from peftbench.utils.quick_imports import speed_up_imports


def main(argv: list[str]) -> int:
    """Print the explanation of one run and return 0.

    Raises:
        UserError: the command line is refused, or the run does not fit its backbone.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench explain",
        description="Explain a method on a backbone: its four axes, its place in the network, its parameters.",
        epilog="The overrides are those of peftbench train; peftbench train --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for peftbench train")
    parser.add_argument("-cd", "--config-dir", help="a folder of your own with method/, model/ ... below it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(argv)
    run = compose_run(args.overrides, config_dir=args.config_dir, reads_data=False)
    with speed_up_imports():
        from peftbench.counts.explanation import explain
    explained = explain(run)
    if args.json:
        say(explanation_to_json(explained))
    else:
        show_explanation(explained, make_console())
    return 0
