"""Predict for a whole data set: what a task reads of a model's outputs, generated ids for text; and compute the loss.

Examples are batched by length, so that there is little padding, and are returned in their original order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor, PreTrainedModel

from peftbench.backbones.attention_kernels import avoid_cudnn_attention
from peftbench.backbones.precision import autocast
from peftbench.backbones.sites import has_plain_logits
from peftbench.evaluation.inference import prepare_inference
from peftbench.evaluation.kv_cache import NewCache, make_caches
from peftbench.evaluation.partial import Partial
from peftbench.modification.state import fold_tensors
from peftbench.tasks.batch import NO_TOKEN, Collator
from peftbench.training.sharding import is_sharded
from peftbench.training.token_loss import TokenLoss, sum_own_losses
from peftbench.utils.memory import is_out_of_memory, make_room
from peftbench.utils.team import ALONE, Team


def predict(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    *,
    max_tokens: int | None = None,
    read: Callable[[Any, dict[str, Tensor]], Tensor] = lambda outputs, batch: outputs.logits.float(),
    generation: GenerationConfig | None = None,
    autocast_dtype: torch.dtype | None = None,
    partial: Partial | None = None,
    on_batch: Callable[[int], None] = lambda examples: None,
    team: Team = ALONE,
) -> np.ndarray:
    """Return what `read` returns for each example, or with `generation` ids; (examples, ..., longest), padded with
    `NO_TOKEN`.

    Args:
        batch_size: the maximum number of examples in a batch; it is halved when memory runs out.
        max_tokens: the maximum number of tokens of its inputs, padding included; None: any number.
        read: what of a model's outputs for a batch is returned; by default the logits.
        generation: how to generate; None: one forward pass.
        autocast_dtype: of the autocast to run under; None: without.
        partial: the rows that an earlier attempt has predicted, which are not predicted again; each batch is added.
        on_batch: is called with the number of examples of each batch.
        team: the processes that take a batch each, in turn. All of them return all rows; the leader has `partial`.
    """
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # the largest batch is tried first
    examples = drop_labels(dataset)
    rows: list[np.ndarray] = [np.empty(0)] * len(order)
    done = team.decide(lambda: {} if partial is None else partial.rows)
    for index, row in done.items():
        rows[index] = row
    order = [index for index in order if index not in done]
    if done:
        on_batch(len(done))
    sharded = is_sharded(model)
    with open_model(model, read, generation, autocast_dtype) as outputs:
        waiting = list(_split_batches(order, lengths, batch_size, max_tokens))
        while waiting:
            now, waiting = waiting[: team.size], waiting[team.size :]  # a batch for each process
            predicted: list[np.ndarray] | None = []
            if team.rank < len(now) or sharded:  # all compute if each has a share of the weights
                chosen = now[min(team.rank, len(now) - 1)]
                padded = collator([examples[i] for i in chosen])
                with team.lockstep() if sharded else nullcontext():
                    predicted = _try_batch(outputs, padded, model.device, last=len(chosen) == 1 or sharded)
            found = list(zip(now, team.gather(predicted), strict=False))
            for chosen, these in found:
                if these is None:
                    continue
                for index, row in zip(chosen, these, strict=True):
                    rows[index] = row
                if partial is not None:
                    partial.add(chosen, these)
                on_batch(len(chosen))
            if too_large := [chosen for chosen, these in found if these is None]:
                make_room()
                waiting = [half for each in (*too_large, *waiting) for half in _halve(each)]
    width = max((row.shape[-1] for row in rows), default=0)
    return np.stack([_widen(row, width) for row in rows])


def drop_labels(dataset: Dataset) -> Dataset:
    """Return the rows as a model predicts from them."""
    return dataset.select_columns([name for name in dataset.column_names if name != "labels"])


@contextmanager
def open_model(
    model: PreTrainedModel,
    read: Callable[[Any, dict[str, Tensor]], Tensor],
    generation: GenerationConfig | None,
    autocast_dtype: torch.dtype | None,
) -> Iterator[Callable[[dict[str, Tensor]], Tensor]]:
    """Prepare a model; yield the function from a batch on its device to what `predict` returns of it."""
    caches: AbstractContextManager[NewCache] = nullcontext(dict)
    if generation is not None and generation.use_cache is not False:
        caches = make_caches(model, generation.num_beams or 1)
    with _prepare_model(model, autocast_dtype), caches as new_cache:

        def outputs(batch: dict[str, Tensor]) -> Tensor:
            if generation is None:
                return read(model(**batch), batch)
            return _generate(model, batch, generation, new_cache)

        yield outputs


def _widen(row: np.ndarray, width: int) -> np.ndarray:
    """Return (..., width): the row with `NO_TOKEN` added at the end."""
    missing = [(0, 0)] * (row.ndim - 1) + [(0, width - row.shape[-1])]
    return np.pad(row, missing, constant_values=NO_TOKEN) if row.shape[-1] < width else row


def _split_batches(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, max_tokens: int | None
) -> Iterator[Sequence[int]]:
    """Split `order`, the longest first, into batches; an example longer than `max_tokens` is a batch by itself."""
    start = 0
    while start < len(order):
        fitting = batch_size if max_tokens is None else max_tokens // max(1, lengths[order[start]])
        end = start + max(1, min(batch_size, fitting))
        yield order[start:end]
        start = end


def _halve(batch: Sequence[int]) -> Iterator[Sequence[int]]:
    middle = (len(batch) + 1) // 2
    yield from filter(None, (batch[:middle], batch[middle:]))


def _try_batch(
    outputs: Callable[[dict[str, Tensor]], Tensor], padded: Mapping[str, Any], device: torch.device, last: bool
) -> list[np.ndarray] | None:
    """Return the outputs for a batch; None if memory runs out, unless it is the `last` size that can be tried."""
    try:
        batch = {name: tensor.to(device) for name, tensor in padded.items() if tensor is not None}
        return list(outputs(batch).cpu().numpy())
    except RuntimeError as error:
        if last or not is_out_of_memory(error):
            raise
    return None


def _generate(
    model: PreTrainedModel, batch: dict[str, Tensor], generation: GenerationConfig, new_cache: NewCache
) -> Tensor:
    """Return the generated ids. A decoder alone may repeat n-grams of its prompt, as others may those of a source."""
    synced = True if is_sharded(model) else None  # all go on until the last text is complete
    if model.config.is_encoder_decoder:
        ids: Tensor = model.generate(**batch, **new_cache(), generation_config=generation, synced_gpus=synced)
        return ids
    prompt, size = batch["input_ids"].shape[1], generation.no_repeat_ngram_size
    processors = LogitsProcessorList([_NoRepeatBehind(prompt, size)] if size else [])
    free = copy(generation)
    free.no_repeat_ngram_size = 0
    ids = model.generate(
        **batch, **new_cache(), generation_config=free, logits_processor=processors, synced_gpus=synced
    )
    return ids[:, prompt:]


def measure_cut_off(predictions: np.ndarray, generation: GenerationConfig, begun: int) -> float:
    """Return the share of generated texts that ended because they reached the maximum length, not by an end token.

    An end token that a backbone is forced to write in the last place (as BART is) does not count.

    Args:
        predictions: ids as `predict` returns them, (examples, longest).
        begun: the number of ids of each text before the first generated one.
    """
    ends = np.isin(predictions[:, begun:], end_ids(generation))
    if generation.forced_eos_token_id is not None:
        longest = generation.max_new_tokens or generation.max_length - begun
        ends[:, longest - 1 :] = False
    return float(1 - ends.any(axis=1).mean()) if len(ends) else 0.0


def end_ids(generation: GenerationConfig) -> list[int]:
    """Return the ids at which generation stops."""
    return [int(index) for index in np.atleast_1d(generation.eos_token_id) if index is not None]


class _NoRepeatBehind(NoRepeatNGramLogitsProcessor):
    """Forbids repeated n-grams after the first `start` tokens."""

    def __init__(self, start: int, size: int) -> None:
        super().__init__(size)
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed: Tensor = super().__call__(input_ids[:, self.start :], scores)
        return allowed


def compute_mean_loss(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    label_smoothing: float = 0.0,
    *,
    autocast_dtype: torch.dtype | None = None,
    team: Team = ALONE,
) -> float:
    """Return the cross-entropy of the labels, with label smoothing, averaged over all tokens of `dataset`, of which
    each process of `team` computes every so many batches.

    The logits of a whole batch (3 GB for 256 targets of 200 tokens over 16,384 words) are never in memory at once.
    """
    total, tokens, sharded = 0.0, 0, is_sharded(model)
    layer = model.get_output_embeddings()
    assert isinstance(layer, nn.Linear), f"{type(model).__name__} writes no text"
    with _prepare_model(model, autocast_dtype):
        fused = TokenLoss(model, layer, label_smoothing) if has_plain_logits(model) else None
        for first in range(0, len(dataset), team.size * batch_size):
            start = first + team.rank * batch_size
            counts = start < len(dataset)
            if not counts and not sharded:
                continue
            start = start if counts else first  # all compute if each has a share of the weights
            padded = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
            batch = {name: tensor.to(model.device) for name, tensor in padded.items() if tensor is not None}
            labels = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
            with team.lockstep() if sharded else nullcontext():
                summed = sum_own_losses(model, batch, label_smoothing) if fused is None else fused(batch, count=1)
            if counts:
                total += float(summed)
                tokens += int((labels != NO_TOKEN).sum())
    shares = team.gather((total, tokens))
    return sum(summed for summed, _ in shares) / sum(count for _, count in shares)


@contextmanager
def _prepare_model(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block, the model is in evaluation mode and prepared, and computes no gradients."""
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            avoid_cudnn_attention(),
            # Modifications cannot be merged into weights that are elsewhere.
            fold_tensors(model) if is_sharded(model) else prepare_inference(model, autocast_dtype),
            autocast(model.device, autocast_dtype),
        ):
            yield
    finally:
        model.train(was_training)
