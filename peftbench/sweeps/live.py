"""The live table of a sweep on a terminal: its runs so far, and the time left.

All facts come from the records on disk, so it does not matter which process trains a run.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from peftbench.records.record import FILE, Record, find_record
from peftbench.records.run_files import METRICS_FILE
from peftbench.sweeps.plan import Sweep
from peftbench.sweeps.status import State, format_time, summarise_states
from peftbench.tables.row import is_scored
from peftbench.utils.files import parse_json

READ_EVERY = 1.0  # seconds
MOST = 0.1  # the share of the time that is spent on reading: 10,000 records on a shared file system take seconds
AROUND = 8  # lines that are no runs: heading, head of the table with its rule, what is left out, bars, the prompt
STYLES = {"running": "bold", "failed": "bold red", "diverged": "bold magenta", "interrupted": "yellow"}
TAIL = 4096  # bytes that hold the last line of metrics.jsonl


class LiveSweep:
    """The display. During the block it stays below everything else that is printed; at the end it disappears.

    Args:
        below: what is shown under the table, such as the bars of the run that this process is at.
    """

    def __init__(self, sweep: Sweep, console: Console, below: RenderableType = "") -> None:
        self.sweep, self.below = sweep, below
        self.known: dict[Path, tuple[int, Record]] = {}
        self.took = 0.0  # the last reading, in seconds
        self.read_at, self.states, self.drawn, self.width = -READ_EVERY, list[State](), list[list[Segment]](), 0
        # what goes to a file must not come to the screen instead
        self.live = Live(self, console=console, transient=True, redirect_stderr=sys.stderr.isatty())

    def __enter__(self) -> LiveSweep:
        self.live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The bars move with every picture, the table once a second, or less often if reading takes that long.
        if time.monotonic() - self.read_at >= max(READ_EVERY, self.took / MOST) or options.max_width != self.width:
            began = time.monotonic()
            self.states = self._read()
            self.took = time.monotonic() - began
            self.drawn = console.render_lines(_Picture(self.states, self.sweep, console.height), options, pad=False)
            self.read_at, self.width = time.monotonic(), options.max_width
        for line in self.drawn:
            yield from line
            yield Segment.line()
        yield self.below

    def _read(self) -> list[State]:
        return [State(point, self._find(self.sweep.root / point.folder)) for point in self.sweep.plan.points]

    def _find(self, folder: Path) -> Record | None:
        """The record of a run, read again where its file has changed or the run may still end."""
        try:
            changed = (folder / FILE).stat().st_mtime_ns
        except OSError:
            return None
        if self.known.get(folder, (0,))[0] != changed:
            record = find_record(folder)
            if record is None or record.status == "running":
                return record
            self.known[folder] = (changed, record)
        return self.known[folder][1]


class _Picture:
    """The heading and the table of a sweep's runs as they stood at one moment."""

    def __init__(self, states: Sequence[State], sweep: Sweep, height: int) -> None:
        self.states, self.sweep, self.height = states, sweep, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        begun = [state for state in self.states if state.record is not None]
        shown = choose_most_relevant(begun, max(1, self.height - AROUND))
        yield Text(summarise_states(self.states), "bold", no_wrap=True, overflow="ellipsis")
        if not shown:
            return
        yield self._table(shown)
        left_out = Counter(state.status for state in begun if state not in shown)
        if left_out:
            counts = ", ".join(f"{number} {status}" for status, number in left_out.items())
            yield Text(f"not shown: {counts}", "dim", no_wrap=True, overflow="ellipsis")

    def _table(self, shown: Sequence[State]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        keys = list(dict.fromkeys(key for state in self.states for key in state.point.settings)) or ["method"]
        metrics = {state.record.metric for state in self.states if state.record is not None}
        for key in keys:
            table.add_column(Text(key, no_wrap=True, overflow="ellipsis"))
        table.add_column("status", no_wrap=True, min_width=len("running 100%"))
        table.add_column(f"{metrics.pop()} ↑" if len(metrics) == 1 else "score", no_wrap=True, justify="right")
        table.add_column("time", no_wrap=True, justify="right")
        for state in shown:
            settings = {"method": state.point.method, **state.point.settings}
            status = self._status(state)
            style = STYLES.get(state.status, "")
            # one line each, however long a value is
            cells = [Text(str(settings.get(key, "")), no_wrap=True, overflow="ellipsis") for key in keys]
            table.add_row(*cells, Text(status, style), _format_score(state, len(metrics) > 1), format_time(state))
        return table

    def _status(self, state: State) -> str:
        assert state.record is not None
        if state.status == "running":
            return f"running {read_progress(state.record)}".rstrip()
        earlier = state.status == "done" and self.sweep.was_done_before(state.record.folder)
        return "done before" if earlier else state.outcome


def choose_most_relevant(states: Sequence[State], room: int) -> list[State]:
    """As many of the runs as there is room for, in their order: those that run, then those that ended last."""

    def place(state: State) -> tuple[bool, str]:
        assert state.record is not None
        return (state.status == "running", state.record.finished or state.record.created)

    chosen = sorted(states, key=place, reverse=True)[:room]
    return [state for state in states if state in chosen]


def read_progress(record: Record) -> str:
    """How far a run has come by the last line of its `metrics.jsonl`, such as "45%"; nothing where that is unknown."""
    last = _read_last_line(record.folder / METRICS_FILE)
    total, key = record.trainer.get("max_steps"), "step"
    if total is None:
        total, key = record.trainer.get("epochs"), "epoch"
    if not total or not isinstance(last.get(key), int | float):
        return ""
    # a second training, of the head alone, begins anew
    of = "" if last.get("stage") == f"train {record.method}" else f" of {str(last.get('stage')).removeprefix('train ')}"
    return f"{min(1.0, last[key] / total):.0%}{of}"


def _read_last_line(file: Path) -> dict[str, Any]:
    with suppress(OSError), file.open("rb") as lines:
        lines.seek(-min(TAIL, lines.seek(0, os.SEEK_END)), os.SEEK_END)
        for line in reversed(lines.read().splitlines()):
            with suppress(ValueError):  # the line may be half written
                values = parse_json(line)
                if isinstance(values, dict):
                    return values
    return {}


def _format_score(state: State, named: bool) -> str:
    record = state.record
    if record is None or record.score is None or not is_scored(record):
        return ""
    return f"{record.metric} {record.score:.2f}" if named else f"{record.score:.2f}"
