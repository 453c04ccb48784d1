"""The loss of extractive question answering, over the tokens of each example alone.

transformers' own loss has the padding of a batch among the places where an answer may begin and end: the same example
would have another loss in another batch, or without padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

POSITIONS = ("start_positions", "end_positions")


def compute_answer_loss(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run a forward pass and return its loss: the mean of the cross-entropies of an answer's first and last token.

    Args:
        inputs: the model's inputs (B, S), with `POSITIONS` (B,) and the attention mask, which is 0 for padding.
    """
    outputs = model(**{name: tensor for name, tensor in inputs.items() if name not in POSITIONS})
    padding = inputs["attention_mask"] == 0
    first, last = (
        cross_entropy(logits.float().masked_fill(padding, torch.finfo(torch.float32).min), inputs[place])
        for logits, place in zip((outputs.start_logits, outputs.end_logits), POSITIONS, strict=True)
    )
    return (first + last) / 2
