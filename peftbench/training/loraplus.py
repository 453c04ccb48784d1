"""LoRA+: a larger learning rate for W_up than for W_down (Hayou et al. 2024), by the optimiser's groups.

peft has an optimiser for this that finds its own layers only, and gives the task head's biases the larger rate too.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from peftbench.modification.functional_form import Bottleneck


def raise_up_rate(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Multiply the learning rate of each W_up by `ratio`. The optimiser must not have taken a step yet."""
    ups = list_up_matrices(model)
    for group in list(optimizer.param_groups):
        raised = [p for p in group["params"] if id(p) in ups]
        if not raised:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in ups]
        others = {key: value for key, value in group.items() if key != "params"}
        optimizer.add_param_group({**others, "params": raised, "lr": ratio * group["lr"]})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]


def list_up_matrices(model: nn.Module) -> set[int]:
    """Return the ids of the trained W_up of all modifications with the identity, our own and LoRA's of peft."""
    own = {
        id(module.up)
        for module in model.modules()
        if isinstance(module, Bottleneck) and isinstance(module.f, nn.Identity) and module.up is not None
    }
    return own | {id(p) for name, p in model.named_parameters() if ".lora_B." in name and p.requires_grad}
