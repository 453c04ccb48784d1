"""The table at the end of a study: the front with its scores on the selection split and, now, on the report split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.config.studies import GROUPS
from peftbench.records.record import Record
from peftbench.records.wording import format_value
from peftbench.sweeps.study import Study
from peftbench.sweeps.study_front import list_confirmed, list_front


def show_front(study: Study, records: Sequence[Record], counted: Counter[str], console: Console) -> None:
    """Print the trials on the front, and how many trials there were of each kind.

    Args:
        records: of the front, in its order.
        counted: from `Study.count`.
    """
    if records:
        console.print()
        console.print(_make_table(records, [key for key in study.space if key not in (*GROUPS, "bottleneck")]))
        for line in _describe_confirmed(study):
            console.print(line, highlight=False)
        if records[0].search is not None and records[0].search.reported:
            console.print("The selection split is also the one that is reported on: these scores are too good.")
    kinds = ("done", "pruned", "diverged", "failed", "unfinished", "refused or known")
    counts = ", ".join(f"{counted[kind]} {kind}" for kind in kinds if counted[kind])
    what = "best under the budget" if study.objectives == 1 else "front of selection score and stored parameters"
    console.print(f"\nsearch={study.search.name}: {counts}; the {what} is {len(records)} of them.", highlight=False)
    if counted["failed"]:
        console.print("retry=true trains the failed ones again.", highlight=False)
    if (trained := study.count_runs()) < (study.search.trials or 0) and study.is_time_up:
        limit = f"search.minutes={study.search.minutes:g}"
        console.print(f"{limit} ended it after {trained} of {study.search.trials} trials; the same line goes on.")


def _describe_confirmed(study: Study) -> list[str]:
    """Return a sentence for each point on the front that was trained with other seeds: its mean reported score."""
    said = []
    for trial in list_front(study):
        runs = [run for run in list_confirmed(study, trial) if run.score is not None]
        if runs:
            seeds = ", ".join(str(run.seed) for run in runs)
            mean = fmean(run.score for run in runs if run.score is not None)
            said.append(f"{study.locate(trial).name} with the seeds {seeds}: {runs[0].metric} {mean:.2f} reported.")
    return said


def _make_table(records: Sequence[Record], keys: Sequence[str]) -> Table:
    """Return the table of the trials that were chosen.

    Args:
        keys: of the space, without the axes and the bottleneck.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    selection = records[0].selection
    table.add_column("run", no_wrap=True)
    table.add_column("four axes", overflow="fold", min_width=16)
    scores = [
        f"{selection.metric}\n{selection.split}" if selection is not None else "",
        f"{records[0].metric}\nreported",
    ]
    for name in ("bottle-\nneck", *(key.rpartition(".")[2].replace("_", "\n") for key in keys), "stored", *scores):
        table.add_column(name, justify="right", overflow="fold")
    for record in records:
        axes = "\n".join(one.in_line for one in record.axes)
        sizes = "\n".join("" if one.bottleneck is None else f"{one.bottleneck}" for one in record.axes)
        given = {} if record.search is None else record.search.chosen
        chosen = [format_value(given[key]) if key in given else "" for key in keys]
        value = None if record.selection is None else record.selection.value
        found = ["" if score is None else f"{score:.2f}" for score in (value, record.score)]
        stored = "" if record.counts is None else f"{record.counts.stored:,}"
        table.add_row(record.run, axes, sizes, *chosen, stored, *found)
    return table
