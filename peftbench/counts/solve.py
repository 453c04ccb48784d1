"""Solve the bottlenecks of a run with a budget: the largest ones whose stored count is within it.

The stored count of a run is affine in each of its bottlenecks, for all axes and families. Therefore this module needs
no formula: the counts at bottlenecks of 1 and 2, on the meta device, determine all others. A form of the user's own for
which that is not so is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

from transformers import PretrainedConfig

from peftbench.backbones.load import build_meta_backbone, load_config
from peftbench.config.budget import find_largest_sizes, parse_budget
from peftbench.config.own_parts import is_own
from peftbench.config.peft_methods import TYPE, get_method
from peftbench.config.schema import Run, Trainer, list_bottlenecks_of, list_modifications
from peftbench.modification.attach import attach_run
from peftbench.modification.counting import Counts, count
from peftbench.modification.own_form import count_parameters
from peftbench.utils.errors import UserError


@dataclass(frozen=True)
class Costs:
    """The number of parameters that a run's modifications store, as a function of their bottlenecks."""

    smallest: Counts  # with all bottlenecks 1
    steps: dict[str, int]  # by prefix: stored parameters for each further unit of the bottleneck

    def stored(self, sizes: Mapping[str, int]) -> int:
        """Return how many parameters are stored with the bottlenecks `sizes`."""
        return self.smallest.stored + sum((sizes[prefix] - 1) * step for prefix, step in self.steps.items())


def describe_counted(run: Run) -> str:
    """Return a text that runs with the same counts share: it lacks their seed, trainer and search."""
    return repr(replace(run, seed=0, trainer=Trainer(), search=None))


def solve_budget(run: Run, *, as_trained: bool = False, measured: dict[str, Costs] | None = None) -> Run:
    """Return the run with the largest bottlenecks whose stored count is within `run.budget`, or the run itself if it
    has no budget.

    Several bottlenecks keep a ratio, see `find_largest_sizes`: the ratio of their configured sizes, or the ratio at
    which the parts of their stored counts that grow with the bottleneck are as `run.budget_split`. Like counting,
    this loads no weights.

    Args:
        as_trained: the architecture of a hub model is read from its config.json, not from `model.architecture`.
        measured: the costs of runs that are known, to which this adds: those of another budget are the same.

    Raises:
        UserError: not even bottlenecks of 1 are within the budget, or a modification does not fit the backbone.
    """
    if run.budget is None:
        return run
    config = load_config(run.model) if as_trained else None
    if run.peft:
        return _solve_peft_budget(run, config)
    require_affine(run, f"budget={run.budget}")
    given, known = list_bottlenecks_of(run), {} if measured is None else measured
    alike = describe_counted(replace(run, budget=None, budget_split=None))
    if alike not in known:
        known[alike] = measure_costs(run, given, config)
    smallest, steps = known[alike].smallest, list(known[alike].steps.values())
    most = parse_budget(run.budget, smallest.backbone)
    weights = list(given.values()) if run.budget_split is None else _split_costs(run.budget_split, steps)
    sizes = find_largest_sizes(weights, steps, smallest.stored - sum(steps), most)
    if sizes is None:
        smallest_sizes = "a bottleneck" if len(given) == 1 else "bottlenecks"
        raise UserError(
            f"budget={run.budget}: the smallest {run.method} on {run.model.name} stores {smallest.stored:,} parameters "
            f"({smallest.percent(smallest.stored):.3g}% of the backbone), with {smallest_sizes} of 1; give at least "
            f"budget={smallest.stored}."
        )
    found = dict(zip(given, sizes, strict=True))
    stored = count_resized(run, found, config).stored
    expected = known[alike].stored(found)
    assert stored == expected <= most, f"{stored:,} parameters are stored, but {expected:,} were expected"
    return resize(run, found)


def require_affine(run: Run, typed: str) -> None:
    """Raise UserError if a form of the user's own does not grow by the same number with each unit of its bottleneck.

    Args:
        typed: what asks for it.
    """
    for prefix, m in list_modifications(run).items():
        if not is_own(m.functional_form.name) or m.bottleneck is None:
            continue
        one, two, five = (count_parameters(m, size) for size in (1, 2, 5))
        if two <= one or five - two != 3 * (two - one):
            raise UserError(
                f"{typed}: the parameters of {m.functional_form.name} do not grow linearly with its bottleneck; give "
                f"{prefix}bottleneck=NUMBER instead."
            )


def _solve_peft_budget(run: Run, config: PretrainedConfig | None) -> Run:
    """Return the run of a method of peft with the largest rank that is within its budget. Raises UserError if there is
    none, or if the count does not grow with the rank."""
    assert run.budget is not None
    smallest = count_resized(run, {"": 1}, config)
    rank = find_largest_rank(run, config, parse_budget(run.budget, smallest.backbone))
    if rank is None:
        raise UserError(
            f"budget={run.budget}: the smallest {run.method} on {run.model.name} stores {smallest.stored:,} parameters "
            f"({smallest.percent(smallest.stored):.3g}% of the backbone), with a rank of 1; give at least "
            f"budget={smallest.stored}."
        )
    return resize(run, {"": rank})


def find_largest_rank(run: Run, config: PretrainedConfig | None, most: int) -> int | None:
    """Return the largest rank of a method of peft that stores at most `most` parameters, or None.

    The stored count need not be affine in the rank, so that ranks are tried: first the one that would be right if it
    were affine, and from there one by one.

    Raises:
        UserError: the count does not grow with the rank.
    """
    counted: dict[int, int] = {}

    def count_at(rank: int) -> int:
        if rank not in counted:
            counted[rank] = count_resized(run, {"": rank}, config).stored
        return counted[rank]

    step = (count_at(6) - count_at(2)) / 4
    if step <= 0:
        typed = f"peft.type={run.peft[TYPE]}"
        raise UserError(f"budget={run.budget} with {typed}: its parameters do not grow with its rank; leave it out.")
    rank = max(1, 2 + math.floor((most - count_at(2)) / step))
    while rank > 1 and count_at(rank) > most:
        rank -= 1
    if count_at(rank) > most:
        return None
    while count_at(rank + 1) <= most and count_at(rank + 1) > count_at(rank):
        rank += 1
    return rank - rank % 2 if rank > 1 and get_method(run).even else rank


def measure_costs(run: Run, prefixes: Iterable[str], config: PretrainedConfig | None) -> Costs:
    """Count a run with bottlenecks of 1, and with one after the other of 2.

    Args:
        prefixes: of the bottlenecks.
        config: as `build_meta_backbone` takes it.
    """
    ones = dict.fromkeys(prefixes, 1)
    smallest = count_resized(run, ones, config)
    steps = {prefix: count_resized(run, {**ones, prefix: 2}, config).stored - smallest.stored for prefix in ones}
    return Costs(smallest, steps)


def count_resized(run: Run, sizes: Mapping[str, int], config: PretrainedConfig | None) -> Counts:
    """The counts of the run with bottlenecks `sizes`; `config`: as `build_meta_backbone` takes it."""
    model = build_meta_backbone(run.model, run.task, config)
    attach_run(model, resize(run, sizes))
    return count(model)


def _split_costs(shares: Sequence[float], costs: Sequence[int]) -> list[int]:
    """Return integers in the ratio of the sizes at which the costs of all are in the ratio `shares`."""
    ratio = [Fraction(str(share)) / cost for share, cost in zip(shares, costs, strict=True)]
    whole = lcm(*(part.denominator for part in ratio))
    return [int(part * whole) for part in ratio]


def resize(run: Run, sizes: Mapping[str, int]) -> Run:
    """Return the run with the bottlenecks `sizes`, given by the prefix of the modifications' keys."""
    mix = {name: replace(m, bottleneck=sizes.get(f"mix.{name}.", m.bottleneck)) for name, m in run.mix.items()}
    return replace(run, bottleneck=sizes.get("", run.bottleneck), mix=mix)
