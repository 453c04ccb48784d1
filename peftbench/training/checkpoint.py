"""Checkpoints from which an interrupted training resumes: the trained tensors, the optimiser and the random numbers.

transformers' Trainer writes and reads them; they contain only those weights that are trained (`Resumable`). On a CPU, a
training that resumes from one ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftbench.config.stamps import stamp_content
from peftbench.modification.state import list_needed, read_tensors, write_tensors
from peftbench.records.record import decode
from peftbench.utils.files import read_json, replace_file
from peftbench.utils.stopping import is_asked
from peftbench.utils.team import Team

TENSORS = "trained.safetensors"
NOTES = "peftbench.json"
LAST_WRITTEN = "trainer_state.json"  # Trainer writes it last: if it is there, the checkpoint is complete
SEAL = "seal.json"  # a hash of each other file, written after them
# Other than these: what each process of a training writes by itself, and what a killed process has left.
UNSEALED = re.compile(r"seal\.json.*|rng_state_\d+\.pth|.*\.tmp")
NEEDED = (TENSORS, "optimizer.pt", "scheduler.pt")  # without the last two, Trainer begins with new ones


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

    def take_up(self, say: Callable[[str], None] = lambda sentence: None) -> Checkpoint | None:
        """Return the newest sound checkpoint with our stamp, or None. Delete the others, which will not be used.

        Args:
            say: takes a sentence on each checkpoint that is damaged and therefore passed over.
        """
        newest = max(self._whole(say), key=lambda checkpoint: checkpoint.step, default=None)
        for folder in self._folders():
            if newest is None or folder != newest.folder:
                shutil.rmtree(folder)
        return newest

    def _folders(self) -> list[Path]:
        return list(self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))

    def _whole(self, say: Callable[[str], None]) -> Iterator[Checkpoint]:
        for folder in self._folders():
            if not (folder / LAST_WRITTEN).exists():  # the process ended while it wrote this one
                continue
            try:
                _check_files(folder)
                step = decode(int, read_json(folder / LAST_WRITTEN)["global_step"], "global_step")
                notes = read_json(folder / NOTES)
                if notes["stamp"] != self.stamp:
                    continue
                decode(float, notes["seconds"], "seconds")
            except (OSError, ValueError, TypeError, KeyError) as error:
                odd = f"{LAST_WRITTEN} or {NOTES} is not as it was written"
                reason = odd if isinstance(error, TypeError | KeyError) else getattr(error, "strerror", None) or error
                say(f"{folder} is damaged ({reason}): it is passed over.")
                continue
            yield Checkpoint(folder, step, notes)


def _seal(folder: Path) -> None:
    """Note a hash of each file of a checkpoint that is complete. Files of other processes may not be."""
    stamps = {file.name: stamp_content(file) for file in _list_sealed(folder)}
    with replace_file(folder / SEAL) as sealed:
        json.dump(stamps, sealed)


def _list_sealed(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not UNSEALED.fullmatch(file.name)]


def _check_files(folder: Path) -> None:
    """Raise ValueError or OSError if a file of a checkpoint is not as it was written.

    Without a seal, because the process ended just before it or an earlier version wrote the checkpoint, only what can
    be seen in the files themselves is checked.
    """
    if (folder / SEAL).exists():
        sealed = dict(read_json(folder / SEAL))
        if odd := sorted(sealed.keys() ^ {file.name for file in _list_sealed(folder)}):
            raise ValueError(f"{odd[0]} is missing, or was not there")
        for name, stamp in sealed.items():
            if stamp_content(folder / name) != stamp:
                raise ValueError(f"{name} is not as it was written")
        return
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ValueError(f"{missing[0]} is missing")
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):  # checks the header, and the length of the file
                    pass
            except SafetensorError as error:
                raise ValueError(f"{file.name}: {error}") from error
        elif file.suffix in (".pt", ".pth"):
            try:
                with ZipFile(file) as archive:
                    broken = archive.testzip()
            except BadZipFile as error:
                raise ValueError(f"{file.name}: {error}") from error
            if broken is not None:
                raise ValueError(f"{file.name} is not as it was written")


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

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if not re.search(r"PytorchStreamWriter|inline_container", str(error)):
                raise
            # torch.save does not say why it cannot write
            raise OSError(
                errno.ENOSPC, "no space left, or a limit on the size of files", self.args.output_dir
            ) from error
        if self.args.should_save:
            _seal(Path(self._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

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
