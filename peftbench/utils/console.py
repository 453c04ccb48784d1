"""The console that all that is not an error is printed on."""

from __future__ import annotations

import os
import sys
from typing import IO

from rich.console import Console


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process, amid a run."""
        let_go(self.file)


def terminal(stderr: bool = False) -> Console:
    """A console that shows what a user typed as it stands: to rich's markup the [prefix] of mix=[prefix] is a style."""
    return _Terminal(stderr=stderr, markup=False, emoji=False)


def say(line: str) -> None:
    """Print a line, however long, at once."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        let_go(sys.stdout)


def let_go(file: IO[str]) -> None:
    """The reader of our output, such as head, has seen enough: the rest goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
