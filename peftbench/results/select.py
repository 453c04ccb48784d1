"""Which of the runs found are shown: filters such as method=mam,lora, seed!=1, device=*H200* or score>60. Imports no
torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from peftbench.errors import UserError, unknown
from peftbench.results.fields import field, text
from peftbench.results.record import Record

FILTER = re.compile(r"(?P<key>[\w.]+)(?P<sign>!=|>=|<=|=|>|<)(?P<values>.*)", re.DOTALL)
ORDER = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


def is_filter(word: str) -> bool:
    """Whether a word of the command line is a filter; any other one is a folder."""
    return FILTER.fullmatch(word) is not None


def select(records: Sequence[Record], filters: Sequence[str]) -> list[Record]:
    """The records that pass all filters KEY=VALUE,... or KEY!=VALUE,...; `*` in a value stands for anything.

    KEY>NUMBER, <, >= and <= are for numbers. Raises UserError for a key that no record has, and for a value that none
    has.
    """
    found, faults = list(records), []
    for word in filters:
        match = FILTER.fullmatch(word)
        assert match is not None
        key, wanted = match["key"], match["values"].split(",")
        try:
            of = field(key, records)
        except UserError as error:
            faults.extend(error.faults)
            continue
        if holds := ORDER.get(match["sign"]):
            try:
                limit = float(match["values"])
            except ValueError:
                faults.append(f"{word}: {match['sign']} needs a number behind it.")
                continue
            found = [r for r in found if isinstance(number := of(r), int | float) and holds(number, limit)]
            continue
        there = sorted({value for record in records for value in _texts(of(record))})
        for value in wanted:
            if not any(fnmatchcase(one, value) for one in there):
                faults.append(unknown(key, value, there))
        hits = {id(r) for r in records if any(fnmatchcase(one, v) for one in _texts(of(r)) for v in wanted)}
        found = [record for record in found if (id(record) in hits) is (match["sign"] == "=")]
    if faults:
        raise UserError(*faults)
    return found


def _texts(value: Any) -> list[str]:
    """What a value is called: a mixture by each of its parts and by all of them."""
    parts = [text(part) for part in value] if isinstance(value, list) and len(value) > 1 else []
    return [text(value), *parts]
