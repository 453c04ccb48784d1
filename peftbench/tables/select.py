"""Select the runs to show: those below the given folders that pass filters such as method=mam,lora, seed!=1,
device=*H200* or score>60."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peftbench.records.record import Record, find_kept_apart, load_records
from peftbench.records.wording import format_value
from peftbench.tables.fields import find_field
from peftbench.tables.groups import KEY, leave_out_whole, restrict_records
from peftbench.tables.row import is_trial
from peftbench.utils.errors import UserError, describe_unknown, warn
from peftbench.utils.files import resolve_folder

TRIALS = "trials=true"  # the word that shows trials
OR = "or"  # the word between two sets of filters
FILTER = re.compile(r"(?P<key>[\w.]+)(?P<sign>!=|>=|<=|=|>|<)(?P<values>.*)", re.DOTALL)
ORDER = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


def read_records(words: Sequence[str]) -> list[Record]:
    """Return the records below the folders among `words` (default: outputs) that pass the filters among them.

    Files that are not records are named on stderr. The trials of searches are left out unless `trials=true` is among
    the words: they would compete with the run that has the chosen values. Raises UserError if no record is left.
    """
    folders = [Path(word) for word in words if not is_filter(word)] or [Path("outputs")]
    records = load_folders(folders)
    if not records:
        others = "".join(
            f", or show those in {place}: peftbench results {place}" for place in find_kept_apart(folders[0])
        )
        raise UserError(f"{folders[0]} holds no record of a run; make one with: peftbench train{others}")
    filters = [word for word in words if is_filter(word) and word != TRIALS]
    compared = [record for record in records if TRIALS in words or not is_trial(record)]
    if hidden := len(records) - len(compared):
        trials, them = ("trial of a search is", "it") if hidden == 1 else ("trials of searches are", "them")
        warn(f"{hidden:,} {trials} left out; {TRIALS} shows {them}.")
    if not compared:
        raise UserError(f"{folders[0]} holds trials of a search and no other run yet; {TRIALS} shows them.")
    chosen = select_records(compared, filters)
    if not chosen:
        raise UserError(f"No run passes {' '.join(filters)}; peftbench results without filters shows what there is.")
    return chosen


def load_folders(folders: Iterable[Path]) -> list[Record]:
    """Return the records below some folders, each once. Files that are not records are named on stderr."""
    records: dict[str, Record] = {}
    resolved: dict[str, str] = {}
    for folder in folders:
        found, left_out = load_records(folder)
        records.update((resolve_folder(record.folder, resolved), record) for record in found)
        for sentence in left_out:
            warn(sentence)
    return list(records.values())


def is_filter(word: str) -> bool:
    """Return whether a word of the command line is a filter, or is between two of them; any other word is a folder."""
    return word == OR or FILTER.fullmatch(word) is not None


def select_records(records: Sequence[Record], filters: Sequence[str]) -> list[Record]:
    """Return the records that pass all filters KEY=VALUE,... or KEY!=VALUE,...; `*` in a value matches anything.

    KEY>NUMBER, <, >= and <= are for numbers. With `or` among the filters, the records that pass all before it or all
    after it. `group=` restricts the scores of all to some groups of their examples (tables/groups.py), before anything
    is compared. Raises UserError for a key that no record has, for a value that no record has, and where no record
    passes one of several sets of filters.
    """
    if groups := [word for word in filters if (match := FILTER.fullmatch(word)) and match["key"] == KEY]:
        if len(groups) > 1 or not groups[0].startswith(f"{KEY}="):
            raise UserError(f"{' '.join(groups)}: give {KEY}= once, as {KEY}=unseen or {KEY}=NAME,NAME.")
        wanted = groups[0].partition("=")[2].split(",")
        others = [word for word in filters if word not in groups]
        return leave_out_whole(select_records(restrict_records(records, wanted), others), wanted)
    if OR not in filters:
        return _select_all(records, filters)
    hits: set[int] = set()
    faults = []
    for some in _split_at_or(filters):
        try:
            found = _select_all(records, some)
        except UserError as error:
            faults.extend(error.faults)
            continue
        if not found:
            faults.append(f"No run passes {' '.join(some)}, between one `or` and another.")
        hits.update(map(id, found))
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return [record for record in records if id(record) in hits]


def _split_at_or(filters: Sequence[str]) -> list[list[str]]:
    sets: list[list[str]] = [[]]
    for word in filters:
        if word == OR:
            sets.append([])
        else:
            sets[-1].append(word)
    if not all(sets):
        raise UserError(f"{' '.join(filters)}: `or` is between two sets of filters, such as budget=2% or method=full.")
    return sets


def _select_all(records: Sequence[Record], filters: Sequence[str]) -> list[Record]:
    """Return the records that pass all of the filters."""
    found, faults = list(records), []
    for word in filters:
        match = FILTER.fullmatch(word)
        assert match is not None
        key, wanted = match["key"], match["values"].split(",")
        try:
            of = find_field(key, records)
        except UserError as error:
            faults.extend(error.faults)
            continue
        if holds := ORDER.get(match["sign"]):
            try:
                limit = float(match["values"])
            except ValueError:
                faults.append(f"{word}: {match['sign']} needs a number after it.")
                continue
            found = [r for r in found if isinstance(number := of(r), int | float) and holds(number, limit)]
            continue
        there = sorted({value for record in records for value in _list_texts(of(record))})
        for value in wanted:
            if not any(fnmatchcase(one, value) for one in there):
                nothing = f" {key}= selects the runs that have none." if "" in there else ""
                faults.append(describe_unknown(key, value, filter(None, there)) + nothing)
        hits = {id(r) for r in records if any(fnmatchcase(one, v) for one in _list_texts(of(r)) for v in wanted)}
        found = [record for record in found if (id(record) in hits) is (match["sign"] == "=")]
    if faults:
        raise UserError(*faults)
    return found


def _list_texts(value: Any) -> list[str]:
    """Return the names of a value: for a mixture, that of each part and that of the whole."""
    parts = [format_value(part) for part in value] if isinstance(value, list) and len(value) > 1 else []
    return [format_value(value), *parts]
