"""`peftbench import FOLDER|FILE --out RUN`: an adapter that peft or loralib trained, as a finished run."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from peftbench.utils.console import say
from peftbench.utils.files import expand_home, require_empty
from peftbench.utils.progress import Display
from peftbench.utils.quiet import make_quiet_console

EPILOG = """\
The backbone is the one that the adapter's files name, or that of model=NAME, model.path=FOLDER. The task has the labels
in the order of the adapter's head. The run is scored on the task's report split; peftbench evaluate, predict, merge,
compare and results take it as any other run.

examples:
  peftbench import adapter --task sst2 task.data_dir=FOLDER --out outputs/imported/sst2
  peftbench import roberta_base_lora_mnli.bin --alpha 16 --task mnli model=roberta_base --out outputs/imported/mnli
"""


def main(argv: list[str]) -> int:
    """Write the run folder and return the exit code.

    Raises:
        UserError: the files have something without a form on the four axes, or do not fit the backbone or the task.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench import",
        description="Read a LoRA, an IA3 or a prompt from a folder of peft, or a LoRA from a file of loralib, and "
        "write it as a finished run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, metavar="FOLDER|FILE", help="what peft or loralib wrote")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of task, model and trainer")
    parser.add_argument("--task", metavar="NAME", help="the task, as task=NAME")
    parser.add_argument("--alpha", type=float, metavar="NUMBER", help="LoRA's alpha, which files of loralib lack")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to write, new or empty")
    arguments = parser.parse_intermixed_args(argv)
    require_empty(arguments.out)
    from peftbench.exchange.foreign import read_adapter  # imports torch, which a refusal above does without
    from peftbench.exchange.importing import compose_imported, import_adapter

    words = [*([] if arguments.task is None else [f"task={arguments.task}"]), *arguments.overrides]
    console = make_quiet_console()
    adapter = read_adapter(expand_home(arguments.adapter), arguments.alpha)
    run = compose_imported(adapter, words)
    compared = arguments.adapter if arguments.adapter.is_dir() and find_spec("peft") is not None else None
    imported = import_adapter(adapter, run, arguments.out, words, Display(console), compared)
    record = imported.record

    for axes in record.axes:
        size = "" if axes.bottleneck is None else f", bottleneck {axes.bottleneck}"
        point = (axes.functional_form, axes.modified_representation, axes.insertion_form, axes.composition)
        say(f"{axes.prefix.rstrip('.') or run.method}: {' · '.join(point)}{size}")
    if imported.difference is not None:
        say(f"Its logits differ from peft's by at most {imported.difference:.3g}.")
    score = record.scores["report"]
    size = f"{score.examples:,}" + (f" of {score.of:,}" if score.of else "")
    say(f"{score.split}, {size} examples: {', '.join(f'{name} {value!r}' for name, value in score.metrics.items())}")
    say(f"The run is in: {arguments.out}")
    return 0
