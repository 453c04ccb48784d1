"""The console that all that is not an error is printed on."""

from __future__ import annotations

from rich.console import Console


def terminal(stderr: bool = False) -> Console:
    """A console that shows what a user typed as it stands: to rich's markup the [prefix] of mix=[prefix] is a style."""
    return Console(stderr=stderr, markup=False, emoji=False)
