"""Compute batches that do not fit in memory in parts: `trainer.micro_batch`. The gradient is that of the whole batch.

transformers' `auto_find_batch_size`, and accelerate's `find_executable_batch_size` that it uses, start again with a
smaller batch, and so train something else. Here the batch stays the same: the gradients of its parts are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from peftbench.tasks.batch import get_labels, predicts_next
from peftbench.training.noise import OwnNoise
from peftbench.training.shares import ADDED, CHECK, COUNTED, WHOLE, count_items
from peftbench.utils.memory import is_out_of_memory, make_room
from peftbench.utils.team import Team

AUTO = "auto"
MOMENTS = 2  # tensors that AdamW keeps for each trained tensor


class MicroBatches:
    """The number of parts that each batch is split into.

    Args:
        setting: `trainer.micro_batch`: examples in a part, as text; auto: as many as fit; None: batches are not split.
        batch_size: examples in a batch.
        longest: a batch of the longest training examples, by their indices, to try whether memory is enough.
    """

    def __init__(self, setting: str | None, batch_size: int, longest: Sequence[int]) -> None:
        self.splits = setting is not None
        self.longest = list(longest) if setting == AUTO else []
        self.parts = 1 if setting is None or setting == AUTO else -(-batch_size // int(setting))
        self.halved_at: list[int] = []  # optimiser steps in which memory ran out; 0: during the trial

    def of(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parts of a batch whose tensors and lists have one row for each example."""
        examples = _count_examples(batch)
        parts = min(self.parts, examples)
        if parts == 1:
            yield dict(batch)
            return
        cuts = [part * examples // parts for part in range(parts + 1)]
        for start, stop in pairwise(cuts):
            yield {name: column[start:stop] for name, column in batch.items()}

    def halve(self, step: int) -> None:
        """Halve the size of the parts from now on."""
        self.parts *= 2
        self.halved_at.append(step)

    @property
    def notes(self) -> dict[str, Any]:
        """Return what the record stores; empty if batches are not split."""
        return {"parts": self.parts, "halved_at": self.halved_at} if self.splits else {}


class MicroBatched(Trainer):
    """Trainer that accumulates the gradients of a batch's parts, of `accumulation` batches, and of the processes that
    share them, as those of one batch.

    The loss of an optimiser step is the mean over all its items. Items are tokens with a label, or the examples of a
    task with one label each. A part with n_i of the N items has the weight n_i / N, a part without items none. (Trainer
    leaves the weighting to the models. Those with their own loss, such as BART's, return each batch's mean: two batches
    then have the weight 2 and not 1.)

    If memory runs out, the gradients of the step are computed again from parts of half the size. Weights and optimiser
    are then still in the state after the previous step.

    Each process computes its own rows. After the last batch of a step, gradients and losses are added up, so that all
    processes clip, log and update as one would.

    Args:
        micro: splits the batches.
        team: the processes that share them, see `shares`.
        noise: how they draw random numbers.
        lockstep: they wait for each other while they compute, see `Team.lockstep`.
        others: the arguments of the next class, such as Trainer's.
    """

    trained: Sequence[nn.Parameter]

    def __init__(
        self, *, micro: MicroBatches, team: Team, noise: OwnNoise, lockstep: bool = False, **others: Any
    ) -> None:
        self.micro, self.team, self.noise = micro, team, noise
        self.together: Callable[[], AbstractContextManager[None]] = team.lockstep if lockstep else nullcontext
        self._batches: Sequence[Mapping[str, Tensor]] = []  # batches of the optimiser step
        self._begun = 0  # how many of them have been started
        self._losses: list[Tensor] = []  # of these
        super().__init__(**others)
        if self.model.config.is_encoder_decoder:
            # Some versions of transformers take BART's loss for one of shifted labels, and do not count first tokens.
            self._loss_shifts_labels = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._batches, self._begun, self._losses = batches, 0, []
        return batches, items

    def training_step(self, model: PreTrainedModel, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.micro.longest:
            self._try(model, num_items_in_batch)
        if self._begun == 0:
            self.noise.begin_step(self.state.global_step)
        self._begun += 1
        with self.together():
            loss = self._accumulate(model, [inputs], num_items_in_batch, self.state.global_step + 1)
        if self.team.size == 1:
            return loss
        self._losses.append(loss)
        if self._begun < len(self._batches):
            return torch.zeros_like(loss)
        return self._add_up(torch.stack(self._losses).sum().float())

    def _add_up(self, loss: Tensor) -> Tensor:
        """Add up the gradients of all processes; return the sum of their losses."""
        checks = [batch[CHECK][0] for batch in self._batches]
        check = crc32(repr(checks).encode())
        with self.team.steady():
            present = [index for index, p in enumerate(self.trained) if p.grad is not None]
            reached = crc32(repr(present).encode())
            parts, *ends = self.team.find_highest(self.micro.parts, check, -check, reached, -reached)
            if ends[0] != -ends[1]:
                raise RuntimeError("the processes of this run have different batches")
            if ends[2] != -ends[3]:  # a layer that one process has left out at random
                present = sorted(set().union(*self.team.gather(present)))
            gradients = [self._get_gradient(self.trained[index]) for index in present]
            self.team.add_up([*gradients, loss])
        while self.micro.parts < parts:  # memory ran out in another process
            self.micro.halve(self.state.global_step + 1)
        return loss

    @staticmethod
    def _get_gradient(parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean over the items, or 0 instead of 0 / 0 if there are none. Does not wait for the GPU."""
        count = self._count(inputs)  # before Trainer removes the labels, for label smoothing
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss if return_outputs else torch.where(count > 0, loss, loss.new_zeros(()))

    def _accumulate(self, model: PreTrainedModel, todo: Sequence[Any], items: Any, step: int) -> Tensor:
        """Add up the gradients of the batches `todo`; return the last one's share of the loss."""
        while True:
            try:
                for batch in todo:
                    loss = self._add_gradients(model, batch, items)
                return loss
            except RuntimeError as error:
                if (
                    not self.micro.splits
                    or not is_out_of_memory(error)
                    or self.micro.parts >= max(map(_count_examples, todo))
                ):
                    raise
            # An error in the middle of a backward pass leaves some tensors with gradients and some without.
            model.zero_grad()
            make_room()
            self.micro.halve(step)
            todo = self._batches[: self._begun]

    def _add_gradients(self, model: PreTrainedModel, batch: Any, items: Any) -> Tensor:
        if self.micro.parts == 1 and len(self._batches) == 1 and self.team.size == 1:
            whole: Tensor = super().training_step(model, batch, items)
            return whole
        model.train()
        batch = self._prepare_inputs(batch)
        # A recorded step has one batch, and reads nothing else.
        step = [batch] if len(self._batches) == 1 else self._batches
        whole_count = torch.stack([self._count_whole(each) for each in step]).sum().clamp(min=1)
        losses = []
        for part in self.micro.of(batch):
            count = self._count(part)
            own = {name: column for name, column in part.items() if name not in ADDED}
            with self.noise.drawing(part):  # the backward pass may compute activations again
                with self.compute_loss_context_manager():
                    # Never 0, which transformers divides by; a part without items has the weight 0 anyway.
                    divisor = None if items is None else count.clamp(min=1)
                    mean = self.compute_loss(model, own, num_items_in_batch=divisor)
                loss = mean * (count / whole_count.to(count.device))
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _try(self, model: PreTrainedModel, items: Any) -> None:
        """Compute the gradients of the longest examples, next to the optimiser's future state; then restore all."""
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
        """Count the items of a batch, or of a process's rows."""
        labels = get_labels(batch)
        if COUNTED in batch and labels.dim() == 1:
            return batch[COUNTED].sum()
        return count_items(labels, predicts_next(self.model))

    def _count_whole(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Count the items of a batch of which these are a process's rows."""
        return batch[WHOLE][0] if WHOLE in batch else self._count(batch)


def _count_examples(batch: Mapping[str, Tensor]) -> int:
    return len(get_labels(batch))
