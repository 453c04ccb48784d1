"""What the records at hand say about which method to take: fronts, differences that are more than chance, gaps.

Only runs that were scored on the same examples and trained alike are compared. Nothing is claimed that no record shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind

from peftbench.config.budget import parse_budget
from peftbench.config.overrides import get_key
from peftbench.config.schema import find_conf_dir, index_by_key
from peftbench.records.record import Record
from peftbench.tables.comparison import compare_rows
from peftbench.tables.examples import has_examples
from peftbench.tables.fields import FIELDS
from peftbench.tables.row import Row, find_front, group_seeds, identify_data, is_scored, split_tables
from peftbench.utils.errors import UserError, describe_unknown

COSTS = ("stored", "memory", "time")
SEEDS = 3  # fewer say little of other seeds
LEVEL = 0.05
# Typed words that are of one run: a run that a search chose may have been trained as one of its trials.
OF_ONE_RUN = ("seed", "jobs", "search.seed", "search.trial", "search.further")
# How long, on how much and in which batches a run was trained: rows that differ in these are not compared.
ALIKE = ("epochs", "max_steps", "batch_size", "batch_tokens", "accumulation")


@dataclass(frozen=True)
class Contrast:
    """The best row against another one, and how likely chance alone makes such a difference."""

    other: Row
    difference: float  # best minus other, in points of the score
    p: float | None  # corrected for the number of contrasts (Holm); None: no row has two seeds, or predictions
    by: str  # what was drawn: "examples and seeds", "examples" or "seeds"


@dataclass(frozen=True)
class Advice:
    """What `peftbench advise` says."""

    rows: list[Row]  # that are compared, best first
    fronts: dict[str, list[Row]]  # by cost: the rows that none beats in score and cost
    contrasts: list[Contrast]  # of the best row with the others of the fronts
    beyond: int  # rows above the limits
    apart: int  # rows that were trained or scored otherwise, which are not compared
    untried: list[str]  # methods of our own without a record
    thin: list[Row]  # rows of the fronts with fewer seeds than `SEEDS`


def advise(records: Sequence[Record], budget: str | None, memory: float | None) -> Advice:
    """Return the advice of records of one task and model.

    Args:
        budget: the most parameters that may be stored, as `budget=` takes it.
        memory: the most GiB that a training may take.

    Raises:
        UserError: no record has a score, or none is within the limits.
    """
    rows = [row for row in group_seeds([record for record in records if is_scored(record)], "mean") if row.scored]
    if not rows:
        raise UserError("No record has a score: nothing can be claimed.")
    compared = max(group_alike(rows), key=len)
    within = [row for row in compared if _is_within(row, budget, memory)]
    if not within:
        limits = " ".join([*([f"budget={budget}"] if budget else []), *([f"memory={memory:g}"] if memory else [])])
        raise UserError(f"None of {len(compared)} recorded settings is within {limits}: nothing can be claimed.")
    within.sort(key=lambda row: -_score(row))
    fronts = {cost: find_front(within, FIELDS[cost]) for cost in COSTS}
    shown = [row for row in within if any(row is one for front in fronts.values() for one in front)]
    return Advice(
        rows=within,
        fronts=fronts,
        contrasts=_contrast(within[0], [row for row in shown if row is not within[0]]),
        beyond=len(compared) - len(within),
        apart=len(rows) - len(compared),
        untried=_list_untried(within, records),
        thin=[row for row in shown if len(row.scored) < SEEDS],
    )


def choose_records(records: Sequence[Record], task: str | None, model: str | None) -> list[Record]:
    """Return the records of a task and a model, which may be left out where the records have one only.

    Raises:
        UserError: there are none, or several; it names what there is.
    """
    for key, asked in (("task", task), ("model", model)):
        known = sorted({str(FIELDS[key](record)) for record in records})
        if asked is None and len(known) > 1:
            raise UserError(f"The records are of several choices of {key}; give one: {', '.join(known)}.")
        if asked is not None and asked not in known:
            raise UserError(f"No record, no claim: {describe_unknown(key, asked, known)}")
        records = [record for record in records if asked is None or str(FIELDS[key](record)) == asked]
    return list(records)


def group_alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Return groups of rows that were scored on the same examples, trained on as much and chosen on the same split."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for index, table in enumerate(split_tables(rows)):
        for row in table:
            trained = tuple(row.first.trainer.get(key) for key in ALIKE)
            found.setdefault((index, row.first.debug, *identify_data(row.first), *trained), []).append(row)
    return list(found.values())


def _is_within(row: Row, budget: str | None, memory: float | None) -> bool:
    stored, backbone, peak = (row.number(FIELDS[key]) for key in ("stored", "backbone", "memory"))
    if budget is not None and (stored is None or backbone is None or stored > parse_budget(budget, int(backbone))):
        return False
    return memory is None or (peak is not None and peak <= memory)


def _score(row: Row) -> float:
    return -math.inf if row.score is None else row.score


def _contrast(best: Row, others: Sequence[Row]) -> list[Contrast]:
    found = [Contrast(other, _score(best) - _score(other), *_compute_p(best, other)) for other in others]
    corrected = correct_by_holm([one.p for one in found if one.p is not None])
    return [one if one.p is None else Contrast(one.other, one.difference, corrected.pop(0), one.by) for one in found]


def _compute_p(best: Row, other: Row) -> tuple[float | None, str]:
    """Return p of a difference: by the predictions where both have them, else by the scores of the seeds."""
    several = len(best.scored) > 1 and len(other.scored) > 1
    if all(has_examples(record) for row in (best, other) for record in row.scored):
        return compare_rows(best, other, 2000)[best.first.metric].p, "examples and seeds" if several else "examples"
    if not several:
        return None, ""
    scores = [[record.score for record in row.scored] for row in (best, other)]
    p = float(ttest_ind(*scores, equal_var=False).pvalue)
    return (None if math.isnan(p) else p), "seeds"


def correct_by_holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method (1979), in the order given."""
    found, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda one: values[one])):
        largest = max(largest, min(1.0, values[index] * (len(values) - rank)))
        found[index] = largest
    return found


def _list_untried(rows: Sequence[Row], records: Sequence[Record]) -> list[str]:
    tried = {record.method for record in records}
    files = sorted((find_conf_dir() / "method").glob("*.yaml"))
    own = [file.stem for file in files if "\npeft:\n" not in file.read_text(encoding="utf-8")]
    return [name for name in own if name not in tried and name != "head"]


def list_next_commands(advice: Advice, budget: str | None) -> list[str]:
    """Return the lines to type next: more seeds for the front, then methods that were not tried, trained alike."""
    lines = []
    for row in advice.thin[:2]:
        words = [word for word in row.first.overrides if get_key(word) not in OF_ONE_RUN]
        more = [str(seed) for seed in (42, 1, 2, 3, 4) if seed not in {record.seed for record in row.scored}]
        lines.append(_write_command([*words, f"seed={','.join(more[: SEEDS - len(row.scored)])}"]))
    if advice.untried:
        typed = index_by_key(advice.rows[0].first.overrides)
        same = Counter(key for row in advice.rows for key in index_by_key(row.first.overrides))
        kept = [
            f"{key}={value}"
            for key, value in typed.items()
            if key.split(".")[0] in ("task", "model", "trainer")
            and key != "trainer.learning_rate"
            and same[key] == len(advice.rows)
        ]
        share = [f"budget={budget}"] if budget else []
        lines.append(
            _write_command([*kept, f"method={','.join(advice.untried[:4])}", *share, "search=lr3", "seed=42,1,2"])
        )
    return lines


def _write_command(words: Sequence[str]) -> str:
    return " ".join(
        ["peftbench train -m", *(f'"{word}"' if set(word) & set(" ,[]{}") - {","} else word for word in words)]
    )


def find_reference() -> Path | None:
    """Return the folder of the records that came with peftbench, if this is a checkout."""
    folder = find_conf_dir().parent / "outputs" / "reference"
    return folder if folder.is_dir() else None


def read_limits(words: Mapping[str, str]) -> tuple[str | None, float | None]:
    """Return `budget` and `memory` (in GiB) of the words of the command line. Raises UserError for a wrong one."""
    budget, memory = words.get("budget"), words.get("memory")
    if budget is not None:
        parse_budget(budget, 100)
    if memory is None:
        return budget, None
    try:
        number = float(memory)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"memory={memory}: it must be a number of GiB above 0, such as memory=16.")
    return budget, number


def describe_row(row: Row) -> dict[str, Any]:
    """Return what is shown of a row, as JSON values."""
    keys = ("method", "bottleneck", "stored", "percent", "memory", "time")
    found = {
        key: FIELDS[key](row.first) if key in ("method", "bottleneck") else row.number(FIELDS[key]) for key in keys
    }
    return {**found, "score": row.score, "seeds": [record.seed for record in row.scored]}
