"""The runs of a command line made final before any of them trains.

Composing has validated them. Here their sizes and budgets become bottlenecks, once, on which the names of their folders
depend. What is left open is the choice of a search (`records.choice.settle_search`), which its trials must precede.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftbench.config.compose import TypedRun
from peftbench.config.schema import Run
from peftbench.config.sizes import list_sizes_taken
from peftbench.records.location import locate_run
from peftbench.records.record import find_record
from peftbench.utils.console import say
from peftbench.utils.quick_imports import speed_up_imports


def resolve_points(points: Sequence[TypedRun], known: dict[str, Run] | None = None) -> list[TypedRun]:
    """Return the points with the bottlenecks that their runs are trained with.

    Imports torch only if there is a budget, or a backbone that its column of sizes was not made for.

    Args:
        known: see `resolve_sizes`.

    Raises:
        UserError: with a sentence for each run that does not fit its backbone or its budget.
    """
    if not any(list_sizes_taken(run) or run.budget is not None for _, run in points):
        return list(points)
    with speed_up_imports():
        from peftbench.counts.resolve import resolve_sizes
    resolved = resolve_sizes((run for _, run in points), known)
    for line in dict.fromkeys(_find_earlier(points, resolved)):
        say(line)
    return [(overrides, run) for (overrides, _), run in zip(points, resolved, strict=True)]


def _find_earlier(points: Sequence[TypedRun], resolved: Sequence[Run]) -> Iterator[str]:
    """Say where runs are that were recorded before sizes were fitted to backbones: their names have the column's."""
    for (_, asked), run in zip(points, resolved, strict=True):
        if list_sizes_taken(asked) and run != asked and find_record(before := locate_run(asked)) is not None:
            yield f"{before} is this run with the unchanged sizes of {run.model.sizes}, from an earlier version."
