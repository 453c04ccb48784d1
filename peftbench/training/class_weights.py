"""Class weights: rare labels count more in the loss of a classification, of texts or of words.

The loss of a batch of n examples, or words, is (1 / n) Σ w[y] CE(x, y): torch's
`CrossEntropyLoss(weight, reduction="sum")` divided by n. The weights are scaled so that their mean over all that is
trained on is 1; over all of it, the loss is then torch's `CrossEntropyLoss(weight)`. An example has the same weight in
each batch, however batches are split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peftbench.tasks.batch import NO_TOKEN
from peftbench.utils.errors import UserError

BALANCED = "balanced"


def scale_class_weights(setting: Any, codes: Sequence[int], names: Sequence[str]) -> list[float]:
    """Return the weight of each label, with mean 1 over the training examples.

    Args:
        setting: `trainer.class_weights`: numbers in the order of the labels, or "balanced", by which each label weighs
            the same in sum.
        codes: the labels of the training examples, or of their words, as indices of `names`.
        names: the labels.

    Raises:
        UserError: there is not one number for each label.
    """
    counts = Counter(codes)
    if setting == BALANCED:
        weights = [1 / counts[code] if counts[code] else 0.0 for code in range(len(names))]
    else:
        weights = [float(weight) for weight in setting]
        if len(weights) != len(names):
            raise UserError(
                f"trainer.class_weights has {len(weights)} numbers, and the labels are {', '.join(names)}; give one "
                "for each, in this order."
            )
    total = sum(weights[code] * count for code, count in counts.items())
    return [weight * len(codes) / total for weight in weights]


def describe_class_weights(weights: Sequence[float], names: Sequence[str]) -> str:
    """Return the note for the record."""
    listed = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True))
    return f"Class weights, with mean 1 over the training examples: {listed}."


class WeightedLoss:
    """The loss of a batch, as transformers' Trainer takes it for `compute_loss_func`."""

    def __init__(self, weights: Sequence[float], label_smoothing: float, device: torch.device) -> None:
        self.weights, self.label_smoothing = torch.tensor(weights, device=device), label_smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: object = None) -> Tensor:
        """Return the mean over the examples, or words, of this batch; `MicroBatched` weighs the parts of a step."""
        logits, codes = outputs.logits.float().flatten(0, -2), labels.flatten()
        summed = cross_entropy(
            logits,
            codes,
            self.weights,
            reduction="sum",
            label_smoothing=self.label_smoothing,
            ignore_index=NO_TOKEN,
        )
        return summed / codes.ne(NO_TOKEN).sum()
