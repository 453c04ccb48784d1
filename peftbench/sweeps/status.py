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
from peftbench.utils.text import format_count

# In which they are counted and listed. unscored: a trial that was chosen, and whose report split is yet to be scored.
ORDER = ("done", "trained", "diverged", "running", "interrupted", "unscored", "failed", "missing")
LEFT = ("running", "interrupted", "unscored", "missing")


@dataclass(frozen=True)
class State:
    """One run of a sweep with its record; None if it has not begun."""

    point: PlannedRun
    record: Record | None

    @property
    def status(self) -> str:
        if self.record is None:
            return "missing"
        if self.record.unreported and self.point.unreported:  # whatever came of it when it was to be scored
            return "trained"
        return "unscored" if self.record.status == "trained" else self.record.status

    @property
    def outcome(self) -> str:
        """The status, with what `Record.outcome` adds to it."""
        if self.record is None or self.status != self.record.status:
            return self.status
        return self.record.outcome


def estimate_seconds_left(states: Sequence[State], now: datetime | None = None) -> float | None:
    """Return the seconds that the unfinished runs will take, or None while no run of the sweep is done.

    The estimate for a run is the mean of the finished runs of its method, or else of all finished runs; trials and the
    runs that a search has chosen count apart, as far as there are both. A run that will go on from the trial that its
    search chooses takes what such a run takes longer than a trial. It is assumed that as many runs are trained at once
    as are running now.
    """
    now = now or datetime.now(timezone.utc)
    took: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for state in states:
        if state.record is not None and state.status in ("done", "trained") and "total_s" in state.record.timings:
            for key in _list_alike(state):
                took[key].append(state.record.timings["total_s"])
    if not took:
        return None
    left = []
    for state in states:
        if state.status in LEFT:
            expected = fmean(next(took[key] for key in _list_alike(state) if key in took))
            if state.record is not None and state.status == "running":
                expected -= (now - datetime.fromisoformat(state.record.created)).total_seconds()
            if state.record is None and state.point.follows_trial:
                expected -= fmean(took.get((state.point.method, True), [0.0]))
            if state.record is not None and state.status == "unscored":
                expected -= state.record.timings.get("total_s", 0.0)
            left.append(max(0.0, expected))
    at_once = max(1, sum(state.status == "running" for state in states))
    return max(sum(left) / at_once, max(left, default=0.0))


def _list_alike(state: State) -> list[tuple[object, ...]]:
    """Return the kinds of runs by whose times that of a run is estimated, the most similar kind first."""
    return [(state.point.method, state.point.unreported), (state.point.method,), ()]


def summarise_states(states: Sequence[State]) -> str:
    """Return how many runs have each status, and the time left."""
    counted = Counter(state.status for state in states)
    counts = ", ".join(f"{counted[status]} {status}" for status in ORDER if counted[status])
    presets = {state.record.debug for state in states if state.record is not None and state.record.debug}
    marked = f" (debug={', '.join(sorted(presets))})" if presets else ""
    return f"{format_count(len(states), 'run')}{marked}: {counts}{_format_left(states)}"


def format_time(state: State) -> str:
    """Return how long a run took, or has been running."""
    if state.record is None:
        return ""
    if state.status == "running":
        passed = datetime.now(timezone.utc) - datetime.fromisoformat(state.record.created)
        return format_duration(max(0.0, passed.total_seconds()))  # the clock may have been set back
    return format_duration(state.record.timings["total_s"]) if "total_s" in state.record.timings else ""


def _format_left(states: Sequence[State]) -> str:
    if not any(state.status in LEFT for state in states):
        return ""
    seconds = estimate_seconds_left(states)
    return "; time left is known once a run is done" if seconds is None else f"; about {format_duration(seconds)} left"
