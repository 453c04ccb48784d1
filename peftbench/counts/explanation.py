"""The explanation of a run, which is built once on the meta device: its formulas, parameters and network."""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.backbones.sites import find_sites
from peftbench.config.schema import Run, modifications
from peftbench.counts.formula import Row, describe
from peftbench.counts.run_counts import RunCounts, build, count_built
from peftbench.counts.sizes import Size, size
from peftbench.counts.tree import Branch, network


@dataclass(frozen=True)
class Explanation:
    """The content that `show` prints."""

    counted: RunCounts
    rows: list[Row]
    sizes: list[Size]
    network: tuple[Branch, ...]


def explain(run: Run) -> Explanation:
    """Build a run without its weights and describe it.

    Raises:
        UserError: in the cases of `count_run`.
    """
    built = build(run)
    run, _, model = built
    sites = find_sites(model)
    found = modifications(run)
    counted = count_built(built)
    return Explanation(
        counted,
        [describe(prefix, m, over_residual=sites.family.norm is None) for prefix, m in found.items()],
        [size(group, found[group.prefix], sites) for group in counted.groups if group.prefix is not None],
        network(model, run),
    )
