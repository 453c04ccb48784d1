"""The sizes of conf/sizes.yaml on a backbone that they were not made for: those that store the same share of it.

A column of sizes names the backbones that it is `of`. On another one the bottlenecks that the user has not typed are,
as with a budget, the largest in their ratio that store no larger a share of the backbone than the column's sizes do of
its own. Both are counted on the meta device. Where the column's sizes come to nearly that share they are kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from transformers import PretrainedConfig

from peftbench.backbones.load import load_config
from peftbench.config.budget import largest_sizes
from peftbench.config.identity import plain
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
    modifications,
)
from peftbench.config.sizes import column_backbones, sizes_taken
from peftbench.counts.solve import counted, resized
from peftbench.modification.counting import Counts
from peftbench.utils.errors import UserError

# So many times the column's share, or it so many times theirs, and sizes are kept: the same layers with another
# vocabulary are nearly the same backbone, such as BERT-base and RoBERTa-base.
NEARLY = 1.15

_known: dict[str, _Costs] = {}  # what has been counted: runs of a sweep share it


def fitted(run: Run, *, as_trained: bool = False) -> Run:
    """The run with the sizes of its column fitted to its backbone, and with the sentence that says so as `size`.

    A run whose backbone is the column's own or nearly that, whose bottlenecks were typed, or which has a budget, for
    which they are only a ratio, keeps them.

    Args:
        as_trained: a hub model is what its config.json there says, and not `model.architecture`.

    Raises:
        UserError: how the backbone is built is not known, or a modification does not fit it.
    """
    sizes, own = sizes_taken(run), column_backbones(run)
    if not sizes:
        return run
    config = load_config(run.model) if as_trained or run.model.path is not None else None
    alone = _alone(run, sizes)
    here, shares = _costs(alone, config), [_share(alone, sizes, model) for model in own.values()]
    if any(1 / NEARLY <= here.stored(sizes) / here.backbone / share <= NEARLY for share in shares):
        return replace(run, size=None)
    most = int(shares[0] * here.backbone)
    ones = dict.fromkeys(sizes, 1)
    steps = [here.steps[prefix] for prefix in sizes]
    best = largest_sizes(list(sizes.values()), steps, here.stored(ones) - sum(steps), most)
    found = ones if best is None else dict(zip(sizes, best, strict=True))
    typed = " ".join(f"{prefix}bottleneck={size}" for prefix, size in found.items())
    note = (
        f"{typed}: the sizes of {run.model.sizes} ({', '.join(map(str, sizes.values()))}) were made for "
        f"{' and '.join(own)}; these store the same share of {run.model.name}, {100 * shares[0]:.3g}%."
    )
    return replace(resized(run, found), size=note)


def note_of(run: Run) -> str | None:
    """What `fitted` has to say of a run, if anything."""
    return run.size if isinstance(run.size, str) else None


def size_notes(run: Run, counts: Counts, width: int) -> list[str]:
    """What is to be said of the sizes of a run on its backbone, whose hidden states are `width` wide.

    Raises:
        UserError: the modifications store more than the backbone has, and no budget asked for that.
    """
    sized = {
        f"{prefix}bottleneck={m.bottleneck}": m for prefix, m in modifications(run).items() if m.bottleneck is not None
    }
    if counts.stored > counts.backbone and sized and run.unfreeze is not Unfreeze.all and run.budget is None:
        share = f"{counts.percent(counts.stored):,.0f}%"
        raise UserError(
            f"{', '.join(sized)}: {counts.stored:,} parameters would be stored, {share} of the {counts.backbone:,} of "
            f"{run.model.name} itself; give less, such as budget=5%."
        )
    wide = [
        f"{typed} is above the width of {run.model.name}, {width}."
        for typed, m in sized.items()
        if m.functional_form.name != "softmax"  # prefix vectors may be many
        and m.modified_representation.name is not Representation.ffn_intermediate  # which is wider
        and (m.bottleneck or 0) > width
    ]
    note = note_of(run)
    return [*([] if note is None else [note]), *wide]


class _Costs(NamedTuple):
    """What the modifications of a run store, by their bottlenecks."""

    backbone: int  # parameters
    ones: int  # with bottlenecks of 1
    steps: dict[str, int]  # by prefix, each further one

    def stored(self, sizes: Mapping[str, int]) -> int:
        return self.ones + sum((sizes[prefix] - 1) * step for prefix, step in self.steps.items())


def _alone(run: Run, prefixes: Collection[str]) -> Run:
    """Some modifications of a run by themselves, wherever they can be: other backbones have other layers."""
    bare = replace(run, unfreeze=Unfreeze.none, fidelity=Fidelity())
    mix = {
        name: replace(m, modified_representation=_everywhere(m))
        for name, m in run.mix.items()
        if f"mix.{name}." in prefixes
    }
    if "" in prefixes:
        return replace(bare, modified_representation=_everywhere(run), mix=mix)
    return replace(bare, functional_form=FunctionalForm(), mix=mix)


def _everywhere(m: Modification) -> ModifiedRepresentation:
    return replace(
        m.modified_representation,
        layers=None,
        stacks=list(Stack),
        attentions=list(AttentionKind),
        ffn_input=FFNInput.normed,
    )


def _share(run: Run, sizes: Mapping[str, int], model: Model) -> float:
    """The share of its backbone that the column's sizes store on the column's own."""
    task = replace(run.task, kind=TaskKind.classification, labels=[])  # which every family can do; the head is apart
    config = load_config(model) if model.path is not None else None
    costs = _costs(replace(run, model=model, task=task), config)
    return costs.stored(sizes) / costs.backbone


def _costs(run: Run, config: PretrainedConfig | None) -> _Costs:
    """What the modifications of a run cost on its backbone; `config`: as `meta_backbone` takes it."""
    built = run.model.architecture if config is None else config.to_dict()
    found = modifications(run)
    key = json.dumps([built, run.task.kind.name, {prefix: plain(m) for prefix, m in found.items()}], default=str)
    if key not in _known:
        ones = dict.fromkeys(found, 1)
        least = counted(run, ones, config)
        steps = {prefix: counted(run, {**ones, prefix: 2}, config).stored - least.stored for prefix in found}
        _known[key] = _Costs(least.backbone, least.stored, steps)
    return _known[key]
