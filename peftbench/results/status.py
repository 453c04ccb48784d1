"""`peftbench status`: how far the sweeps below a folder have come, and how long they still take. Imports no torch."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.errors import UserError
from peftbench.results.columns import duration
from peftbench.results.record import Record, find
from peftbench.results.sweep import FOLDER, SUFFIX, Plan, Point
from peftbench.terminal import terminal

ORDER = ("done", "diverged", "running", "interrupted", "failed", "missing")  # in which they are counted and listed


@dataclass(frozen=True)
class State:
    """One run of a sweep and what has become of it; no record: it has not begun."""

    point: Point
    record: Record | None

    @property
    def status(self) -> str:
        return "missing" if self.record is None else self.record.status

    @property
    def outcome(self) -> str:
        """`Record.outcome`, or that there is none."""
        return "missing" if self.record is None else self.record.outcome


def main(argv: list[str]) -> int:
    """Prints the sweeps, the latest last; returns 1 if a run of one failed, else 0. Raises UserError without any."""
    parser = argparse.ArgumentParser(
        prog="peftbench status", description="Show how far the sweeps have come: done, running, failed, time left."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="default: %(default)s")
    parser.add_argument("--all", action="store_true", help="list the runs that are done too")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object for each sweep")
    arguments = parser.parse_args(argv)

    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is not a folder; give the output_dir of a sweep.")
    files = sorted(arguments.folder.rglob(f"{FOLDER}/*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
    sweeps: list[tuple[Plan, list[State]]] = []
    for file in files:
        try:
            plan = Plan.load(file)
        except (OSError, ValueError) as error:
            print(f"{file} is left out: {error}.", file=sys.stderr)
            continue
        sweeps.append((plan, [State(point, find(file.parent.parent / point.folder)) for point in plan.points]))
    if not sweeps:
        raise UserError(f"{arguments.folder} holds no sweep; make one with: peftbench train -m KEY=A,B")
    if arguments.json:
        print(json.dumps([_as_json(plan, states) for plan, states in sweeps], indent=2))
    else:
        console = terminal()
        for index, (plan, states) in enumerate(sweeps):
            if index:
                console.print()
            _show(plan, states, console, arguments.all)
    return int(any(state.status == "failed" for _, states in sweeps for state in states))


def seconds_left(states: Sequence[State], now: datetime | None = None) -> float | None:
    """How long the runs that have not ended still take, or None as long as no run of the sweep is done.

    A run takes as long as those of its method that are done, or as all that are. As many runs go on at once as run now.
    """
    now = now or datetime.now(timezone.utc)
    took: dict[str | None, list[float]] = defaultdict(list)
    for state in states:
        if state.record is not None and state.status == "done":
            for key in (state.point.method, None):
                took[key].append(state.record.timings["total_s"])
    if not took:
        return None
    left = []
    for state in states:
        if state.status in ("missing", "interrupted", "running"):
            expected = fmean(took.get(state.point.method) or took[None])
            if state.record is not None and state.status == "running":
                expected -= (now - datetime.fromisoformat(state.record.created)).total_seconds()
            left.append(max(0.0, expected))
    at_once = max(1, sum(state.status == "running" for state in states))
    return max(sum(left) / at_once, max(left, default=0.0))


def summary(states: Sequence[State]) -> str:
    """How many runs stand how, and the time left."""
    counted = Counter(state.status for state in states)
    counts = ", ".join(f"{counted[status]} {status}" for status in ORDER if counted[status])
    return f"{len(states)} runs: {counts}{_left(states)}"


def time_of(state: State) -> str:
    """How long a run took, or has been running."""
    if state.record is None:
        return ""
    if state.status == "running":
        return duration((datetime.now(timezone.utc) - datetime.fromisoformat(state.record.created)).total_seconds())
    return duration(state.record.timings["total_s"]) if "total_s" in state.record.timings else ""


def _show(plan: Plan, states: Sequence[State], console: Console, everything: bool) -> None:
    console.print(f"peftbench train {shlex.join(plan.arguments)}", style="dim", soft_wrap=True, highlight=False)
    console.print(summary(states), highlight=False)
    listed = [state for state in states if everything or state.status != "done"]
    if not listed:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    keys = list(dict.fromkeys(key for state in listed for key in state.point.settings))
    for key in keys:
        table.add_column(key.replace(".", ".\n"), overflow="fold")
    for name in ("status", "time", "run"):
        table.add_column(name, overflow="fold", justify="right" if name == "time" else "left")
    for state in sorted(listed, key=lambda state: ORDER.index(state.status)):
        settings = (str(state.point.settings.get(key, "")) for key in keys)
        table.add_row(*settings, state.outcome, time_of(state), state.point.folder.rpartition("/")[2])
    console.print(table)


def _left(states: Sequence[State]) -> str:
    if not any(state.status in ("missing", "interrupted", "running") for state in states):
        return ""
    seconds = seconds_left(states)
    return "; time left is known once a run is done" if seconds is None else f"; about {duration(seconds)} left"


def _as_json(plan: Plan, states: Sequence[State]) -> dict[str, Any]:
    counted = Counter(state.status for state in states)
    return {
        "arguments": plan.arguments,
        "counts": {status: counted[status] for status in ORDER},
        "seconds_left": seconds_left(states),
        "runs": [
            {"folder": state.point.folder, "settings": state.point.settings, "status": state.outcome}
            for state in states
        ],
    }
