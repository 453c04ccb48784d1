"""`peftbench merge RUN --out FOLDER`: write a finished run as a checkpoint that plain transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftbench.config.schema import DType
from peftbench.records.saved import find_run_folder, read_saved_record
from peftbench.utils.files import require_empty
from peftbench.utils.quiet import make_quiet_console


def main(argv: list[str]) -> int:
    """Write the folder and return the exit code.

    Raises:
        UserError: there is no finished run, its method has no merged form, or FOLDER is not empty.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench merge",
        description="Merge what a finished run has trained into the backbone's weights, and write a folder for "
        "transformers' from_pretrained, with the tokenizer, that does not need peftbench.",
        epilog="Affine methods can be merged: lora, lora_ffn, ia3, bitfit, full and the like.",
    )
    parser.add_argument("run", type=find_run_folder, help="its folder, or the first digits of its name")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write, new or empty")
    arguments = parser.parse_args(argv)
    record = read_saved_record(arguments.run)
    require_empty(arguments.out)
    from peftbench.evaluation.finished import read_saved_run  # imports torch, which a refusal above does without
    from peftbench.evaluation.merged import write_merged

    run = read_saved_run(arguments.run, record)
    console = make_quiet_console()
    name, share, quantization = write_merged(arguments.run, run, arguments.out)
    console.print(
        f"{arguments.out}: load it with transformers' {name}.from_pretrained.", highlight=False, soft_wrap=True
    )
    if quantization is not None:
        console.print(
            f"The backbone was quantised ({quantization}): its weights are unpacked, with the values that they had "
            "packed.",
            highlight=False,
            soft_wrap=True,
        )
    if run.model.dtype is DType.bfloat16 and share:
        console.print(
            f"The weights are bfloat16: rounding changed them by {share:.1%} of what the run changed "
            "(root mean square), so that scores may differ from the run's.",
            highlight=False,
            soft_wrap=True,
        )
    return 0
