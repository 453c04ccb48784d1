"""What a method leaves of the backbone's general ability: `retention=FILE|docstrings`.

The loss and the accuracy of the backbone's own language model on a general text, before the training and with what was
trained. The language model is loaded by itself, with the head of the backbone's files, because the task may have
another one; what was trained is put into it by name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from peftbench.backbones.load import Backbone, load_language_model
from peftbench.backbones.precision import autocast, choose_autocast_dtype, choose_device, resolve_dtype
from peftbench.config.schema import Run
from peftbench.evaluation.general_text import Block, GeneralText, make_blocks, read_general_text
from peftbench.modification.attach import attach_run
from peftbench.modification.state import FILE_NAME, fold, list_needed, load_tensors
from peftbench.records.record import LanguageModelling, Retention
from peftbench.tasks.batch import NO_TOKEN
from peftbench.utils.errors import UserError


def measure_before(run: Run) -> Retention:
    """Return how the bare backbone does on the run's general text.

    Raises:
        UserError: the text cannot be read, or the backbone has no language model of its own.
    """
    run = resolve_dtype(run)
    general = _read(run)
    backbone = _load(run)
    blocks = make_blocks(general, backbone.model, backbone.tokenizer)
    tokens = sum(int((block.labels != NO_TOKEN).sum()) for block in blocks)
    return Retention(general.name, general.stamp, tokens, compute_language_modelling(run, backbone.model, blocks))


def measure_after(run: Run, folder: Path, before: Retention) -> Retention:
    """Return the same with how the backbone does with what the run in `folder` has trained."""
    run = resolve_dtype(run)
    backbone = _load(run)
    blocks = make_blocks(_read(run), backbone.model, backbone.tokenizer)
    attach_run(backbone.model, run)
    put_trained_tensors(backbone.model, folder / "adapter" / FILE_NAME)
    return replace(before, after=compute_language_modelling(run, backbone.model, blocks))


def is_measured(run: Run, retention: Retention | None) -> bool:
    """Return whether a record has what the run asks for, on the same text."""
    if run.retention is None:
        return True
    return retention is not None and retention.after is not None and retention.stamp == _read(run).stamp


def _read(run: Run) -> GeneralText:
    assert run.retention is not None
    return read_general_text(run.retention)


def _load(run: Run) -> Backbone:
    device = choose_device(run.trainer)
    try:
        backbone = load_language_model(run.model, run.task, device)
    except UserError as error:
        why = " ".join(error.faults)
        raise UserError(
            f"retention={run.retention} loads the backbone's own language model, head too: {why}"
        ) from error
    backbone.model.to(device).eval()
    return backbone


@torch.no_grad()
def put_trained_tensors(model: PreTrainedModel, file: Path) -> None:
    """Copy what was trained in a model of the same backbone, with the same modifications, into one with another head.

    What is trained in the new head alone keeps its values. Folds the model.

    Raises:
        UserError: the file lacks a tensor, or has one of another shape.
    """
    fold(model)
    prefix, other = f"{model.base_model_prefix}.", "transformer."  # the latter is that of LlamaForQuestionAnswering
    saved = {name.removeprefix(prefix).removeprefix(other): tensor for name, tensor in load_tensors(file).items()}
    head = model.get_output_embeddings()  # T5's is in its base
    in_base = {id(tensor) for tensor in model.base_model.parameters()}
    in_base -= set() if head is None else {id(tensor) for tensor in head.parameters()}
    for name, tensor in list_needed(model).items():
        found = saved.get(name.removeprefix(prefix))
        if found is None and id(tensor) not in in_base:
            continue
        if found is None or found.shape != tensor.shape:
            raise UserError(f"{file} has no tensor {name} of shape {tuple(tensor.shape)}: it was trained otherwise.")
        tensor.copy_(found)


@torch.no_grad()
def compute_language_modelling(run: Run, model: PreTrainedModel, blocks: list[Block]) -> LanguageModelling:
    """Return the mean cross-entropy in nats and the accuracy in percent over all predicted tokens of the blocks."""
    total, right, tokens = 0.0, 0, 0
    dtype = choose_autocast_dtype(run.trainer, run.model, model)
    for block in blocks:
        with autocast(model.device, dtype):
            logits = _compute_logits(model, block)
        labels = block.labels.to(model.device)
        counted = labels != NO_TOKEN
        chosen, wanted = logits[counted].float(), labels[counted]
        total += float(F.cross_entropy(chosen, wanted, reduction="sum"))
        right += int((chosen.argmax(-1) == wanted).sum())
        tokens += len(wanted)
    return LanguageModelling(total / tokens, 100 * right / tokens)


def _compute_logits(model: PreTrainedModel, block: Block) -> Tensor:
    """Return (1, tokens, vocabulary)."""
    ids = block.input_ids.to(model.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if block.decoder_input_ids is not None:
        given["decoder_input_ids"] = block.decoder_input_ids.to(model.device)
    cache = {"use_cache": False} if model.can_generate() else {}
    logits: Tensor = model(**given, **cache).logits
    return logits
