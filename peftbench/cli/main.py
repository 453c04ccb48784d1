"""The command line: `peftbench SUBCOMMAND ...`. A subcommand's module is imported only when it is called.

Exit codes: 0 done, also if a training diverged, which is a finding; 1 a run failed; 2 the user's input was refused;
130 interrupted, by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

from peftbench import __version__
from peftbench.utils.environment import (
    allow_warnings,
    clear_settings,
    explain_import_error,
    read_as_utf8,
    refuse_values,
    run_alone,
)
from peftbench.utils.errors import (
    LostProcess,
    UserError,
    describe_os_error,
    describe_unknown,
    is_memory_error,
    print_faults,
    warn,
)
from peftbench.utils.stopping import heed_signals

HELP = """\
peftbench: which parameter-efficient fine-tuning method, where in the network, how large, for my model and task.

  peftbench train [KEY=VALUE ...]          train one run and record it: score against trainable parameters
  peftbench train -m KEY=A,B [...]         train every combination; the same line again resumes where it stopped;
                                           jobs=4 or jobs=auto trains several at once, on all GPUs
  peftbench train -m GRID and KEY=C [...]  several grids as one sweep: each later one is the first with words changed
  peftbench status [FOLDER]                the progress of the sweeps, and the time left
  peftbench results [FOLDER] [KEY=VALUE ...] [--mean] [--rows KEY --columns KEY] [--csv|--json|--markdown|--latex]
                                           the recorded runs, best first; results --help has more
  peftbench compare A B                    is the difference of two runs more than chance; which settings differ
  peftbench advise task=T model=M [budget=B] [memory=GiB]
                                           what the records show: fronts, differences beyond chance, what is untried
  peftbench claims [FOLDER] [KEY=VALUE ...]
                                           which of the paper's claims the records confirm or contradict
  peftbench plot [FOLDER] [KEY=VALUE ...] [--out FILE]
                                           score against stored parameters, a line for each method over its sizes
  peftbench report [FOLDER] [KEY=VALUE ...] [--out FILE]
                                           one HTML file to browse the runs: table, plots, predictions
  peftbench reproduce TABLE [KEY=VALUE ...] [--dry-run]
                                           the runs of a table of the paper, its scores next to ours
  peftbench params [-m] [KEY=VALUE ...] [--json]
                                           what a run would train and store; needs no weights
  peftbench evaluate RUN [task.split=SPLIT ...]
                                           score a finished run's adapter again, on any split
  peftbench predict RUN FILE|- [--out FILE]
                                           what a finished run predicts for unlabelled inputs: a file's, or a pipe's
  peftbench rescore RUN [METRIC]           any metric of a finished run, from its predictions
  peftbench merge RUN --out FOLDER         merge a finished run's LoRA into the backbone: a plain checkpoint
  peftbench export RUN --out FOLDER        a finished run's LoRA, IA3 or prompt as an adapter for the peft library
  peftbench import FOLDER|FILE --task TASK --out RUN
                                           an adapter of peft or loralib as a finished run
  peftbench explain [RUN | KEY=VALUE ...] [--json]
                                           a method in the paper's terms, and where it is in the network
  peftbench ls [axes|keys|GROUP]           the choices of a group; the four axes and which combinations run; the
                                           meaning of every key
  peftbench env                            versions, devices, caches and extras, for a bug report
  peftbench train --help                   every group and its choices
  peftbench train [KEY=VALUE ...] --cfg job
                                           show the config and stop

Examples:
  peftbench train                                    MAM adapter on the embedded task: offline, on a CPU, in two minutes
  peftbench train method=lora functional_form=relu   a preset with one of its four axes flipped
  peftbench train -m method=full,lora,prefix,mam seed=1,2,3
  peftbench train -m method=full,lora,prefix,mam seed=1,2,3 search=lr3
                                                     the same, each with the best of three learning rates
  peftbench train -m seed=1,2 method=full and method=lora,prefix budget=3% and method=mam budget=6%
                                                     methods with their own sizes in one sweep
  peftbench train method=mam task=sst2 model.path=FOLDER task.data_dir=FOLDER
"""

# Subcommands; each is the `main` of a module.
COMMANDS = {
    "train": "cli.train",
    "status": "cli.status",
    "results": "cli.results",
    "compare": "cli.compare",
    "advise": "cli.advise",
    "claims": "cli.claims",
    "plot": "cli.plot",
    "report": "cli.report",
    "reproduce": "cli.reproduce",
    "params": "cli.params",
    "explain": "cli.explain",
    "ls": "cli.ls",
    "evaluate": "cli.evaluate",
    "predict": "cli.predict",
    "rescore": "cli.rescore",
    "merge": "cli.merge",
    "export": "cli.export",
    "import": "cli.import_adapter",
    "env": "cli.env",
}
READING = (
    "status",
    "results",
    "compare",
    "advise",
    "claims",
    "plot",
    "report",
    "ls",
    "env",
)  # need no library that computes
ALONE = ("evaluate", "predict", "merge", "export", "import", "reproduce")  # compute with a model, as one process


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code."""
    try:
        return _run(argv)
    finally:
        _flush_output()


def _flush_output() -> None:
    """Write what is buffered while it is known that a closed pipe is no error: Python would do so at its end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        from peftbench.utils.console import discard_output

        discard_output(sys.stdout)
    except OSError:  # such as a full disk, which Python tells at its end
        pass


def _run(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # ASCII and Windows code pages have no ↑, λ or Δ
    read_as_utf8()
    allow_warnings()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(HELP, end="")
            return 0
        if arguments[0] in ("-V", "--version"):
            print(f"peftbench {__version__}")
            return 0
        if arguments[0] in ("-sc", "--shell-completion"):  # Hydra's tab completion, which knows no subcommand
            return _print_completions(arguments)
        if arguments[0] not in COMMANDS:
            raise UserError(describe_unknown("subcommand", arguments[0], COMMANDS))
        with heed_signals():
            return _run_command(arguments[0], arguments[1:])
    except UserError as error:
        print_faults(error.faults)
        return 2
    except LostProcess as error:
        print_faults([str(error)])
        return 1
    except KeyboardInterrupt:
        print_faults(["interrupted; the same line goes on or begins again."])
        return 130
    except BrokenPipeError:
        from peftbench.utils.console import discard_output

        discard_output(sys.stdout)
        return 0
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        print_faults([f"The memory of this machine is not enough: {' '.join(str(error).split())[:200]}"])
        return 1
    except OSError as error:
        if (sentence := describe_os_error(error)) is None:
            raise
        print_faults([sentence])
        return 1
    except ValueError as error:
        if (sentence := explain_import_error(error)) is None:
            raise
        print_faults([sentence])
        return 2


def _run_command(command: str, argv: list[str]) -> int:
    cleared = clear_settings()
    if command not in READING:
        refuse_values()
        for name in cleared:
            warn(f"{name} in the environment is not read: a run's settings are its config's.")
    if command in ALONE:
        run_alone()  # before torch is imported; `train` finds out itself whether it is one of several processes
    code: int = import_module(f"peftbench.{COMMANDS[command]}").main(argv)
    return code


def _print_completions(argv: list[str]) -> int:
    """Complete subcommands, or after a subcommand that takes them the keys and values of `peftbench train`."""
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    typed, space, overrides = rest.partition(" ")
    if any(word.startswith("query") for word in argv) and not space:
        print(" ".join(name for name in COMMANDS if name.startswith(typed)))
        return 0
    if typed in ("train", "reproduce", "params", "evaluate", "predict", "export", "import", "explain"):
        # Hydra reads the words before the one to complete, and refuses those that are not overrides: RUN, TABLE, `and`,
        # and the pieces of a quoted override, which it splits at spaces.
        *before, last = overrides.split(" ")
        kept = [word for word in before if word in ("-m", "--multirun") or ("=" in word and not set(word) & set("'\""))]
        os.environ["COMP_LINE"] = " ".join([program, *kept, last])
    elif typed:
        return 0
    return _run_command("train", argv)
