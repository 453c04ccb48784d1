"""Find, before training, the trainable tensors on which the loss does not depend.

A modification of a cross-attention that never runs, for example, would not really be trained. The criterion is that
autograd does not reach a tensor. A gradient of exactly zero is not a fault: W_down of LoRA has one at the start,
because W_up is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.backbones.precision import autocast
from peftbench.utils.errors import UserError
from peftbench.utils.text import list_first

NAMED = 6  # in the error; the record has all of them


def find_unreached(
    model: PreTrainedModel, batch: Mapping[str, Tensor], autocast_dtype: torch.dtype | None = None
) -> list[str]:
    """Return the names of the trainable tensors that get no gradient from the loss of `batch`, with one forward and
    backward pass.

    The pass has no side effects: no gradients are stored, and random states and training flags are restored. It runs in
    evaluation mode, in which all layers are present that training drops at random (LayerDrop).

    Args:
        batch: examples with labels, padded. One example is enough, and needs less memory than a training step, even if
            that uses gradient checkpointing.
        autocast_dtype: of the autocast to run under, like the training; None: without.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    was_training = [(module, module.training) for module in model.modules()]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), autocast(model.device, autocast_dtype):
            loss = model.eval()(**inputs).loss
        if not loss.requires_grad:
            return list(trained)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    finally:
        for module, training in was_training:
            module.training = training
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


def make_no_gradient_error(names: Sequence[str]) -> UserError:
    """Return the error that names the tensors."""
    return UserError(
        f"The loss does not depend on {len(names)} of the tensors that are to be trained: {list_first(names, NAMED)}"
        ". Leave their places out by modified_representation.attentions, stacks or layers; or train the others "
        "alone with allow_unused=true."
    )
