"""Runs that a search had chosen before it chose otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from peftbench.config.search import has_open_search
from peftbench.records.choice import Compared, settle_search
from peftbench.records.lock import Busy, hold_run
from peftbench.records.record import FILE, Searched, find_record
from peftbench.sweeps.plan import Member
from peftbench.utils.errors import UserError


def list_earlier(method: Path) -> list[tuple[Path, Searched]]:
    """Return the folders of a method's runs that searches had chosen, with what their records say of the search."""
    records = [find_record(file.parent) for file in sorted(method.glob(f"*/{FILE}"))]
    return [(one.folder, one.search) for one in records if one and one.search and one.search.role == "final"]


def mark_superseded(
    members: Iterable[Member], compared: Compared, list_earlier: Callable[[Path], list[tuple[Path, Searched]]]
) -> None:
    """Make trials of the runs, of any seed, that the searches of these runs had chosen before.

    A search chooses anew when it is typed with another `search.extend`, when its file has more values, or when a trial
    was trained again. Tables would show both choices as its own, of which one would have fewer values behind it.

    Args:
        list_earlier: what `list_earlier` found before the sweep's own runs were trained.
    """
    chosen: dict[Path, list[Searched]] = defaultdict(list)
    for member in members:
        if not has_open_search(member.run):
            continue
        with suppress(UserError):  # a search without a choice
            _, now = settle_search(member.run, compared)
            if now is not None and now not in chosen[member.folder.parent]:
                chosen[member.folder.parent].append(now)
    for method, notes in chosen.items():
        for folder, was in list_earlier(method):
            if _is_superseded(was, notes):
                _mark(folder, notes)


def _mark(folder: Path, notes: Iterable[Searched]) -> None:
    with suppress(Busy), hold_run(folder):  # a run that is being trained says itself what it is
        record = find_record(folder)
        if record is not None and record.search is not None and _is_superseded(record.search, notes):
            record.search = replace(record.search, role="trial", selection=None, reported=False, trials=[])
            record.save()


def _is_superseded(was: Searched, notes: Iterable[Searched]) -> bool:
    return any(_is_same_search(was, now) and was.chosen != now.chosen for now in notes)


def _is_same_search(was: Searched, now: Searched) -> bool:
    """Return whether two choices are of one search of one point: the trials of one are among those of the other."""
    if was.role != "final" or (was.name, was.seed, was.study) != (now.name, now.seed, now.study):
        return False
    own, others = ({trial.run for trial in search.trials} for search in (was, now))
    return bool(own) and (own <= others or others <= own)
