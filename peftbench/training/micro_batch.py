"""Batches that do not fit in memory, in parts: `trainer.micro_batch`. The gradient stays that of the whole batch.

transformers' `auto_find_batch_size`, and accelerate's `find_executable_batch_size` below it, start again with a smaller
batch, and so train something else. Here a batch stays what it is: its parts' gradients are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from peftbench.training.token_loss import IGNORED
from peftbench.utils.memory import make_room, out_of_memory

AUTO = "auto"
MOMENTS = 2  # tensors that AdamW keeps beside each one that is trained


class MicroBatches:
    """Into how many parts each batch goes.

    Args:
        setting: `trainer.micro_batch`: examples in a part, as text; auto: as many as fit; None: batches stay whole.
        batch_size: examples in a batch.
        longest: a batch of the longest training examples, by their indices, with which memory is tried.
    """

    def __init__(self, setting: str | None, batch_size: int, longest: Sequence[int]) -> None:
        self.splits = setting is not None
        self.longest = list(longest) if setting == AUTO else []
        self.parts = 1 if setting is None or setting == AUTO else -(-batch_size // int(setting))
        self.halved_at: list[int] = []  # optimiser steps in which memory ran out; 0: when it was tried

    def of(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The parts of a batch, whose tensors and lists have one row for each example."""
        examples = _examples(batch)
        parts = min(self.parts, examples)
        cuts = [part * examples // parts for part in range(parts + 1)]
        for start, stop in pairwise(cuts):
            yield {name: column[start:stop] for name, column in batch.items()}

    def halve(self, step: int) -> None:
        """Parts of half the size from now on."""
        self.parts *= 2
        self.halved_at.append(step)

    @property
    def notes(self) -> dict[str, Any]:
        """What the record keeps; empty where batches stay whole."""
        return {"parts": self.parts, "halved_at": self.halved_at} if self.splits else {}


class MicroBatched(Trainer):
    """Trainer that accumulates the gradients of a batch's parts, and of `accumulation` batches, as those of one batch.

    The loss of an optimiser step is the mean over all its items, which are target tokens, or examples of a task with
    one label each: a part with n_i of the N items weighs n_i / N, and one without an item nothing. (Trainer leaves the
    weights to the models, of which those with a loss of their own, such as BART's, give each batch's mean: two batches
    then weigh 2 and not 1.)

    Where memory runs out, the gradients of the step are computed anew from parts of half the size. Weights and
    optimiser are then still those that the step before left.
    """

    micro: MicroBatches
    _batches: Sequence[Mapping[str, Tensor]]  # of the optimiser step
    _begun: int  # how many of these have been begun

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._batches, self._begun = batches, 0
        return batches, items

    def training_step(self, model: PreTrainedModel, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.micro.longest:
            self._try(model, num_items_in_batch)
        self._begun += 1
        return self._accumulate(model, [inputs], num_items_in_batch, self.state.global_step + 1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the items; 0 where there are none, and not 0 / 0. The GPU is not waited for."""
        count = self._count(inputs)  # before Trainer, for label smoothing, takes the labels out
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss if return_outputs else torch.where(count > 0, loss, loss.new_zeros(()))

    def _accumulate(self, model: PreTrainedModel, todo: Sequence[Any], items: Any, step: int) -> Tensor:
        """Add up the gradients of the batches `todo`; returns the last one's share of the loss."""
        while True:
            try:
                for batch in todo:
                    loss = self._add_gradients(model, batch, items)
                return loss
            except RuntimeError as error:
                if not self.micro.splits or not out_of_memory(error) or self.micro.parts >= max(map(_examples, todo)):
                    raise
            # An error in the midst of a backward pass leaves some tensors with gradients and some without.
            model.zero_grad()
            make_room()
            self.micro.halve(step)
            todo = self._batches[: self._begun]

    def _add_gradients(self, model: PreTrainedModel, batch: Any, items: Any) -> Tensor:
        if self.micro.parts == 1 and len(self._batches) == 1:
            whole: Tensor = super().training_step(model, batch, items)
            return whole
        model.train()
        whole_count = torch.stack([self._count(each) for each in self._batches]).sum().clamp(min=1)
        losses = []
        for part in self.micro.of(self._prepare_inputs(batch)):
            count = self._count(part)
            with self.compute_loss_context_manager():
                mean = self.compute_loss(model, part, num_items_in_batch=None if items is None else count)
            loss = mean * (count / whole_count.to(count.device))
            self.accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _try(self, model: PreTrainedModel, items: Any) -> None:
        """One step's gradients of the longest examples, beside what the optimiser will keep; then all is as before."""
        batches = self._batches
        examples = [self.train_dataset[index] for index in self.micro.longest]
        self.micro.longest = []
        device = model.device
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        kept = torch.empty(0 if self.optimizer.state else MOMENTS * trained, device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._batches, self._begun = [self._prepare_inputs(self.data_collator(examples))], 1
            self._accumulate(model, self._batches, items, step=0)
        model.zero_grad()
        del kept
        self._batches, self._begun = batches, 0

    def _count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The items of a batch. A decoder alone predicts each token but the first."""
        labels = batch["labels"]
        if labels.dim() == 1:
            return torch.full((), len(labels), device=labels.device)
        return (labels if self.model.config.is_encoder_decoder else labels[:, 1:]).ne(IGNORED).sum()


def _examples(batch: Mapping[str, Tensor]) -> int:
    return len(batch["labels"])
