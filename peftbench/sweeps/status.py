"""The status of the runs of a sweep, and how long the remaining ones will take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import fmean

from peftbench.records.record import Record
from peftbench.sweeps.plan import PlannedRun
from peftbench.tables.columns import format_duration

ORDER = ("done", "diverged", "running", "interrupted", "failed", "missing")  # in which they are counted and listed


@dataclass(frozen=True)
class State:
    """One run of a sweep with its record; None if it has not begun."""

    point: PlannedRun
    record: Record | None

    @property
    def status(self) -> str:
        return "missing" if self.record is None else self.record.status

    @property
    def outcome(self) -> str:
        """`Record.outcome`, or that there is none."""
        return "missing" if self.record is None else self.record.outcome


def estimate_seconds_left(states: Sequence[State], now: datetime | None = None) -> float | None:
    """Return the seconds that the unfinished runs will take, or None while no run of the sweep is done.

    The estimate for a run is the mean of the finished runs of its method, or else of all finished runs. It is assumed
    that as many runs are trained at once as are running now.
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


def summarise_states(states: Sequence[State]) -> str:
    """Return how many runs have each status, and the time left."""
    counted = Counter(state.status for state in states)
    counts = ", ".join(f"{counted[status]} {status}" for status in ORDER if counted[status])
    presets = {state.record.debug for state in states if state.record is not None and state.record.debug}
    marked = f" (debug={', '.join(sorted(presets))})" if presets else ""
    runs = "1 run" if len(states) == 1 else f"{len(states)} runs"
    return f"{runs}{marked}: {counts}{_format_left(states)}"


def format_time(state: State) -> str:
    """Return how long a run took, or has been running."""
    if state.record is None:
        return ""
    if state.status == "running":
        passed = datetime.now(timezone.utc) - datetime.fromisoformat(state.record.created)
        return format_duration(max(0.0, passed.total_seconds()))  # the clock may have been set back
    return format_duration(state.record.timings["total_s"]) if "total_s" in state.record.timings else ""


def _format_left(states: Sequence[State]) -> str:
    if not any(state.status in ("missing", "interrupted", "running") for state in states):
        return ""
    seconds = estimate_seconds_left(states)
    return "; time left is known once a run is done" if seconds is None else f"; about {format_duration(seconds)} left"
