"""The progress of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_FOR = 15.0  # seconds between two plain lines


def is_live(console: Console) -> bool:
    """Return whether an animated display can be shown: on an interactive terminal, but not in a CI job."""
    return console.is_interactive and not os.environ.get("CI")


class Stage:
    """One bar of the display."""

    def __init__(self, name: str, total: int | None, display: Display) -> None:
        self.name, self.total, self.done, self.note = name, total, 0, ""
        self.display = display
        self.task = display.progress.add_task(name, total=total, note="")
        self.said = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """Record that `steps` more are done."""
        self.done += steps
        self.display.progress.advance(self.task, steps)
        if not self.display.live and time.monotonic() - self.said > QUIET_FOR:
            self.said = time.monotonic()
            self.display.console.print(f"{self.name}: {self.done}/{self.total} {self.note}".rstrip())

    def say(self, note: str) -> None:
        """Show a short note, such as the loss, next to the bar."""
        self.note = note
        self.display.progress.update(self.task, note=note)


class Display:
    """The progress of one run on `console`: bars on a terminal, elsewhere a line now and then.

    With `within_another` the run prints nothing, and its sweep's display shows `progress`.
    """

    def __init__(self, console: Console, within_another: bool = False) -> None:
        self.console = Console(quiet=True) if within_another else console
        self.live = within_another or is_live(console)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=within_another,
            disable=within_another or not self.live,  # no display of its own
        )

    def say(self, sentence: str) -> None:
        """Print a sentence on a line of its own."""
        self.console.print(sentence, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show a bar during the block, and print a plain line at its end."""
        began = time.monotonic()
        stage = Stage(name, total, self)
        try:
            yield stage
        finally:
            self.progress.remove_task(stage.task)
        seconds = time.monotonic() - began
        self.console.print(f"{name}: {seconds:.1f} s {stage.note}".rstrip(), highlight=False)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()


def hide_progress() -> Display:
    """Return a display that shows nothing."""
    return Display(Console(quiet=True), within_another=True)
