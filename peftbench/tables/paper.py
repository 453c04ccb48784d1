"""What the paper prints for a run that is a row of one of its tables. Imports no torch.

A row is known by what was typed: row=NAME (conf/rows.yaml), or method=NAME in table 2, with no other axis or size
beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.config.axes import CHOICES
from peftbench.config.rows import scores
from peftbench.config.schema import by_key
from peftbench.records.record import Record

# By task: the metric that conf/rows.yaml gives, and the backbone that the paper trained; mbart_large_cc25 is
# another name of the same.
SETTINGS = {
    "xsum": ("rouge2", ("bart_large",)),
    "wmt16_enro": ("bleu_ro", ("mbart_large", "mbart_large_cc25")),
    "mnli": ("accuracy", ("roberta_base",)),
    "sst2": ("accuracy", ("roberta_base",)),
}
# Figures print no numbers: the tables that have those of their points, which print some rows differently.
FIGURES = {"figure2": ("table6",), "figure4": ("table6", "table12"), "figure5": ("table12", "table6")}
# Beside row= or method= these make it another point.
OTHERWISE = {
    *CHOICES,  # the four axes
    *("mix", "bottleneck", "budget", "budget_split", "unfreeze", "sizes", "size"),
}


@dataclass(frozen=True)
class Printed:
    """A score of the paper. `same`: the run has the paper's backbone and all of its data, as the paper's own had."""

    score: float
    table: str
    backbone: str
    same: bool


def printed(record: Record) -> Printed | None:
    """What the paper prints for the row that a run is, by the table that was typed or else the first that has it.

    None for a run that is no row of a table with the run's task and metric.
    """
    metric, backbones = SETTINGS.get(record.task, (None, ()))
    if record.metric != metric:
        return None
    typed = by_key(record.overrides)
    row = typed.get("row")
    if OTHERWISE & {key.split(".")[0] for key in typed} or (row is not None and "method" in typed):
        return None
    found = score_of(row, record.method, record.task, typed.get("experiment", "").removeprefix("paper/"))
    return None if found is None else Printed(found[1], found[0], backbones[0], is_the_papers(record))


def score_of(row: str | None, method: str, task: str, wanted: str) -> tuple[str, float] | None:
    """(table, score) of a row, or of a method in table 2: of the `wanted` table, or else of the first that has it."""
    tables = {table: of[task] for table, of in scores(row, method).items() if task in of}
    for table in (wanted, *FIGURES.get(wanted, ()), *tables):
        if table in tables:
            return table, tables[table]
    return None


def is_the_papers(record: Record) -> bool:
    """Whether a run had the paper's backbone for its task, and all of the examples to train on and to be scored on."""
    _, backbones = SETTINGS.get(record.task, (None, ()))
    report, train = record.scores.get("report"), record.data.get("splits", {}).get("train", {})
    is_whole = record.debug is None and "of" not in train and (report is None or report.of is None)
    return is_whole and record.model.name.replace("-", "_") in backbones
