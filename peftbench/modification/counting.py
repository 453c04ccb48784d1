"""How many numbers a method trains, stores, and has by the paper's formula. Works on the meta device.

Three counts, since the literature mixes them up: **trained** is what the optimiser holds, **stored** what a checkpoint
needs once the prefix's MLP is folded away, **paper** the formula of the paper's appendix B, which leaves out biases,
layer norms and learned scales. The task head stands beside them, in none of the three.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from peftbench.modification.edit import Modification
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


def count(model: PreTrainedModel) -> Counts:
    """The counts of a model that `attach` has changed and nothing has folded yet."""
    modification = _modification_parameters(model)
    heads = family_of(model.config.model_type).task_head
    named = dict(model.named_parameters())  # tied and shared tensors once
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    is_head = {name: name.split(".")[0] in heads for name in named}
    head = sum(parameter.numel() for name, parameter in trained.items() if is_head[name])
    backbone = sum(p.numel() for name, p in named.items() if id(p) not in modification and not is_head[name])
    unfrozen = sum(p.numel() for name, p in trained.items() if id(p) not in modification and not is_head[name])
    trained_total = sum(parameter.numel() for parameter in trained.values()) - head
    formula = sum(b.bottleneck * b.groups * (b.in_width + b.out_width) for b in bottlenecks(model))
    prompts = sum(m.vectors.numel() for m in model.modules() if isinstance(m, Prompt))
    mlp = {id(p): p.numel() for m in model.modules() if isinstance(m, PrefixMLP) for p in m.parameters()}
    made = sum(b.bottleneck * b.groups * (b.in_width + b.out_width) for b in bottlenecks(model) if b.generator)
    return Counts(
        backbone=backbone,
        trained=trained_total,
        stored=trained_total - sum(mlp.values()) + made,
        paper=formula + prompts + unfrozen,
        head=head,
    )


def _modification_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that `attach` added."""
    added = (Modification, Prefix, Prompt)
    return {id(p) for module in model.modules() if isinstance(module, added) for p in module.parameters()}
