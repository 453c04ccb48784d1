"""The console of a run, without the output of libraries."""

from __future__ import annotations

import logging

import datasets
from rich.console import Console
from transformers.utils import logging as transformers_logging

from peftbench.utils.console import make_console


def silence_libraries() -> None:
    """Switch off the libraries' own progress bars and hints."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at every product of int8 that it reads float16


def make_quiet_console(stderr: bool = False) -> Console:
    """Return a console, and silence the libraries."""
    silence_libraries()
    return make_console(stderr)
