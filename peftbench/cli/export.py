"""`peftbench export RUN --out FOLDER`: write a finished run as an adapter that the peft library loads."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from peftbench.config.unread import EXPORT
from peftbench.records.saved import find_run_folder, read_saved_record
from peftbench.utils.console import say
from peftbench.utils.errors import UserError
from peftbench.utils.files import require_empty
from peftbench.utils.quiet import silence_libraries


def main(argv: list[str]) -> int:
    """Write the folder and return the exit code.

    Raises:
        UserError: there is no finished run, it has no form in the format, FOLDER is not empty, or the hub refuses.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench export",
        description="Write a finished run as a folder for peft's PeftModel.from_pretrained: adapter_config.json, the "
        "tensors with the task head, and a model card with the record's figures. If peft is installed, the folder is "
        "loaded with it, and the largest difference of the logits is shown.",
        epilog="LoRA at any projections, IA3, and prompts on T5 and on decoders with rotary positions have an equal "
        "form in peft. peftbench merge writes whole models.",
    )
    parser.add_argument("run", type=find_run_folder, help="its folder, or the first digits of its name")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write, new or empty")
    parser.add_argument("--format", choices=["peft"], default="peft", help="default: %(default)s")
    parser.add_argument("--no-check", action="store_true", help="do not load the folder with peft to compare logits")
    parser.add_argument("--push", metavar="OWNER/NAME", help="then upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that only OWNER can see")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as model.path=FOLDER")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.private and arguments.push is None:
        raise UserError("--private needs --push OWNER/NAME, the repository that it hides.")
    record = read_saved_record(arguments.run)
    require_empty(arguments.out)
    from peftbench.evaluation.finished import read_saved_run  # imports torch, which a refusal above does without
    from peftbench.exchange.export import export_run, push_folder
    from peftbench.exchange.peft_form import describe_targets

    run = read_saved_run(arguments.run, record, arguments.overrides, EXPORT)
    silence_libraries()
    exported = export_run(arguments.run, run, record, arguments.out, check=not arguments.no_check)
    config = exported.adapter.config

    size = f" of rank {config['r']}" if "r" in config else ""
    say(f"{arguments.out}: {config['peft_type']}{size} at {describe_targets(config)}")
    for note in exported.adapter.notes:
        say(note)
    if exported.difference is not None:
        say(
            f"Loaded with peft, its logits differ from the run's by at most {exported.difference:.3g}; the largest is "
            f"{exported.largest:.3g}."
        )
    elif find_spec("peft") is None:
        say("It was not compared with peft, which is not installed: pip install peft.")
    if arguments.push is not None:
        say(f"Uploaded to {push_folder(arguments.out, arguments.push, private=arguments.private)}.")
    return 0
