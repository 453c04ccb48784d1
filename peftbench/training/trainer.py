"""transformers' Trainer with peftbench's evaluation, batches and fast paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerControl

from peftbench.training.batching import LengthBatches
from peftbench.training.best import KeepBest
from peftbench.training.checkpoint import Resumable
from peftbench.training.divergence import StopWhereDiverged
from peftbench.training.micro_batch import MicroBatched
from peftbench.training.paths import FastPaths
from peftbench.training.replay import Recorder, Replayed

ITEMS = "items"  # beside a batch's tensors: by how many target tokens or examples the optimiser step divides

Evaluate = Callable[[], dict[str, float]]


class FineTuner(MicroBatched, Resumable):
    """Trainer whose evaluation is peftbench's own, the same as that of the report."""

    trained: Sequence[nn.Parameter]
    scores: Evaluate
    keeper: KeepBest | None = None
    diverging: StopWhereDiverged
    batches: LengthBatches | None = None  # None: random ones
    paths = FastPaths()
    replayed: Replayed | None = None
    control: TrainerControl

    def record_steps(self, recorder: Recorder | None, *, required: bool) -> None:
        """Record the step of each shape of batch and replay it; see `Replayed`."""
        self.replayed = Replayed(self._whole_batch, self.trained, recorder, required=required)

    @property
    def paths_taken(self) -> list[str]:
        """The fast paths that the training takes, by their keys."""
        replays = self.replayed is not None and self.replayed.recorder is not None
        return [*self.paths.taken, *(["graphs"] if replays else [])]

    @property
    def replay_bytes(self) -> int:
        """GPU memory of a replayed step, what is allocated between steps and what its graphs hold; 0 without graphs."""
        recorder = None if self.replayed is None else self.replayed.recorder
        if recorder is None or recorder.memory == 0:
            return 0
        allocated: int = torch.cuda.memory_allocated(self.args.device)
        return allocated + recorder.memory

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.keeper is not None and output_dir is not None:
            self.keeper.save(Path(output_dir))

    def get_train_dataloader(self) -> Any:  # accelerate's shard of a DataLoader
        if self.batches is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.paths.active():
            loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def _add_gradients(self, model: PreTrainedModel, batch: Any, items: Any) -> Tensor:
        if self.replayed is None:
            return super()._add_gradients(model, batch, items)
        inputs = self._prepare_inputs(batch)
        if self.paths.padding_free is not None:
            inputs = self.paths.padding_free.rows(inputs)
        if items is not None:
            inputs = {**inputs, ITEMS: torch.as_tensor(items, device=self.args.device)}
        return self.replayed(inputs)

    def _whole_batch(self, inputs: dict[str, Any]) -> Tensor:
        """Add a batch's gradients; returns its loss. What is recorded."""
        return super()._add_gradients(self.model, inputs, inputs.pop(ITEMS, None))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = self.paths.inputs(inputs)
        token_loss = self.paths.token_loss
        if token_loss is None or return_outputs or inputs["labels"].dim() < 2:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return token_loss(inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: PreTrainedModel) -> Any:
        """Of what is trained: to look for it among all of a backbone's tensors takes milliseconds, at every step."""
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not Trainer's estimate, which walks through all modules at every step; `arithmetic` has what is recorded."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not self.diverging.may_look(self.model, self.state, self.control):
            return {}
        if self.replayed is not None and _crowded(self.args.device):
            self.replayed.release()  # nothing but graphs can use their memory
        metrics = {f"eval_{name}": value for name, value in self.scores().items()}
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()  # runs that share the GPU may need what a generation took
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _crowded(device: torch.device) -> bool:
    """Whether less than half of a GPU's memory is free."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < total / 2
