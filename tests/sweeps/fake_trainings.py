"""Sweeps whose trainings are faked: each writes the record that it would have, with a score by its learning rate."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftbench.cli.main import main
from peftbench.config.schema import Run
from peftbench.records.choice import settle_search
from peftbench.records.location import locate_run
from peftbench.records.record import Failure, find_record, load_records
from peftbench.sweeps.jobs import Ended
from peftbench.utils.errors import UserError
from tests.config.test_search import ended

WORDS = ["search=lr3", "seed=2,1", "trainer.learning_rate=0.001"]

# Selection scores by learning rate, of runs whose search=lr3 tries 0.001, 0.0003 and 0.003. None: it diverges; a text:
# it fails with that.
Scores = dict[float, float | str | None]
HIGHER: Scores = {1e-3: 1.0, 3e-4: 0.0, 3e-3: 2.0, 1e-2: 3.0, 3e-2: 4.0, 0.1: 5.0}
LOWER: Scores = {1e-3: 1.0, 3e-4: 2.0, 3e-3: 0.0, 1e-4: 3.0, 3e-5: 2.5}
INSIDE: Scores = {1e-3: 3.0, 3e-4: 2.0, 3e-3: 1.0}


def write(run: Run, score: float | str | None, **changes: Any) -> None:
    """Write the record of a run that has come to an end with a selection score; the reported one goes the other way."""
    shutil.rmtree(locate_run(run), ignore_errors=True)
    if isinstance(score, str):
        ended(run, None, status="failed", error=Failure(score, ""), **changes)
    else:
        ended(run, score, 50.0 if score is None else 90.0 - score, **changes)


class Trainings:
    """Takes the place of the trainings of a sweep in this process: each run gets the scores of its method."""

    def __init__(self, scores: dict[str, Scores]) -> None:
        self.scores, self.done = scores, list[str]()

    def attempt(self, run: Run, overrides: Sequence[str], **others: Any) -> Ended:
        """Write the record that the run would have, or note in one that is there what a search has chosen."""
        try:
            final, search = settle_search(run)
        except UserError as error:
            return Ended(faults=tuple(error.faults))
        record, rate = find_record(locate_run(final)), final.trainer.learning_rate
        again = record is not None and record.status == "failed" and run.retry
        if record is None or again or (final.rerun and f"{run.method} {run.seed} {rate:g}" not in self.done):
            self.done.append(f"{final.method} {final.seed} {rate:g}")
            write(final, self.scores[final.method][rate], search=search, overrides=list(overrides))
        elif search is None or search.role == "final":
            replace(record, search=search).save()
        return Ended()


def train(folder: Path, *words: str) -> int:
    return main(["train", "-m", *WORDS, *words, f"output_dir={folder}"])


def finals(folder: Path) -> dict[str, list[str]]:
    """The rate and the seed of each run that is no trial, by method."""
    found: dict[str, list[str]] = {}
    for record in sorted(load_records(folder)[0], key=lambda one: (one.trainer["learning_rate"], one.seed)):
        if record.search is None or record.search.role == "final":
            found.setdefault(record.method, []).append(f"{record.trainer['learning_rate']:g} {record.seed}")
    return found
