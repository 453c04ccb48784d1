"""Fit the sizes of conf/sizes.yaml to a backbone for which they were not made, so that they store the same share of it.

A column of sizes names the backbones that it is `of`. On another backbone, the bottlenecks that the user has not typed
become, as with a budget, the largest ones in the same ratio whose share of the backbone is at most the share that the
column's sizes store of the column's own backbone. Both are counted on the meta device. If the column's sizes already
have nearly that share, they are kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace

from transformers import PretrainedConfig

from peftbench.backbones.load import load_config
from peftbench.config.budget import find_largest_sizes
from peftbench.config.identity import to_plain
from peftbench.config.schema import (
    AttentionKind,
    FFNInput,
    Fidelity,
    FunctionalForm,
    Model,
    Modification,
    ModifiedRepresentation,
    Representation,
    Run,
    Stack,
    TaskKind,
    Unfreeze,
    list_modifications,
)
from peftbench.config.sizes import list_column_backbones, list_sizes_taken
from peftbench.counts.solve import Costs, count_resized, find_largest_rank, measure_costs, require_affine, resize
from peftbench.modification.counting import Counts
from peftbench.utils.errors import UserError

# Sizes are kept if their share and the column's share differ by at most this factor: the same layers with another
# vocabulary are nearly the same backbone, such as BERT-base and RoBERTa-base.
NEARLY = 1.15

_known: dict[str, Costs] = {}  # counts so far, which the runs of a sweep share


def fit_sizes(run: Run, *, as_trained: bool = False) -> Run:
    """Return the run with the sizes of its column fitted to its backbone, and as `size` the sentence that says so.

    A run keeps its sizes if its backbone is the column's own or nearly the same, if its bottlenecks were typed, or if
    it has a budget, for which sizes are only a ratio.

    Args:
        as_trained: take the architecture of a hub model from its config.json, not from `model.architecture`.

    Raises:
        UserError: the backbone's architecture is not known, or a modification does not fit it.
    """
    sizes, own = list_sizes_taken(run), list_column_backbones(run)
    if not sizes:
        return run
    config = load_config(run.model) if as_trained or run.model.path is not None else None
    if run.peft:
        return _fit_rank(run, sizes, own, config)
    require_affine(run, f"the sizes of {run.model.sizes} were made for {' and '.join(own)}")
    alone = _strip_modifications(run, sizes)
    here, shares = _compute_costs(alone, config), [_compute_share(alone, sizes, model) for model in own.values()]
    backbone = here.smallest.backbone
    if any(1 / NEARLY <= here.stored(sizes) / backbone / share <= NEARLY for share in shares):
        return replace(run, size=None)
    most = int(shares[0] * backbone)
    ones = dict.fromkeys(sizes, 1)
    steps = [here.steps[prefix] for prefix in sizes]
    best = find_largest_sizes(list(sizes.values()), steps, here.stored(ones) - sum(steps), most)
    found = ones if best is None else dict(zip(sizes, best, strict=True))
    return _resize_noted(run, sizes, found, own, shares[0])


def _fit_rank(run: Run, sizes: Mapping[str, int], own: Mapping[str, Model], config: PretrainedConfig | None) -> Run:
    """Return the run of a method of peft with its rank fitted. Modules that were named are those of this backbone
    alone, so that the share of another one is not known, and the rank stays."""
    if "target_modules" in run.peft or run.modified_representation.name is Representation.none:
        return run
    alone = replace(run, unfreeze=Unfreeze.none, fidelity=Fidelity(), modified_representation=_spread(run))
    here = count_resized(alone, sizes, config)
    counted = [_count_on(alone, sizes, model) for model in own.values()]
    shares = [counts.stored / counts.backbone for counts in counted]
    if any(1 / NEARLY <= here.stored / here.backbone / share <= NEARLY for share in shares):
        return replace(run, size=None)
    rank = find_largest_rank(alone, config, int(shares[0] * here.backbone))
    return _resize_noted(run, sizes, {"": rank or 1}, own, shares[0])


def _resize_noted(
    run: Run, sizes: Mapping[str, int], found: Mapping[str, int], own: Mapping[str, Model], share: float
) -> Run:
    """Return the run with the sizes that were found, and as `size` the sentence that says so."""
    typed = " ".join(f"{prefix}bottleneck={size}" for prefix, size in found.items())
    note = (
        f"{typed}: the sizes of {run.model.sizes} ({', '.join(map(str, sizes.values()))}) were made for "
        f"{' and '.join(own)}; these store the same share of {run.model.name}, {100 * share:.3g}%."
    )
    return replace(resize(run, found), size=note)


def note_of(run: Run) -> str | None:
    """Return the sentence that `fit_sizes` has put into a run, if any."""
    return run.size if isinstance(run.size, str) else None


def size_notes(run: Run, counts: Counts, width: int) -> list[str]:
    """Return notes on the sizes of a run on its backbone, whose hidden states have `width` dimensions.

    Raises:
        UserError: the modifications store more parameters than the backbone has, without a budget that asks for it.
    """
    modifications: dict[str, Modification] = {"": run} if run.peft else list_modifications(run)
    sized = {f"{prefix}bottleneck={m.bottleneck}": m for prefix, m in modifications.items() if m.bottleneck is not None}
    if counts.stored > counts.backbone and sized and run.unfreeze is not Unfreeze.all and run.budget is None:
        share = f"{counts.percent(counts.stored):,.0f}%"
        raise UserError(
            f"{', '.join(sized)}: {counts.stored:,} parameters would be stored, {share} of the {counts.backbone:,} of "
            f"{run.model.name} itself; give fewer, such as budget=5%."
        )
    wide = [
        f"{typed} is above the width of {run.model.name}, {width}."
        for typed, m in sized.items()
        if m.functional_form.name != "softmax"  # prefix vectors may be many
        and not run.peft  # whose size may be a number of frozen vectors or of coefficients
        and m.modified_representation.name
        is not Representation.ffn_intermediate  # the FFN's intermediate layer is wider
        and (m.bottleneck or 0) > width
    ]
    note = note_of(run)
    return [*([] if note is None else [note]), *wide]


def _strip_modifications(run: Run, prefixes: Collection[str]) -> Run:
    """Return a run with only some modifications, at all possible places, because other backbones have other layers."""
    bare = replace(run, unfreeze=Unfreeze.none, fidelity=Fidelity())
    mix = {
        name: replace(m, modified_representation=_spread(m))
        for name, m in run.mix.items()
        if f"mix.{name}." in prefixes
    }
    if "" in prefixes:
        return replace(bare, modified_representation=_spread(run), mix=mix)
    return replace(bare, functional_form=FunctionalForm(), mix=mix)


def _spread(m: Modification) -> ModifiedRepresentation:
    return replace(
        m.modified_representation,
        layers=None,
        stacks=list(Stack),
        attentions=list(AttentionKind),
        ffn_input=FFNInput.normed,
    )


def _compute_share(run: Run, sizes: Mapping[str, int], model: Model) -> float:
    """Return the share of the column's own backbone `model` that the column's sizes store."""
    costs = _compute_costs(*_place_on(run, model))
    return costs.stored(sizes) / costs.smallest.backbone


def _count_on(run: Run, sizes: Mapping[str, int], model: Model) -> Counts:
    """Return the counts of a run with the sizes `sizes` on another backbone."""
    placed, config = _place_on(run, model)
    return count_resized(placed, sizes, config)


def _place_on(run: Run, model: Model) -> tuple[Run, PretrainedConfig | None]:
    """Return the run on another backbone, and that one's config.json if it is in a folder."""
    task = replace(
        run.task, kind=TaskKind.classification, labels=[]
    )  # every family can do it; the head is counted separately
    return replace(run, model=model, task=task), load_config(model) if model.path is not None else None


def _compute_costs(run: Run, config: PretrainedConfig | None) -> Costs:
    """Return what the modifications of a run store on its backbone; `config` is as for `meta_backbone`."""
    built = run.model.architecture if config is None else config.to_dict()
    found = list_modifications(run)
    key = json.dumps([built, run.task.kind.name, {prefix: to_plain(m) for prefix, m in found.items()}], default=str)
    if key not in _known:
        _known[key] = measure_costs(run, found, config)
    return _known[key]
