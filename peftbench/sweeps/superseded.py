"""Runs that a search had chosen before it chose otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from peftbench.config.search import has_open_search
from peftbench.records.choice import Compared, settle_search
from peftbench.records.lock import Busy, hold_run
from peftbench.records.record import FILE, Searched, find_record
from peftbench.sweeps.plan import Member
from peftbench.utils.errors import UserError


def mark_superseded(members: Iterable[Member], compared: Compared) -> None:
    """Make trials of the runs, of any seed, that the searches of these runs had chosen before.

    A search chooses anew when it is typed with another `search.extend`, when its file has more values, or when a trial
    was trained again. Tables would show both choices as its own, of which one would have fewer values behind it.
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
        for file in sorted(method.glob(f"*/{FILE}")):
            _mark(file.parent, notes)


def _mark(folder: Path, notes: Iterable[Searched]) -> None:
    if not _is_superseded(folder, notes):
        return
    with suppress(Busy), hold_run(folder):  # a run that is being trained says itself what it is
        record = find_record(folder)
        if record is not None and record.search is not None and _is_superseded(folder, notes):
            record.search = replace(record.search, role="trial", selection=None, reported=False, trials=[])
            record.save()


def _is_superseded(folder: Path, notes: Iterable[Searched]) -> bool:
    record = find_record(folder)
    was = None if record is None else record.search
    return was is not None and any(_is_same_search(was, now) and was.chosen != now.chosen for now in notes)


def _is_same_search(was: Searched, now: Searched) -> bool:
    """Return whether two choices are of one search of one point: the trials of one are among those of the other."""
    if was.role != "final" or (was.name, was.seed, was.study) != (now.name, now.seed, now.study):
        return False
    own, others = ({trial.run for trial in search.trials} for search in (was, now))
    return bool(own) and (own <= others or others <= own)
