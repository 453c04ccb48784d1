"""Count the parameters that a method trains, stores, and has by the paper's formula. Works on the meta device.

There are three counts, because the literature mixes them up. **trained** is what the optimiser holds. **stored** is
what a checkpoint needs after the prefix's MLP is folded away. **paper** is the formula of the paper's appendix B, which
leaves out biases, layer norms, learned scales and gates. The task head is counted separately and is in none of the
three. `count` returns the totals of a model; `count_places` returns the same numbers for each modified place.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from peftbench.backbones.quantisation import count_elements
from peftbench.backbones.sites import find_family
from peftbench.modification.edit import Modifier
from peftbench.modification.functional_form import FunctionalForm
from peftbench.modification.head_attention import Prefix
from peftbench.modification.peft_method import list_added
from peftbench.modification.prompt import Prompt, PromptKeys
from peftbench.modification.reparameterization import PrefixMLP
from peftbench.modification.state import list_bottlenecks


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. `backbone` is the number of the bare model, without its task head."""

    backbone: int
    trained: int
    stored: int
    paper: int
    head: int

    def percent(self, count: int) -> float:
        """Return `count` as a percentage of the backbone."""
        return 100 * count / self.backbone


@dataclass(frozen=True)
class PlaceCounts:
    """The numbers of one modification at one place. A prefix MLP's trunk that several places share is counted at the
    first of them."""

    name: str  # path of the modification's module from the top of the model; the last part names the modification
    tensors: dict[str, tuple[int, ...]]  # name and shape of each stored tensor
    trained: int
    stored: int
    paper: int


def count_places(model: PreTrainedModel) -> list[PlaceCounts]:
    """Count each place of a model that `attach` has changed and that is not folded yet.

    Together with the trained parameters of the backbone itself, they add up to the totals of `count`.
    """
    places: list[PlaceCounts] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, _ADDED) or isinstance(getattr(module, "function", None), PromptKeys):
            continue
        of_module = {key: p for key, p in module.named_parameters() if p.requires_grad}  # an own form may have others
        tensors = {key: tuple(p.shape) for key, p in of_module.items() if ".generator." not in key}
        if isinstance(module, Prompt):
            paper = module.vectors.numel()
        else:
            f = module.function
            paper = f.formula()
            if f.generator is not None:  # the weights that `fold` will store
                tensors["function.down"] = (f.groups, f.bottleneck, f.in_width)
                tensors["function.up"] = (f.groups, f.out_width, f.bottleneck)
        trained = {id(p): p.numel() for p in of_module.values() if id(p) not in seen}
        seen |= trained.keys()
        stored = sum(math.prod(shape) for shape in tensors.values())
        places.append(PlaceCounts(name, tensors, sum(trained.values()), stored, paper))
    return places


def count(model: PreTrainedModel, untrained: Collection[str] = ()) -> Counts:
    """Count a model that `attach` has changed and that is not folded yet.

    Args:
        untrained: names of parameters that came with no weights, as `attach` takes them. They count as task head, even
            the pooler, which is a part of the backbone if it came with weights.
    """
    of_peft = {id(tensor) for tensor in list_added(model).values()}
    modification = _modification_parameters(model) | of_peft
    heads = find_family(model.config.model_type).task_head
    named = dict(model.named_parameters())  # has each tied or shared tensor once
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    is_head = {name: name.split(".")[0] in heads for name in named}
    head = sum(p.numel() for name, p in trained.items() if is_head[name] or name in untrained)
    backbone = sum(count_elements(p) for name, p in named.items() if id(p) not in modification and not is_head[name])
    own = {name: p for name, p in trained.items() if not is_head[name] and name not in untrained}
    unfrozen = sum(p.numel() for p in own.values() if id(p) not in modification)
    trained_total = sum(parameter.numel() for parameter in trained.values()) - head
    formula = sum(m.formula() for m in model.modules() if isinstance(m, FunctionalForm))
    prompts = sum(m.vectors.numel() for m in model.modules() if isinstance(m, Prompt))
    mlp = {id(p): p.numel() for m in model.modules() if isinstance(m, PrefixMLP) for p in m.parameters()}
    made = sum(bottleneck.formula() for bottleneck in list_bottlenecks(model) if bottleneck.generator)
    trained_by_peft = sum(p.numel() for p in own.values() if id(p) in of_peft)  # for which the paper has no formula
    return Counts(
        backbone=backbone,
        trained=trained_total,
        stored=trained_total - sum(mlp.values()) + made,
        paper=formula + prompts + unfrozen + trained_by_peft,
        head=head,
    )


_ADDED = (Modifier, Prefix, Prompt)  # the modules that `attach` puts at a place


def _modification_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that `attach` added."""
    return {id(p) for module in model.modules() if isinstance(module, _ADDED) for p in module.parameters()}
