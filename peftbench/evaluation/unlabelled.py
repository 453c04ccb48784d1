"""Predictions of a finished run for inputs without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.special import softmax

from peftbench.backbones.precision import choose_device, resolve_dtype
from peftbench.config.schema import Run, TaskKind
from peftbench.config.unread import PREDICT
from peftbench.config.validity import find_faults
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.finished import read_saved_run, restore_backbone
from peftbench.records.record import Record
from peftbench.tasks.base import TaskData
from peftbench.tasks.inputs import read_inputs
from peftbench.tasks.prepare import prepare_data
from peftbench.tasks.token_classification import TokenClassification
from peftbench.utils.errors import UserError
from peftbench.utils.progress import Display


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one input.

    Args:
        name: "index", the number of the input from 0, and its "id" if the rows have one.
        value: a label, the labels of all words, a text or, for a regression, a number.
        probabilities: of the labels, in the order of their codes; of labels of words a list, with None for a word of
            which the tokenizer keeps nothing; None if there are no labels.
    """

    name: dict[str, Any]
    value: str | float
    probabilities: Mapping[str, float | list[float | None]] | None = None


def read_run_to_predict(folder: Path, record: Record, overrides: Sequence[str]) -> Run:
    """Return the run in `folder` with overrides, without its data, which need not exist.

    Raises:
        UserError: an override is wrong, or the backbone is not that of the run.
    """
    run = read_saved_run(folder, record, overrides, PREDICT)
    nothing: dict[str, Any] = dict.fromkeys(("data_dir", "train_file", "validation_file", "test_file"))
    run = replace(run, task=replace(run.task, **nothing, data_files={}))
    if found := find_faults(run, reads_data=False):
        raise UserError(*found)
    return run


def predict_inputs(
    folder: Path, run: Run, place: str, form: str | None, console: Console, kept: Path | None = None
) -> list[Prediction]:
    """Return what the run in `folder` predicts for each input, in their order.

    Args:
        place, form: see `tasks.inputs.read_inputs`.
        console: for progress and notes.
        kept: the file in which predictions are stored while they are made, so that the next call, with the same run and
            inputs, need not make them again. The caller deletes it. None: none.

    Raises:
        UserError: the inputs cannot be read.
    """
    loaded = read_inputs(run.task, place, form)
    if not loaded.sizes["input"]:
        return []
    with Display(console) as display:
        with display.stage("prepare"):
            run = resolve_dtype(run)
            backbone = restore_backbone(folder, run, loaded.task, choose_device(run.trainer))
            data = prepare_data(loaded, backbone.tokenizer, backbone.model)
            _fill_empty(data)
            backbone.model.to(choose_device(run.trainer))
            read = data.read_logits if isinstance(data, TokenClassification) else None
            evaluator = Evaluator(backbone.model, data, run, read=read)
        for note in (*backbone.notes, *data.notes):
            display.say(note)
        store = None if kept is None else evaluator.store(kept, folder / "adapter")
        with display.stage("predict", len(data.report)) as stage:
            predicted = evaluator.predict("report", stage.advance, store)
    return _collect(data, run, predicted)


def _fill_empty(data: TaskData) -> None:
    """Give inputs without any token one: a tokenizer without special tokens makes none of an empty line, and no model
    can read that."""
    rows = data.report
    if all(len(ids) for ids in rows["input_ids"]):
        return
    token = data.tokenizer.eos_token_id if data.tokenizer.pad_token_id is None else data.tokenizer.pad_token_id

    def fill(row: dict[str, Any]) -> dict[str, Any]:
        return {} if row["input_ids"] else {"input_ids": [token], "attention_mask": [1]}

    data.report = rows.map(fill, keep_in_memory=True)


def _collect(data: TaskData, run: Run, predicted: np.ndarray) -> list[Prediction]:
    names = data.name_rows(data.report_rows)
    if isinstance(data, TokenClassification):
        decoded = data.decode(predicted.argmax(axis=1))
        return [Prediction(*one) for one in zip(names, decoded, data.probabilities(predicted), strict=True)]
    decoded = data.decode(predicted)
    if run.task.kind is TaskKind.regression:
        return [Prediction(name, float(number)) for name, number in zip(names, decoded, strict=True)]
    if run.task.kind is not TaskKind.classification:
        return [Prediction(name, text) for name, text in zip(names, decoded, strict=True)]
    shares = softmax(predicted.astype(np.float64), axis=1)
    found = [dict(zip(data.task.labels, map(float, row), strict=True)) for row in shares]
    return [Prediction(*one) for one in zip(names, decoded, found, strict=True)]
