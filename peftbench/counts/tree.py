"""One layer of each stack after `attach`: the inserted modules, and the modules that are read, edited or trained.

This module does not know the places of any method: it derives the marks from the hooks and modules on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from peftbench.backbones.sites import Layer, Sites, find_sites
from peftbench.config.schema import Run, list_modifications, name_module
from peftbench.counts.table import format_shape, format_weights
from peftbench.modification.counting import count_places
from peftbench.modification.edit import Edit
from peftbench.modification.head_attention import HEADS, HeadModification, Prefix
from peftbench.modification.insertion import parallel, sequential
from peftbench.modification.prompt import PROMPT

# What a modification's hook does, relative to the module that it is on.
HOOKS = {
    "read": "x is its input",
    "edit_output": "h is its output",
    "edit_input": "h is its input",
    "prepend_to_input": "P is prepended to its input",
    "prepend_to_output": "P is prepended to its output",
    "strip": "P is removed from its output",
}


@dataclass(frozen=True)
class Branch:
    """A module and the modules inside it."""

    name: str
    kind: str  # its class; for an inserted module, the weights
    sizes: str = ""  # shapes of its own parameters
    marks: tuple[str, ...] = ()
    inserted: bool = False
    layers: tuple[int, ...] = ()  # for a layer: the indices of all layers that are like it
    children: tuple[Branch, ...] = ()


def draw_network(model: PreTrainedModel, run: Run) -> tuple[Branch, ...]:
    """Return the layers of a model to which a run's modifications are attached, like layers once, and before and after
    them the modules outside the layers in which anything is inserted or trained."""
    sites = find_sites(model)
    tree = _Tree(model, sites, run)
    layers = {layer.module: layer for layer in sites.layers}
    lists = {tuple(layer.module for layer in sites.layers if layer.stack == stack) for stack in sites.family.stacks}
    found: list[Branch] = []

    def walk(module: nn.Module, path: str) -> None:
        children = tuple(child for child in module.children() if child in layers)
        if children in lists:
            found.extend(tree.fold(path, [layers[child] for child in children]))
            return
        branch = tree.branch(path, module, children=False)
        if path and branch is not None and (branch.children or branch.marks):
            found.append(branch)
        for name, child in module.named_children():
            if child not in tree.inserted:
                walk(child, f"{path}.{name}".lstrip("."))

    walk(model, "")
    return tuple(found)


class _Tree:
    """Builds the branches of one model."""

    def __init__(self, model: PreTrainedModel, sites: Sites, run: Run) -> None:
        names = {name_module(prefix): prefix.rstrip(".") or "modification" for prefix in list_modifications(run)}
        self.inserted: dict[nn.Module, Branch] = {}
        for place in count_places(model):
            name = names[place.name.rpartition(".")[2]]
            branch = Branch(name, ", ".join(format_weights(place.tensors)), inserted=True)
            self.inserted[model.get_submodule(place.name)] = branch
        self.marks = _mark_modules(model, sites)
        self.seen: dict[int, nn.Module] = {}  # a tied tensor is shown at its first module

    def branch(self, name: str, module: nn.Module, children: bool = True) -> Branch | None:
        """Return the branch of a module, or None if it has neither parameters nor marks. Without `children` only the
        modules inserted in it remain."""
        if module in self.inserted:
            return self.inserted[module]
        own = {
            key: p for key, p in module.named_parameters(recurse=False) if self.seen.setdefault(id(p), module) is module
        }
        trained = [key for key, parameter in own.items() if parameter.requires_grad]
        marks = list(dict.fromkeys(self.marks.get(module, ())))
        if trained:
            marks.append("trained" if len(trained) == len(own) else f"{', '.join(trained)} trained")
        below = [
            branch
            for key, child in _list_children(module)
            if (children or child in self.inserted) and (branch := self.branch(key, child)) is not None
        ]
        if not own and not marks and not below:
            return None
        sizes = " + ".join(format_shape(tuple(p.shape)) for p in own.values())
        return Branch(name, type(module).__name__, sizes, tuple(marks), children=tuple(below))

    def fold(self, path: str, layers: list[Layer]) -> Iterator[Branch]:
        """Yield a branch for each kind of layer, named by the indices of the layers that are alike."""
        alike: dict[Branch, list[int]] = {}
        for layer in layers:
            branch = self.branch("", layer.module)
            assert branch is not None, "a layer has parameters"
            alike.setdefault(branch, []).append(layer.index)
        for branch, indices in alike.items():
            same = ", the same" if len(indices) > 1 else ""
            yield replace(branch, name=f"{path} {_format_ranges(indices)}{same}", layers=tuple(indices))


def _list_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules, looking through the containers in which `attach` puts modifications of heads."""
    for name, child in module.named_children():
        if name == HEADS:
            yield from child.named_children()
        elif isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", one) for index, one in child.named_children())
        else:
            yield name, child


def _mark_modules(model: PreTrainedModel, sites: Sites) -> dict[nn.Module, list[str]]:
    """Return what the modifications do at each module."""
    found: dict[nn.Module, list[str]] = {}
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            owner, name = getattr(hook, "__self__", None), getattr(hook, "__name__", "")
            if isinstance(owner, Edit):
                if name.startswith("edit") and owner.own_input and owner.insertion is parallel:
                    found.setdefault(module, []).append(HOOKS["read"])
                if name == "read" and owner.insertion is sequential:
                    continue  # the hook keeps an x that is not used
            if name in HOOKS:
                found.setdefault(module, []).append(HOOKS[name])
    for layer in sites.layers:
        for attention in layer.attentions:
            if hasattr(attention.module, PROMPT):
                found.setdefault(attention.module, []).append("its keys include P")
            for modification in getattr(attention.module, HEADS, nn.ModuleDict()).values():
                found.setdefault(attention.module, []).append("h is each head's output")
                if isinstance(modification, Prefix) or _reads_query(modification):
                    found.setdefault(attention.query, []).append("q is its output")
    return found


def _reads_query(modification: nn.Module) -> bool:
    return (
        isinstance(modification, HeadModification)
        and modification.insertion is parallel
        and not modification.reads_input
    )


def _format_ranges(indices: list[int]) -> str:
    """Return the indices as ranges: 0 to 11; 0, 2 to 4."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
