"""Checkpoints from which an interrupted training resumes: the trained tensors, the optimiser and the random numbers.

transformers' Trainer writes and reads them; they contain only those weights that are trained (`Resumable`). On a CPU, a
training that resumes from one ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftbench.modification.state import list_needed, read_tensors, write_tensors
from peftbench.utils.stopping import is_asked
from peftbench.utils.team import Team

TENSORS = "trained.safetensors"
NOTES = "peftbench.json"
LAST_WRITTEN = "trainer_state.json"  # Trainer writes it last: if it is complete, the checkpoint is


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a training."""

    folder: Path
    step: int  # optimiser steps done
    notes: dict[str, Any]  # what `Resumable.notes` returned when it was written


@dataclass(frozen=True)
class Checkpoints:
    """Where the checkpoints of one training are stored and how often one is written."""

    folder: Path
    minutes: float  # of training between two checkpoints; 0: one at every logged step
    stamp: str  # states all that must be the same for a training to resume, such as the data

    def take_up(self) -> Checkpoint | None:
        """Return the newest complete checkpoint with our stamp, or None. Delete the others, which will not be used."""
        newest = max(self._whole(), key=lambda checkpoint: checkpoint.step, default=None)
        for folder in self._folders():
            if newest is None or folder != newest.folder:
                shutil.rmtree(folder)
        return newest

    def _folders(self) -> list[Path]:
        return list(self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))

    def _whole(self) -> Iterator[Checkpoint]:
        for folder in self._folders():
            try:
                step = json.loads((folder / LAST_WRITTEN).read_text(encoding="utf-8"))["global_step"]
                notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # the process ended while it wrote this one
                continue
            if notes["stamp"] == self.stamp:
                yield Checkpoint(folder, step, notes)


class Resumable(Trainer):
    """Trainer whose checkpoints contain only those of the model's weights that are trained.

    Args:
        notes: returns JSON values to store with them.
        others: the arguments of the next class, such as Trainer's.
    """

    model: PreTrainedModel

    def __init__(self, *, notes: Callable[[], dict[str, Any]], **others: Any) -> None:
        self.notes = notes
        super().__init__(**others)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(list_needed(self.model), folder / TENSORS)
        (folder / NOTES).write_text(json.dumps(self.notes()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_tensors(self.model, Path(resume_from_checkpoint) / TENSORS)


class SaveByTime(TrainerCallback):
    """Requests a checkpoint after every `minutes` minutes of training, at a step whose loss is logged.

    Between two logged steps Trainer has a running sum of the loss that checkpoints do not contain. The last step needs
    no checkpoint.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = time.monotonic() - self.since >= self.seconds
        if due and state.global_step % state.logging_steps == 0 and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.since = time.monotonic()


class StopWhenAsked(TrainerCallback):
    """Ends the training with a checkpoint at the end of the step in which a scheduler asked the process to end.

    The step's loss is logged, since checkpoints do not contain a running sum. The last step needs no checkpoint. Of
    several processes the leader is asked.
    """

    def __init__(self, team: Team) -> None:
        self.team = team

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        (asked,) = self.team.find_highest(int(is_asked()))
        if asked and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True
