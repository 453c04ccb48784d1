"""Sizes made final: those of a column fitted to the backbone, and those of a budget solved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from peftbench.config.schema import Run
from peftbench.counts.shares import fit_sizes
from peftbench.counts.solve import Costs, describe_counted, solve_budget
from peftbench.utils.errors import UserError


def resolve_sizes(runs: Iterable[Run], known: dict[str, Run] | None = None) -> list[Run]:
    """Return the runs with the bottlenecks that they are trained with.

    The architecture of a hub model is read from its config.json there, as training does.

    Args:
        known: such runs by `describe_counted`, to which this adds; others with the same counts have their bottlenecks.

    Raises:
        UserError: with one sentence for each run whose sizes cannot be resolved.
    """
    resolved: list[Run] = []
    found: list[str] = []
    sized = {} if known is None else known
    refused: set[str] = set()
    measured: dict[str, Costs] = {}
    for run in runs:
        alike = describe_counted(run)
        if alike not in sized and alike not in refused:
            try:
                sized[alike] = solve_budget(fit_sizes(run, as_trained=True), as_trained=True, measured=measured)
            except UserError as error:
                found.extend(sentence for sentence in error.faults if sentence not in found)
                refused.add(alike)
        if (first := sized.get(alike)) is not None:
            resolved.append(replace(run, bottleneck=first.bottleneck, mix=first.mix, size=first.size))
    if found:
        raise UserError(*found)
    return resolved
