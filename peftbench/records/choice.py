"""The choice of a search: of its trials' records, the best on the selection split.

The report split is never looked at: what is compared is `Record.selection`, and nothing else of a record. A sweeper of
Hydra's is given the same (`compute_objective`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from peftbench.config.schema import LOSS, Run, Search
from peftbench.config.search import build_trials, extend_search, list_settings, list_values
from peftbench.config.stamps import stamp_content
from peftbench.config.studies import list_space, read_chosen
from peftbench.records.location import locate_run
from peftbench.records.noted import lacks_selection
from peftbench.records.record import Record, Searched, Selection, Trial, find_record
from peftbench.records.wording import describe_search, format_settings
from peftbench.utils.errors import UserError


class NoChoice(UserError):
    """No trial of a search has a score."""


class Compared:
    """What is known of the trials of searches, by the run that has the search: runs that differ in their seed share
    them. Files are read once, until `look_anew` or `forget`."""

    def __init__(self) -> None:
        self.folders: dict[str, list[Path]] = {}
        self.look_anew()

    def look_anew(self) -> None:
        """Forget what was read."""
        self.records: dict[Path, Record | None] = {}
        self.followed: dict[str, Run] = {}
        self.stamp = cache(stamp_content)

    def forget(self, run: Run) -> None:
        """Forget what was read of the trials of a run's search."""
        known = self.followed.pop(self.identify(run), run)
        for folder in self.locate_trials(known):
            self.records.pop(folder, None)

    def identify(self, run: Run) -> str:
        """Return what the runs of a sweep that have the same trials have in common."""
        assert run.search is not None
        seed = run.seed if run.search.seed is None else run.search.seed
        return repr(replace(run, seed=seed, trackers_group=None))  # the group is named only with the plan

    def locate_trials(self, run: Run) -> list[Path]:
        """Return the folders of the trials of a run's search, in their order."""
        key = self.identify(run)
        if key not in self.folders:
            self.folders[key] = [locate_run(trial, self.stamp) for trial in build_trials(run)]
        return self.folders[key]

    def read_trials(self, run: Run) -> list[Record | None]:
        """Return the records of the trials of a run's search, in their order; None for one without."""
        folders = self.locate_trials(run)
        for folder in folders:
            if folder not in self.records:
                self.records[folder] = find_record(folder)
        return [self.records[folder] for folder in folders]

    def follow(self, run: Run) -> Run:
        """Return the run whose `search.further` has all values that the records of its search's trials call for; the
        trial of the last of them may not be done yet."""
        key = self.identify(run)
        if key not in self.followed:
            self.followed[key] = self._follow(run)
        found = self.followed[key].search
        return replace(run, search=found)

    def _follow(self, run: Run) -> Run:
        while run.search is not None and len(run.search.further) < run.search.extend:
            records = self.read_trials(run)
            best = _find_best_trial(run, records)
            extended = None if best is None else extend_search(run, best)
            if extended is None:
                break
            run = extended
        return run


def find_best(found: Sequence[float | None], metric: str) -> int | None:
    """The index of the best value, the first of equal ones; None where there is none. None and NaN are the worst."""
    sign = -1 if metric == LOSS else 1
    known = [(sign * value, -index) for index, value in enumerate(found) if value is not None and math.isfinite(value)]
    return -max(known)[1] if known else None


def compute_objective(selection: Selection | None) -> float:
    """What a sweeper of Hydra's is given of a run: always better when higher, so of a loss the negative.

    Minus infinity, the worst, where there is none, as of a run that failed or diverged: NaN, which tells no order, ends
    Optuna's sweeper. It is never the score that is reported.
    """
    if selection is None or selection.value is None:
        return -math.inf
    return -selection.value if selection.metric == LOSS else selection.value


def describe_given(record: Record) -> str:
    """The sentence that says what a sweeper is given of a run."""
    selection = record.selection
    if selection is None:
        return f"The sweeper is given no score of this run: {record.outcome}."
    sign, splits = ("-" if selection.metric == LOSS else ""), record.data.get("splits", {})
    same = ", the split that is reported on" if splits.get("selection") == splits.get("report") else ""
    return (
        f"The sweeper is given {sign}{selection.metric} on {selection.split}, {selection.examples:,} examples{same}: "
        f"{compute_objective(selection):.4g}."
    )


def settle_search(run: Run, known: Compared | None = None) -> tuple[Run, Searched | None]:
    """The run with the values that its search has chosen, and what its record says of the search.

    A trial keeps its own values; without a search it is the run itself.

    Args:
        run: with its sizes resolved, on which the folders of its trials depend.
        known: what is known of the trials, to which this adds.

    Raises:
        NoChoice: all trials failed or diverged.
        UserError: trials are not done yet.
    """
    search = run.search
    if search is None:
        return run, None
    if search.trials is not None:
        return settle_trial(run, search)
    seed = run.seed if search.seed is None else search.seed
    if search.trial is not None:
        chosen, tried = list_settings(run, search)[search.trial], list_values(run, search)
        return build_trials(run)[search.trial], Searched(search.name, "trial", seed, tried, chosen)

    known = Compared() if known is None else known
    run = known.follow(run)
    search = run.search
    assert search is not None
    compared, tried, records = build_trials(run), list_values(run, search), known.read_trials(run)
    whose = f"search={search.name}: {{}} of method={run.method} on task={run.task.name}"
    left = sum(not _is_compared(record) for record in records)
    if left:
        subject = whose.format(f"{left} of {len(records)} trials")
        raise UserError(f"{subject} {'is' if left == 1 else 'are'} not done; the same line goes on with them.")
    ended = [record for record in records if record is not None]
    found = [
        Trial(setting, record.run, get_compared_value(record), _describe_status(record))
        for setting, record in zip(list_settings(run, search), ended, strict=True)
    ]
    note = Searched(search.name, "final", seed, tried, trials=found)
    index = _find_best_trial(run, records)
    if index is None:
        raise NoChoice(f"{whose.format(f'all {len(found)} trials')} failed or diverged: {describe_search(note)}.")
    splits = ended[index].data.get("splits", {})
    note.chosen, note.selection = found[index].settings, ended[index].selection
    note.reported = splits.get("selection") == splits.get("report")
    # The trial with this run's seed is this run: it has just been trained.
    return replace(compared[index], seed=run.seed, rerun=run.rerun and run.seed != seed), note


def settle_trial(run: Run, search: Search) -> tuple[Run, Searched]:
    """The run of one trial of a study, which has the values that were chosen for it already; or, where its seed is not
    that of the trials, the run that trains the point of a trial anew.

    Raises:
        UserError: the trial whose point it has is not done.
    """
    tried = {
        key: variation.values or variation.times or [variation.low, variation.high]
        for key, variation in list_space(run, search).items()
    }
    final, seed = replace(run, search=None), run.seed if search.seed is None else search.seed
    note = Searched(search.name, "trial", seed, tried, read_chosen(run, search), study=search.study)
    if seed == run.seed:
        return final, note
    trial = find_record(locate_run(replace(final, seed=seed)))
    if trial is None or trial.compared is None:
        raise UserError(f"search={search.name}: the trial with seed {seed} whose point this run has is not done.")
    splits = trial.data.get("splits", {})
    same = splits.get("selection") == splits.get("report")
    return final, replace(note, role="final", selection=trial.compared, reported=same)


def try_settle(run: Run, known: Compared | None = None) -> Run:
    """The run of `settle_search`, or the run as it is where its trials are not done or leave no choice."""
    try:
        return settle_search(run, known)[0]
    except UserError:
        return run


def describe_search_choice(record: Record) -> str:
    """What was searched for a run, on a line."""
    search = record.search
    assert search is not None and search.selection is not None
    selection = search.selection
    split = f"{selection.metric} on {selection.split}, {selection.examples:,} examples, seed {search.seed}"
    edges = list_edges(search)
    edge = f"; the outermost {' and '.join(edges)} that was tried: the best may lie beyond it" if edges else ""
    same = "; chosen on the split that is reported on" if search.reported else ""
    sizes = " + ".join(str(axes.bottleneck) for axes in record.axes if axes.bottleneck is not None)
    method = record.method + (f" of bottleneck {sizes}" if sizes else "")
    where = f"search={search.name}, {method}, {record.model.name} on {record.task} ({split})"
    return f"{where} takes {format_settings(search.chosen)}; {describe_search(search)}{edge}{same}."


def list_edges(search: Searched) -> list[str]:
    """Return the keys whose chosen value is the lowest or highest that was tried: a better one may lie beyond it."""
    return [key for key, value in search.chosen.items() if _at_edge(value, search.keys[key])]


def _is_compared(record: Record | None) -> bool:
    """Whether it is known what a trial came to; one that was trained as a plain run may still lack that."""
    if record is None or record.compared is not None:
        return record is not None
    return record.status == "failed" or (record.status == "diverged" and not lacks_selection(record, True))


def _find_best_trial(run: Run, records: Sequence[Record | None]) -> int | None:
    """Return the index of the best trial of a run's search; None where none has a score, or one is not done."""
    if not all(_is_compared(record) for record in records):
        return None
    values = [None if record is None else get_compared_value(record) for record in records]
    return find_best(values, run.task.selection_metric or run.task.metric)


def get_compared_value(record: Record) -> float | None:
    """Return the selection score by which a search compares a trial; None where it has none, the worst."""
    return None if record.compared is None else record.compared.value


def _describe_status(record: Record) -> str:
    """Return how a trial ended. One with a score is done as a trial, whatever else the run is yet to do."""
    if record.compared is not None:
        return "done"
    if record.status == "failed":
        return f"failed ({record.error.name})" if record.error is not None else "failed"
    return record.status


def _at_edge(value: Any, tried: Sequence[Any]) -> bool:
    numbers = [one for one in tried if isinstance(one, int | float)]
    return len(numbers) == len(tried) > 2 and value in (min(numbers), max(numbers))
