"""`peftbench merge RUN --out FOLDER`: a finished run as a checkpoint that plain transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftbench.backbone import load_config, meta_backbone
from peftbench.config import DType, Run, module_name
from peftbench.errors import UserError
from peftbench.modification.attach import attach_run
from peftbench.modification.merge import merge, obstacles
from peftbench.scoring.evaluate import restored, saved_run
from peftbench.scoring.saved import run_folder, saved_record
from peftbench.train import quiet_console


def main(argv: list[str]) -> int:
    """Writes the folder and returns the exit code.

    Raises:
        UserError: there is no finished run, its method has no merged form, or FOLDER holds something.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench merge",
        description="Write the backbone with what a finished run has trained inside its weights: a folder for "
        "transformers' from_pretrained, with the tokenizer, that needs no peftbench.",
        epilog="Methods that are affine have such a form: lora, lora_ffn, ia3, bitfit, full and the like.",
    )
    parser.add_argument("run", type=run_folder, help="its folder, or the first digits of its name")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write, new or empty")
    arguments = parser.parse_args(argv)
    run = saved_run(arguments.run, saved_record(arguments.run))
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise UserError(f"--out {arguments.out} is there already; give a folder that is new or empty.")
    console = quiet_console()
    name, share = write_merged(arguments.run, run, arguments.out)
    console.print(
        f"{arguments.out}: load it with transformers' {name}.from_pretrained.", highlight=False, soft_wrap=True
    )
    if run.model.dtype is DType.bfloat16 and share:
        console.print(
            f"The weights are bfloat16: rounding them moved them by {share:.1%} of what the run changed "
            "(root of the mean square), so that scores may differ from the run's.",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def write_merged(folder: Path, run: Run, out: Path) -> tuple[str, float]:
    """Write the merged model of the run in `folder`, with its tokenizer, to `out`.

    Returns:
        The name of the model's class, and the share of the change that rounding took (`modification.merge`).

    Raises:
        UserError: the method has no merged form, which is found before weights are read.
    """
    bare = meta_backbone(run.model, run.task, load_config(run.model))
    plain = list(bare.state_dict())
    attach_run(bare, run)
    if found := obstacles(bare):
        why = "; ".join(found[n] if n == module_name("") else f"mix.{n}: {found[n]}" for n in sorted(found))
        raise UserError(f"method={run.method} cannot be merged into the backbone's weights: {why}.")
    backbone = restored(folder, run, run.task)
    share = merge(backbone.model)
    tensors = backbone.model.state_dict()
    backbone.model.save_pretrained(out, state_dict={name: tensors[name] for name in plain})
    backbone.tokenizer.save_pretrained(out)
    return type(backbone.model).__name__, share
