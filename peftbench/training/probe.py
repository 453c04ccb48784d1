"""A look before training: which of the tensors that are to be trained does the loss not depend on?

A modification of a cross-attention that never runs, for instance, would be trained in name only. The criterion is that
autograd does not reach a tensor. A gradient of exactly zero is no fault: W_down of LoRA has one at the start, since
W_up is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.backbones.precision import autocast
from peftbench.utils.errors import UserError

NAMED = 6  # in the error; the record has them all


def unreached(model: PreTrainedModel, batch: Mapping[str, Tensor], bf16: bool) -> list[str]:
    """Names of the trainable tensors that get no gradient from the loss of `batch`, by one forward and backward pass.

    The pass leaves nothing behind: gradients are returned to nobody, and random states and training flags are put back.
    It runs in evaluation mode, in which layers that training drops at random (LayerDrop) are all there.

    Args:
        batch: examples with labels, padded. One example will do, and needs less memory than a step of training, also
            where that has gradient checkpointing.
        bf16: under bfloat16 autocast, as training.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    was_training = [(module, module.training) for module in model.modules()]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), autocast(model.device, bf16):
            loss = model.eval()(**inputs).loss
        if not loss.requires_grad:
            return list(trained)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    finally:
        for module, training in was_training:
            module.training = training
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


def no_gradient(names: Sequence[str]) -> UserError:
    """The error that names them."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return UserError(
        f"The loss does not depend on {len(names)} of the tensors that are to be trained: {', '.join(names[:NAMED])}"
        f"{more}. Leave their places out by modified_representation.attentions, stacks or layers; or train the others "
        "alone with allow_unused=true."
    )
