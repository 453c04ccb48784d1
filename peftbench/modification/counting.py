"""How many numbers a method trains, stores, and has by the paper's formula. Works on the meta device.

Three counts, since the literature mixes them up: **trained** is what the optimiser holds, **stored** what a checkpoint
needs once the prefix's MLP is folded away, **paper** the formula of the paper's appendix B, which leaves out biases,
layer norms, learned scales and gates. The task head stands beside them, in none of the three. `count` has the totals of
a model, `count_places` the same numbers for each place that is modified.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from peftbench.modification.edit import Modification
from peftbench.modification.functional_form import FunctionalForm
from peftbench.modification.head_attention import Prefix
from peftbench.modification.prompt import Prompt
from peftbench.modification.reparameterization import PrefixMLP
from peftbench.modification.state import bottlenecks
from peftbench.sites import family_of


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. `backbone` is the bare model's without its task head."""

    backbone: int
    trained: int
    stored: int
    paper: int
    head: int

    def percent(self, count: int) -> float:
        """`count` as a percentage of the backbone."""
        return 100 * count / self.backbone


@dataclass(frozen=True)
class PlaceCounts:
    """The numbers of one modification at one place. The prefix MLP's trunk, which several places share, counts at the
    first of them."""

    name: str  # of the modification's module, from the top of the model; its last part says which modification it is
    tensors: dict[str, tuple[int, ...]]  # names and shapes of what is stored
    trained: int
    stored: int
    paper: int


def count_places(model: PreTrainedModel) -> list[PlaceCounts]:
    """The counts of each place of a model that `attach` has changed and nothing has folded yet.

    Their sums, with what is trained of the backbone itself, are the totals of `count`.
    """
    places: list[PlaceCounts] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, _ADDED):
            continue
        tensors = {key: tuple(p.shape) for key, p in module.named_parameters() if ".generator." not in key}
        if isinstance(module, Prompt):
            paper = module.vectors.numel()
        else:
            f = module.function
            paper = f.formula()
            if f.generator is not None:  # what `fold` will put there
                tensors["function.down"] = (f.groups, f.bottleneck, f.in_width)
                tensors["function.up"] = (f.groups, f.out_width, f.bottleneck)
        trained = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
        seen |= trained.keys()
        stored = sum(math.prod(shape) for shape in tensors.values())
        places.append(PlaceCounts(name, tensors, sum(trained.values()), stored, paper))
    return places


def count(model: PreTrainedModel, untrained: Collection[str] = ()) -> Counts:
    """The counts of a model that `attach` has changed and nothing has folded yet.

    Args:
        untrained: names of parameters that came with no weights, as `attach` takes them: they count as task head, also
            the pooler, which is a part of the backbone where it came with weights.
    """
    modification = _modification_parameters(model)
    heads = family_of(model.config.model_type).task_head
    named = dict(model.named_parameters())  # tied and shared tensors once
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    is_head = {name: name.split(".")[0] in heads for name in named}
    head = sum(p.numel() for name, p in trained.items() if is_head[name] or name in untrained)
    backbone = sum(p.numel() for name, p in named.items() if id(p) not in modification and not is_head[name])
    own = {name: p for name, p in trained.items() if not is_head[name] and name not in untrained}
    unfrozen = sum(p.numel() for p in own.values() if id(p) not in modification)
    trained_total = sum(parameter.numel() for parameter in trained.values()) - head
    formula = sum(m.formula() for m in model.modules() if isinstance(m, FunctionalForm))
    prompts = sum(m.vectors.numel() for m in model.modules() if isinstance(m, Prompt))
    mlp = {id(p): p.numel() for m in model.modules() if isinstance(m, PrefixMLP) for p in m.parameters()}
    made = sum(bottleneck.formula() for bottleneck in bottlenecks(model) if bottleneck.generator)
    return Counts(
        backbone=backbone,
        trained=trained_total,
        stored=trained_total - sum(mlp.values()) + made,
        paper=formula + prompts + unfrozen,
        head=head,
    )


_ADDED = (Modification, Prefix, Prompt)  # the modules that `attach` puts at a place


def _modification_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that `attach` added."""
    return {id(p) for module in model.modules() if isinstance(module, _ADDED) for p in module.parameters()}
