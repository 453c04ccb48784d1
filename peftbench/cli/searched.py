"""`peftbench claims --searches`: what searches over the axes have found beside the named methods of the same budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.config.overrides import get_key
from peftbench.records.record import Record
from peftbench.records.wording import format_value
from peftbench.tables.claims import Estimate
from peftbench.tables.intervals import LEAST_SEEDS, describe_ways
from peftbench.tables.searches import RIVALS, Candidate, StudyFinding, find_selection_front
from peftbench.utils.text import format_count, strip_controls

HEADERS = ("point", "% stored", "selection", "reported", "best - it", "95% interval")


def show_study(found: StudyFinding, console: Console) -> None:
    """Print a study: its best points and the named methods, and whether the best one is better."""
    console.print(describe_study(found), highlight=False)
    if found.leaders:
        console.print()
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column(HEADERS[0], min_width=23)  # the longest name of a method
        for header in ("%\nstored", "selec-\ntion", "re-\nported", "best\n- it", HEADERS[-1]):
            table.add_column(header, justify="right", no_wrap=True)
        for part in (found.leaders, found.named):
            for one in part:
                table.add_row(*_list_cells(found, one))
            table.add_section()
        console.print(table)
        console.print()
    for line in _describe_result(found):
        console.print(line, highlight=False)
    console.print()


def write_study(found: StudyFinding) -> str:
    """Return what `show_study` prints in GitHub's Markdown."""
    lines = [f"### {strip_controls(describe_study(found))}", ""]
    if found.leaders:
        rows = [_list_cells(found, one) for one in (*found.leaders, *found.named)]
        for cells in (HEADERS, ("---", *["---:"] * 4, "---"), *rows):
            lines.append(f"| {' | '.join(strip_controls(cell).replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join([*lines, " ".join(_describe_result(found)), ""])


def to_json(found: StudyFinding) -> dict[str, Any]:
    """Return a study as JSON values."""
    return {
        "study": found.name,
        "task": found.first.task,
        "model": found.first.model.name,
        "budget": found.first.budget,
        "trials": dict(_count_trials(found)),
        "wanted": found.wanted,
        "found": [_describe_candidate(one) for one in found.leaders],
        "named": [_describe_candidate(one) for one in found.named],
        "better": found.is_better,
        "said": _describe_verdict(found),
    }


def _describe_candidate(one: Candidate) -> dict[str, Any]:
    return {
        "point": one.name,
        "words": list_words(one.first),
        "stored": None if one.first.counts is None else one.first.counts.stored,
        "selection": None if one.selection is None else one.selection.value,
        "score": one.score,
        "runs": {run.seed: run.run for run in one.fresh},
        "best_minus_it": None if one.behind is None else asdict(one.behind),
    }


def describe_study(found: StudyFinding) -> str:
    """Return what was searched, and with how many trials."""
    first, counted = found.first, _count_trials(found)
    budget = "without a budget" if first.budget is None else f"under budget={first.budget}"
    assert first.search is not None  # it is a trial
    counts = ", ".join(f"{number} {kind}" for kind, number in counted.items())
    number = sum(counted.values())
    trials = format_count(number, "trial") if number >= found.wanted else f"{number} of {found.wanted} trials so far"
    smoke = "" if first.debug is None else f" (debug={first.debug})"
    return (
        f"{first.task} with {first.model.name}{smoke} {budget}: {trials} of search={first.search.name} with "
        f"seed {first.seed} ({counts})"
    )


def _count_trials(found: StudyFinding) -> Counter[str]:
    """Return how many trials ended in each way; a trial in progress is none yet."""
    kinds = [_name_end(one) for one in found.trials]
    return Counter({kind: kinds.count(kind) for kind in ("done", "pruned", "diverged", "failed") if kind in kinds})


def _name_end(trial: Record) -> str:
    """Return how a trial ended as one; it may since be running, or have failed, as the run that was chosen."""
    if trial.search is not None and trial.search.pruned:
        return "pruned"
    return trial.status if trial.compared is None else "done"


def _list_cells(found: StudyFinding, one: Candidate) -> tuple[str, ...]:
    value = "" if one.selection is None or one.selection.value is None else f"{one.selection.value:.2f}"
    front = find_selection_front([*found.leaders, *found.named])
    return (
        one.name,
        "" if one.stored is None else f"{one.stored:.2f}",
        f"{value}*" if any(one is other for other in front) else value,
        "" if one.score is None else f"{one.score:.2f}",
        "" if one.behind is None else f"{one.behind.difference:+.2f}",
        "" if one.behind is None else _format_interval(one.behind),
    )


def _format_interval(one: Estimate) -> str:
    return f"{one.low:+.2f} to {one.high:+.2f}"


def _describe_result(found: StudyFinding) -> list[str]:
    if not found.leaders:
        return [_describe_verdict(found)]
    best = found.leaders[0]
    said = [_describe_verdict(found), f"The best point is {' '.join(list_words(best.first))}."]
    if best.selection is not None:
        said.append(
            f"Selection: {best.selection.metric} on {best.selection.split}, {best.selection.examples:,} examples, the "
            "best of all trials, and of each method's learning rates. *: on the front of it and what is stored."
        )
    if best.fresh:
        seeds = ", ".join(str(run.seed) for run in best.fresh)
        mean = f"the mean of the seeds {seeds}" if len(best.fresh) > 1 else f"with the seed {seeds}"
        said.append(f"Reported: {best.first.metric}, {mean}, on which no choice depends.")
    known = [one.behind for one in found.named if one.behind is not None]
    if known:
        said.append(f"Intervals: {describe_ways(known)}.")
    return said


def _describe_verdict(found: StudyFinding) -> str:
    """Return whether the best point beats its rivals, or what is missing to say so."""
    if not found.leaders:
        return "No trial is done."
    best, names = found.leaders[0], " and ".join(RIVALS.values())
    if found.is_better is None:
        return f"Not known yet: {_describe_lack(found)}."
    told = [
        f"{RIVALS[method]} itself"
        if one.first.point == best.first.point
        else f"{one.behind.difference:+.2f} ({_format_interval(one.behind)}) against {RIVALS[method]}"
        + (", which stores less" if found.is_larger(one) else "")
        for method, one in found.rivals.items()
        if one.behind is not None
    ]
    how = "better than" if found.is_better else "not better than"
    winners = " and ".join(RIVALS[method] for method in found.winners)
    beaten = (
        f" {winners} {'is' if len(found.winners) == 1 else 'are'} better than it by more than chance."
        if winners
        else ""
    )
    return f"The best point is {how} {names} by more than chance: {', '.join(told)}.{beaten}"


def _describe_lack(found: StudyFinding) -> str:
    """Return which runs are missing to compare the best point with its rivals."""
    fresh = {one.first.method: one.fresh for one in reversed(found.named)}
    counts = {"the best point": len(found.leaders[0].fresh)}
    counts |= {name: len(fresh.get(method, ())) for method, name in RIVALS.items()}
    few = [f"{name} has {count}" for name, count in counts.items() if count < LEAST_SEEDS]
    if few:
        return f"it takes {LEAST_SEEDS} runs of each with other seeds than the trials', and {' and '.join(few)}"
    apart = [name for method, name in RIVALS.items() if method not in found.rivals]
    return f"the best point shares fewer than {LEAST_SEEDS} seeds with {' and '.join(apart)}"


def list_words(record: Record) -> list[str]:
    """Return the words that give a run the point of a record: the method, what a search has chosen, and the budget."""
    search = record.search
    if search is None or search.study is None:
        chosen = [] if search is None else [f"{key}={format_value(value)}" for key, value in search.chosen.items()]
    else:  # as it was composed: `chosen` has the names that a mix has in the config, not those of its presets
        chosen = [word for word in record.overrides if get_key(word) in search.keys]
    return [f"method={record.method}", *chosen, *([] if record.budget is None else [f"budget={record.budget}"])]


def name_study(task: str, model: str, budget: str | None) -> str:
    """Return how a study is named that has not been run."""
    return f"{task} with {model} under budget={budget}"


def list_study_names(studies: Sequence[StudyFinding]) -> list[str]:
    """Return the names of studies, as `name_study` has them."""
    serious = [one.first for one in studies if one.first.debug is None]
    return [name_study(first.task, first.model.name, first.budget) for first in serious]
