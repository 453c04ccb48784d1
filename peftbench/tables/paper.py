"""The scores that the paper prints for runs that are rows of its tables.

A row is recognised by the typed keys: row=NAME (conf/rows.yaml), or for table 2 method=NAME. Neither may come with
another axis or size.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.config.axes import CHOICES
from peftbench.config.rows import read_scores
from peftbench.config.schema import index_by_key
from peftbench.records.record import Record

# By task: the metric that conf/rows.yaml gives, and the backbone that the paper trained; mbart_large_cc25 is
# another name of the same backbone.
SETTINGS = {
    "xsum": ("rouge2", ("bart_large",)),
    "wmt16_enro": ("bleu_ro", ("mbart_large", "mbart_large_cc25")),
    "mnli": ("accuracy", ("roberta_base",)),
    "sst2": ("accuracy", ("roberta_base",)),
}
# Figures print no numbers. These are the tables with the numbers of their points; some tables print a row differently.
FIGURES = {"figure2": ("table6",), "figure4": ("table6", "table12"), "figure5": ("table12", "table6")}
# Together with row= or method=, these keys make a different point.
OTHERWISE = {
    *CHOICES,  # the four axes
    *("mix", "bottleneck", "budget", "budget_split", "unfreeze", "sizes", "size"),
}


@dataclass(frozen=True)
class Printed:
    """A score of the paper. `same`: the run has the paper's backbone and all of the data that the paper used."""

    score: float
    table: str
    backbone: str
    same: bool


def find_printed(record: Record) -> Printed | None:
    """Return the paper's score for the row that a run is, from the table that was typed or else the first that has it.

    Returns None for a run that is not a row of a table with the run's task and metric.
    """
    metric, backbones = SETTINGS.get(record.task, (None, ()))
    if record.metric != metric:
        return None
    typed = index_by_key(record.overrides)
    row = typed.get("row")
    if OTHERWISE & {key.split(".")[0] for key in typed} or (row is not None and "method" in typed):
        return None
    found = find_score(row, record.method, record.task, typed.get("experiment", "").removeprefix("paper/"))
    return None if found is None else Printed(found[1], found[0], backbones[0], is_papers_setting(record))


def find_score(row: str | None, method: str, task: str, wanted: str) -> tuple[str, float] | None:
    """Return (table, score) of a row, or of a method in table 2: of the `wanted` table, or the first that has it."""
    tables = {table: of[task] for table, of in read_scores(row, method).items() if task in of}
    for table in (wanted, *FIGURES.get(wanted, ()), *tables):
        if table in tables:
            return table, tables[table]
    return None


def is_papers_setting(record: Record) -> bool:
    """Return whether a run used the paper's backbone for its task, and all examples for training and for scoring."""
    _, backbones = SETTINGS.get(record.task, (None, ()))
    report, train = record.scores.get("report"), record.data.get("splits", {}).get("train", {})
    is_whole = record.debug is None and "of" not in train and (report is None or report.of is None)
    return is_whole and record.model.name.replace("-", "_") in backbones
