"""Count one run, place by place: build its backbone on the meta device and attach its modifications."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from peftbench.backbones.load import build_meta_backbone
from peftbench.backbones.sites import Sites, find_sites
from peftbench.config.fidelity import Deviation
from peftbench.config.schema import (
    WITH_LABELS,
    Modification,
    Representation,
    Run,
    Task,
    Unfreeze,
    list_modifications,
    name_module,
)
from peftbench.counts.shares import fit_sizes, size_notes
from peftbench.counts.solve import Costs, describe_counted, solve_budget
from peftbench.modification.attach import attach_run
from peftbench.modification.counting import Counts, PlaceCounts, count, count_places
from peftbench.modification.dead_parameters import count_dead
from peftbench.modification.peft_method import PeftPlace, list_peft_places

UNFROZEN_LABELS = {
    Unfreeze.bias: "the backbone's biases",
    Unfreeze.norm: "the backbone's norms",
    Unfreeze.all: "the backbone",
}


@dataclass(frozen=True)
class Group:
    """Places of one kind, with their numbers added up."""

    label: str  # such as "encoder self heads"
    prefix: str | None  # prefix of the modification's keys, "" or "mix.NAME."; None: the backbone's own parameters
    places: int
    tensors: dict[str, tuple[int, ...]]  # name and shape of each tensor that is stored at each place
    trained: int
    stored: int
    paper: int


@dataclass(frozen=True)
class RunCounts:
    """A run and its numbers. The totals are the sums over the groups."""

    run: Run  # with its deviations filled in
    totals: Counts
    groups: list[Group]
    deviations: list[Deviation]
    dead: int  # unused parameters that the paper's code also trains, if fidelity.dead_parameters is on
    notes: list[str]  # on the sizes, a sentence each


class Owner(NamedTuple):
    """Where a place is: its stack (None: before the first layer) and its kind of attention (None: in none)."""

    stack: str | None
    kind: str | None


@dataclass(frozen=True)
class Known:
    """What the runs of a sweep share, by `describe_counted`."""

    counts: dict[str, RunCounts] = field(default_factory=dict)
    costs: dict[str, Costs] = field(default_factory=dict)  # see `solve_budget`


def count_run(run: Run, known: Known | None = None) -> RunCounts:
    """Build and count a run.

    Args:
        known: what is known of other runs, to which this adds.

    Raises:
        UserError: in the cases of `build_run`.
    """
    known, alike = known or Known(), describe_counted(run)
    if alike not in known.counts:
        known.counts[alike] = count_built(build_run(run, known.costs))
    found = known.counts[alike]
    return replace(found, run=replace(found.run, seed=run.seed, trainer=run.trainer, search=run.search))


class Built(NamedTuple):
    """A run whose model is on the meta device, with its modifications attached."""

    run: Run  # with its budget solved and its deviations filled in
    deviations: list[Deviation]
    model: PreTrainedModel


def build_run(run: Run, costs: dict[str, Costs] | None = None) -> Built:
    """Settle the run's sizes and attach its modifications to its model without weights.

    Args:
        costs: see `solve_budget`.

    Raises:
        UserError: the backbone's architecture is not known, or a modification or the budget does not fit it.
    """
    run = solve_budget(fit_sizes(replace(run, task=_read_labels(run.task))), measured=costs)
    model = build_meta_backbone(run.model, run.task)
    run, deviations = attach_run(model, run)
    return Built(run, deviations, model)


def count_built(built: Built) -> RunCounts:
    """Return the counts of a built run. Raises UserError if they make no sense, see `size_notes`."""
    run, deviations, model = built
    totals = count(model)
    groups = [*_group_places(model, run), *_group_peft_places(model)]
    unfrozen = totals.trained - sum(group.trained for group in groups)
    if unfrozen:
        groups.append(Group(UNFROZEN_LABELS[run.unfreeze], None, 1, {}, unfrozen, unfrozen, unfrozen))
    dead = count_dead(model, list_modifications(run)) if run.fidelity.dead_parameters else 0
    return RunCounts(run, totals, groups, deviations, dead, size_notes(run, totals, find_sites(model).width))


def _read_labels(task: Task) -> Task:
    """Return the task with the labels of its training file if it names none: they give the size of the task head."""
    if task.labels or task.kind not in WITH_LABELS:
        return task
    from peftbench.tasks.load import read_label_names  # imports datasets, which nothing else here needs

    return replace(task, labels=read_label_names(task))


def _group_places(model: PreTrainedModel, run: Run) -> Iterator[Group]:
    """Group the places of the same modification, kind and shapes, in the order of the config's modifications and then
    of the model."""
    sites = find_sites(model)
    owners = _map_owners(sites)
    places = count_places(model)
    for prefix, modification in list_modifications(run).items():
        name = name_module(prefix)
        alike: dict[tuple[object, ...], list[tuple[Owner, PlaceCounts]]] = {}
        for place in places:
            if place.name.rpartition(".")[2] == name:
                owner = _find_owner(model, place.name, owners)
                # Attentions of two stacks are two groups, because each has its own prefix MLP.
                key = (owner if owner.kind else None, *place.tensors.items())
                alike.setdefault(key, []).append((owner, place))
        for members in alike.values():
            yield _sum_group(
                _label_group(modification, [owner for owner, _ in members], sites), prefix, [p for _, p in members]
            )


def _group_peft_places(model: PreTrainedModel) -> Iterator[Group]:
    """Group the places of a method of peft that are alike, in the order of the model."""
    sites = find_sites(model)
    owners = _map_owners(sites)
    alike: dict[tuple[object, ...], list[PeftPlace]] = {}
    for place in list_peft_places(model):
        owner = _find_owner(model, place.name, owners) if place.name else Owner(None, None)
        alike.setdefault((owner.stack, owner.kind, *place.tensors.items()), []).append(place)
    for (stack, kind, *_), places in alike.items():
        count = sum(math.prod(shape) for place in places for shape in place.tensors.values())
        what = "projections" if kind else "weights"
        label = " ".join(str(word) for word in (stack, kind, what) if word) if stack else "shared by several places"
        yield Group(label, "", len(places), places[0].tensors, count, count, count)


def _sum_group(label: str, prefix: str, places: list[PlaceCounts]) -> Group:
    return Group(
        label=label,
        prefix=prefix,
        places=len(places),
        tensors=places[0].tensors,
        trained=sum(place.trained for place in places),
        stored=sum(place.stored for place in places),
        paper=sum(place.paper for place in places),
    )


def _label_group(modification: Modification, owners: list[Owner], sites: Sites) -> str:
    """Return where and what: `decoder cross heads`, or `ffn` if all stacks have it, else `decoder ffn`."""
    kind = owners[0].kind
    what = str(modification.modified_representation.name.name)
    if modification.modified_representation.name is Representation.attention_ffn:
        what = "attention" if kind else "ffn"
    if modification.modified_representation.name is Representation.all_linear:
        what = "projections" if kind else "ffn_weights"
    stacks = list(dict.fromkeys(owner.stack for owner in owners if owner.stack))
    if kind:
        return f"{stacks[0]} {kind} {what}"
    return what if len(stacks) == len(sites.family.stacks) else " ".join((*stacks, what))


def _map_owners(sites: Sites) -> dict[nn.Module, Owner]:
    """Return the owners by module: the attention modules and the layers."""
    found: dict[nn.Module, Owner] = {}
    for layer in sites.layers:
        found[layer.module] = Owner(layer.stack, None)
        for attention in layer.attentions:
            parts = (attention.module, attention.query, attention.key, attention.value, attention.output)
            found.update(dict.fromkeys(parts, Owner(layer.stack, attention.kind)))
    return found


def _find_owner(model: nn.Module, path: str, owners: dict[nn.Module, Owner]) -> Owner:
    """Return the attention or layer that a place is in: that of the nearest module above it that has an owner."""
    while path:
        path = path.rpartition(".")[0]
        if (owner := owners.get(model.get_submodule(path))) is not None:
            return owner
    return Owner(None, None)
