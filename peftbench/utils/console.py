"""The console for all output that is not an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from peftbench.utils.text import strip_controls


class _Terminal(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is printed. What commands the terminal comes from rich's styles, never from a text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=strip_controls(segment.text))

    def on_broken_pipe(self) -> None:
        """Do nothing: rich would end the process in the middle of a run."""
        discard_output(self.file)


def make_console(stderr: bool = False) -> Console:
    """Return a console that prints a user's text literally: rich's markup would take the [prefix] of mix=[prefix] for a
    style."""
    return _Terminal(stderr=stderr, markup=False, emoji=False, _environ=_list_known_sizes())


def _list_known_sizes() -> dict[str, str]:
    """Return the environment without a size of 0, which means that nobody knows it: rich would print nothing at all."""
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES") or value.strip("0")}


def say(line: str) -> None:
    """Print a line, or lines, of any length, at once."""
    try:
        print(strip_controls(line), flush=True)
    except BrokenPipeError:
        discard_output(sys.stdout)


def discard_output(file: IO[str]) -> None:
    """Discard all further output: its reader, such as head, has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
