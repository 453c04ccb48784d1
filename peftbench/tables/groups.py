"""Restrict scores to groups of the examples, such as the domains of which no training example is: `group=unseen`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from fnmatch import fnmatchcase

import numpy as np

from peftbench.records.record import Record, Score
from peftbench.tables.examples import Restricted, has_examples, read_examples, read_groups
from peftbench.tables.row import is_trial
from peftbench.utils.errors import UserError, describe_unknown, warn
from peftbench.utils.text import format_count

KEY = "group"
SEEN, UNSEEN = "seen", "unseen"  # in the training examples, or not


def restrict_records(records: Sequence[Record], wanted: Sequence[str]) -> list[Record]:
    """Return the records, of which each that can be is a copy whose score, and whose examples, are those of some groups
    alone. Its baselines and further splits are left out, since nobody knows what they are there.

    Args:
        wanted: names of groups, in which `*` matches anything, or `seen` and `unseen`.

    Raises:
        UserError: no run has such a group.
    """
    groups = {id(one): _find_groups(one) for one in records if one.score is not None}
    there = {group for found in groups.values() for group in found}
    for name in wanted if there else ():
        if name not in (SEEN, UNSEEN) and not any(fnmatchcase(group, name) for group in there):
            raise UserError(describe_unknown(KEY, name, sorted({*there, SEEN, UNSEEN})))
    return [_restrict(one, groups.get(id(one), []), wanted) for one in records]


def leave_out_whole(records: Sequence[Record], wanted: Sequence[str]) -> list[Record]:
    """Return the records without the runs whose score is still that of all examples, and say how many these are. A
    trial of a search stays, without its score: what it counts for is its score on the selection split.

    Raises:
        UserError: no score is left.
    """
    whole = [one for one in records if _is_whole(one) and not is_trial(one)]
    word = f"{KEY}={','.join(wanted)}"
    if any(map(_is_whole, records)) and not any(one.restricted for one in records):
        raise UserError(
            f"{word}: no run knows which of its examples are of that kind; train with task.group_column=COLUMN."
        )
    if whole:
        left_out = format_count(len(whole), "run")
        warn(f"{word} leaves out {left_out} of which it is not known which examples are of that kind.")
    known = [one for one in records if is_trial(one) or not _is_whole(one)]
    return [_forget_score(one) if _is_whole(one) else one for one in known]


def _forget_score(trial: Record) -> Record:
    """Return a trial without what it reports."""
    forgotten = copy(trial)
    forgotten.score, forgotten.baselines, forgotten.cut_off = None, {}, {}
    forgotten.scores = {role: score for role, score in trial.scores.items() if role == "selection"}
    return forgotten


def _is_whole(record: Record) -> bool:
    """Return whether the score of a record is still that of all examples."""
    return record.score is not None and record.restricted is None


def _find_groups(record: Record) -> list[str]:
    """Return the group of each reported example of a run; none if they are not known."""
    return read_groups(record) if "groups" in record.data and has_examples(record) else []


def _restrict(record: Record, groups: Sequence[str], wanted: Sequence[str]) -> Record:
    """Return the record of a run with the score of the wanted groups; as it is, if it knows of no example of them.

    Args:
        groups: that of each reported example.
    """
    seen = record.data["groups"]["seen"] if groups else None
    if seen is None and {SEEN, UNSEEN} & {*wanted}:
        return record
    is_chosen = {group: _is_wanted(group, seen or (), wanted) for group in set(groups)}
    chosen = np.array([is_chosen[group] for group in groups])
    if not chosen.any():
        return record
    kept = {name: one._replace(rows=one.rows[chosen], library=None) for name, one in read_examples(record).items()}
    metrics = {name: one.score_all() for name, one in kept.items()}
    split = f"{', '.join(wanted)} {record.scores['report'].split}"
    restricted = copy(record)
    restricted.restricted, restricted.score = Restricted(chosen.tolist(), kept), metrics[record.metric]
    restricted.scores = {"report": Score(split, int(chosen.sum()), metrics)}
    restricted.baselines, restricted.cut_off = {}, {}
    return restricted


def _is_wanted(group: str, seen: Sequence[str], wanted: Sequence[str]) -> bool:
    of_kind = SEEN if group in seen else UNSEEN
    return any(of_kind == name if name in (SEEN, UNSEEN) else fnmatchcase(group, name) for name in wanted)
