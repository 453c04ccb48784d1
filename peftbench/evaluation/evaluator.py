"""Score a model on one role of a task's data: its decoded predictions are compared with the references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from peftbench.backbones.precision import choose_autocast_dtype
from peftbench.backbones.sites import set_configs
from peftbench.config.schema import LOSS, Quantization, Run, TaskKind
from peftbench.config.stamps import stamp_content
from peftbench.evaluation.partial import Partial
from peftbench.evaluation.predict import compute_mean_loss, end_ids, measure_cut_off, predict
from peftbench.tasks.base import TaskData
from peftbench.tasks.batch import NO_TOKEN
from peftbench.tasks.tokens import count_positions
from peftbench.utils.errors import UserError
from peftbench.utils.team import ALONE, Team

Read = Callable[[Any, dict[str, Tensor]], Tensor]  # see `TaskData.read_outputs`


class Evaluator:
    """Scores one model on the splits of one task, always in the same way, and with the other processes of `team`.

    `cut_off` contains, for each role for which texts were generated, the share that ended at the maximum length.
    """

    def __init__(
        self, model: PreTrainedModel, data: TaskData, run: Run, team: Team = ALONE, read: Read | None = None
    ) -> None:
        self.model, self.data, self.team = model, data, team
        self.read = data.read_outputs if read is None else read  # `score` needs what `TaskData.decode` reads
        self.batch_size, self.max_tokens = run.trainer.eval_batch_size, run.trainer.eval_batch_tokens
        self.label_smoothing = run.trainer.label_smoothing
        self.by_loss = run.task.selection_metric == LOSS
        self.autocast_dtype = choose_autocast_dtype(run.trainer, run.model, model)
        self.generation = _configure_generation(model, run) if run.task.kind is TaskKind.text_to_text else None
        self.run = run
        self.cut_off: dict[str, float] = {}

    def selection(self) -> dict[str, float]:
        """Return what states are selected by: the metrics on the selection split, or its loss, as in training."""
        if not self.by_loss:
            return self.score("selection")[0]
        loss = compute_mean_loss(
            self.model,
            self.data.selection,
            self.data.collator,
            self.batch_size,
            self.label_smoothing,
            autocast_dtype=self.autocast_dtype,
            team=self.team,
        )
        return {LOSS: loss}

    def partial(self, path: Path, adapter: Path) -> Partial | None:
        """Return the store of generated texts until all are complete; None for a task that generates no text.

        Args:
            path: of the file.
            adapter: the folder with the trained tensors.
        """
        return None if self.generation is None else self.store(path, adapter)

    def store(self, path: Path, adapter: Path) -> Partial:
        """Return the store of what is predicted until all is complete, with a stamp of all that it depends on."""
        model, task = self.run.model, self.run.task
        source = stamp_content(model.path) if model.path else f"{model.hub_id} {model.revision}"
        reads: list[Any] = [task.max_source_length, task.prompt, task.source_language, task.target_language]
        reads.extend(filter(None, [self.data.reading()]))
        reads.extend([] if task.messages_column is None else [task.max_length])
        reads.extend([] if model.quantization is Quantization.none else [model.quantization.name])
        written = self.read.__name__ if self.generation is None else self.generation.to_json_string()
        how = [written, str(self.autocast_dtype), model.dtype.name, *reads]
        return Partial(path, json.dumps([source, stamp_content(adapter), self.data.fingerprint, *how]))

    def score(
        self, role: str, on_batch: Callable[[int], None] = lambda examples: None, partial: Partial | None = None
    ) -> tuple[dict[str, float], list[str]]:
        """Return the metrics on a role of the data, and each example's prediction as text."""
        decoded = self.data.decode(self.predict(role, on_batch, partial), role)
        return self.team.decide(lambda: self.data.score(decoded, getattr(self.data, f"{role}_rows"))), decoded

    def predict(
        self, role: str, on_batch: Callable[[int], None] = lambda examples: None, partial: Partial | None = None
    ) -> np.ndarray:
        """Return what `read` keeps of the model's outputs for a role of the data, or the ids of texts."""
        # `generate` replaces unset values by the backbone's own: those of a chat model would make it sample.
        with set_configs([] if self.generation is None else [self.model], "generation_config", GenerationConfig()):
            predictions = predict(
                self.model,
                getattr(self.data, role),
                self.data.collator,
                self.batch_size,
                max_tokens=self.max_tokens,
                read=self.read,
                generation=self.generation,
                autocast_dtype=self.autocast_dtype,
                partial=partial,
                on_batch=on_batch,
                team=self.team,
            )
        if self.generation is not None:
            begun = 1 if self.model.config.is_encoder_decoder else 0  # the token with which a decoder begins
            self.cut_off[role] = measure_cut_off(predictions, self.generation, begun)
            # An end token is not part of the text, even if the tokenizer does not call it special.
            predictions = np.where(np.isin(predictions, end_ids(self.generation)), NO_TOKEN, predictions)
        return predictions


def _configure_generation(model: PreTrainedModel, run: Run) -> GenerationConfig:
    """Return the backbone's own special tokens with the task's beam search.

    The search ends by the backbone's rule (early_stopping for BART-large, as in the paper's code), and writes no more
    tokens than the backbone has positions.

    Raises:
        UserError: the task's `max_length` has no room for a generated token.
    """
    wanted = run.task.generation
    assert model.generation_config is not None
    settings = model.generation_config.to_dict()
    own = {key: value for key, value in settings.items() if key.endswith("_token_id") or key == "early_stopping"}
    if model.config.is_encoder_decoder:
        if wanted.max_length < 2:
            raise UserError(
                f"task.generation.max_length={wanted.max_length}: an encoder-decoder's text begins with a token of its "
                "own, which counts; give 2 or more."
            )
        longest = min(wanted.max_length, count_positions(model) or wanted.max_length)
        lengths = {"min_length": min(wanted.min_length, longest), "max_length": longest}
    else:  # min_length and max_length would count the prompt
        lengths = {"min_new_tokens": wanted.min_length, "max_new_tokens": wanted.max_length}
    return GenerationConfig(
        **own,
        **lengths,
        num_beams=wanted.num_beams,
        no_repeat_ngram_size=wanted.no_repeat_ngram_size,
        length_penalty=wanted.length_penalty,
    )
