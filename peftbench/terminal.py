"""The console that all that is not an error is printed on."""

from __future__ import annotations

from rich.console import Console


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """The reader, such as head, has seen enough. rich would end with exit code 1; cli.py ends with 0."""
        raise BrokenPipeError


def terminal(stderr: bool = False) -> Console:
    """A console that shows what a user typed as it stands: to rich's markup the [prefix] of mix=[prefix] is a style."""
    return _Terminal(stderr=stderr, markup=False, emoji=False)
