"""The order in which the runs of a sweep are trained: what is next, as runs end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from peftbench.config.search import has_open_search
from peftbench.sweeps.left import Left
from peftbench.sweeps.plan import Member, Sweep
from peftbench.sweeps.superseded import list_earlier, mark_superseded


class _Search:
    """A search that is not settled: the runs that wait for its choice, and its trials."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.open = set[Member]()  # trials that have not ended
        self.tried = set[Member]()  # trials of further values


class Queue:
    """The runs of a sweep that are yet to be trained.

    First come the trials of its searches, then the trials of further values (`search.extend`) as they come due, then
    the sweep's own runs. A search is settled when the last of its trials has ended, and its runs can be taken from then
    on. Two runs with one folder are never trained at once, and those that another process is at come last.

    Args:
        find_left: what is left to do for a run, once it can be taken.
    """

    def __init__(self, sweep: Sweep, find_left: Callable[[Member], Left]) -> None:
        self.sweep, self.find_left = sweep, find_left
        self.trials, self.further, self.own = list[Member](), list[Member](), list[Member]()  # that can be taken
        self.noting: list[Member] = []  # of which nothing must be computed
        self.busy: list[Member] = []  # which another process is at
        self.awaited: set[Member] = set()  # of these, those that were taken to wait for the other process
        self.taken: dict[Path, Member] = {}  # that have not ended
        self._place = {member: number for number, member in enumerate(sweep.members)}
        self._list_earlier = cache(list_earlier)
        self._is_plan_old = False
        self._waiting: dict[Member, list[_Search]] = defaultdict(list)  # for a trial
        searches = self._open_searches()
        self._unsettled = set(searches)
        for search in searches:
            if not search.open:
                self._settle(search)
        self._add(self.trials, sweep.trials)
        self._add(self.own, (member for member in sweep.members if not has_open_search(member.run)))
        self.own.sort(key=self._place.__getitem__)

    def count(self) -> int:
        """Return the number of runs that are being trained or yet to be, as far as that is known."""
        lines = (self.trials, self.further, self.own, self.busy, self.taken)
        return sum(map(len, lines)) + sum(len(search.members) for search in self._unsettled)

    def take(self) -> Member | None:
        """Return the run that is to be trained next; None while there is none. More may come when one has ended."""
        if self._is_plan_old:
            self.sweep.write_plan()
            self._is_plan_old = False
        lines = [self.trials, self.further, self.own]
        if self.awaited.issuperset(self.taken.values()):
            lines.append(self.busy)
        for line in lines:
            for member in line:
                if member.folder not in self.taken:
                    line.remove(member)
                    self.taken[member.folder] = member
                    if line is self.busy:
                        self.awaited.add(member)
                    return member
        return None

    def end(self, member: Member, busy: bool = False) -> None:
        """Take it that a run has ended, however it did, or needs no training; or put it back where it is `busy`: where
        another process is at it."""
        if self.taken.get(member.folder) is member:
            del self.taken[member.folder]
        if busy:
            self.busy.append(member)
            return
        for search in self._waiting.pop(member, ()):
            search.open.remove(member)
            if not search.open:
                self._settle(search)

    def _open_searches(self) -> list[_Search]:
        """Return the searches of the sweep, each of which waits for its trials."""
        found: dict[str, _Search] = {}
        trials: dict[Path, list[Member]] = defaultdict(list)
        for trial in self.sweep.trials:
            trials[trial.folder].append(trial)
        for member in self.sweep.members:
            if has_open_search(member.run):
                found.setdefault(self.sweep.compared.identify(member.run), _Search([])).members.append(member)
        for search in found.values():
            folders = dict.fromkeys(self.sweep.compared.locate_trials(search.members[0].run))
            self._wait(search, [trial for folder in folders for trial in trials[folder]])
        return list(found.values())

    def _wait(self, search: _Search, trials: Iterable[Member]) -> None:
        for trial in trials:
            search.open.add(trial)
            self._waiting[trial].append(search)

    def _settle(self, search: _Search) -> None:
        """Let the runs of a search be taken, or trials of further values if its trials call for them."""
        self.sweep.settle_members(search.members)
        self._is_plan_old = True
        first = search.members[0]
        due = [trial for trial in self.sweep.list_further(first) if trial not in search.tried]
        if first.run.rerun:  # the records that call for later values are out of date
            due = due[:1]
        search.tried.update(due)
        self._wait(search, due)
        if due:
            self._add(self.further, due)
            return
        self._unsettled.remove(search)
        mark_superseded(search.members, self.sweep.compared, self._list_earlier)
        self._add(self.own, search.members)
        self.own.sort(key=self._place.__getitem__)

    def _add(self, line: list[Member], members: Iterable[Member]) -> None:
        """Let runs be taken, as far as they must be trained."""
        for member in members:
            left = self.find_left(member)
            if left is Left.training:
                line.append(member)
            elif left is Left.noting:
                self.noting.append(member)
            else:
                self.end(member)
