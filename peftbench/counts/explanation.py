"""The explanation of a run, which is built once on the meta device: its formulas, parameters and network."""

from __future__ import annotations

from dataclasses import dataclass

from peftbench.backbones.sites import find_sites
from peftbench.config.schema import Modification, Run, list_modifications
from peftbench.counts.formula import Description, describe_modification, describe_peft_method
from peftbench.counts.run_counts import RunCounts, build_run, count_built
from peftbench.counts.sizes import Size, describe_size
from peftbench.counts.tree import Branch, draw_network


@dataclass(frozen=True)
class Explanation:
    """The content that `show` prints."""

    counted: RunCounts
    rows: list[Description]
    sizes: list[Size]
    network: tuple[Branch, ...]


def explain(run: Run) -> Explanation:
    """Build a run without its weights and describe it.

    Raises:
        UserError: in the cases of `count_run`.
    """
    built = build_run(run)
    run, _, model = built
    sites = find_sites(model)
    found: dict[str, Modification] = {"": run} if run.peft else list_modifications(run)
    counted = count_built(built)
    return Explanation(
        counted,
        _describe_rows(run, over_residual=sites.layers[0].norm is None),
        [describe_size(group, found[group.prefix], sites) for group in counted.groups if group.prefix is not None],
        draw_network(model, run),
    )


def _describe_rows(run: Run, over_residual: bool) -> list[Description]:
    if run.peft:
        return [describe_peft_method(run)]
    return [describe_modification(prefix, m, over_residual) for prefix, m in list_modifications(run).items()]
