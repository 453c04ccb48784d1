"""How fast a finished run predicts, beside the bare backbone: `speed=true`.

Both predict the same inputs of the report split as `evaluate` does, with the same fast paths: what can be merged into
the weights is. Texts are written to their full length by both, so that they do the same work; otherwise a backbone that
does not know the task might end at once. Each model is loaded by itself, for its memory, predicts once to warm up, and
then three times, of which the median counts.
"""

from __future__ import annotations

import gc
import statistics
import time
from copy import copy
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import GenerationConfig

from peftbench.backbones.load import Backbone, load_backbone
from peftbench.backbones.precision import choose_device, resolve_dtype
from peftbench.backbones.sites import set_configs
from peftbench.config.schema import Run, TaskKind
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.finished import restore_backbone
from peftbench.evaluation.predict import drop_labels, open_model
from peftbench.records.record import Speed, Throughput
from peftbench.tasks.load import Loaded, load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.utils.memory import is_out_of_memory, make_room

EXAMPLES = 64  # at most, and at most a batch of the evaluation
TIMES = 3


def measure_speed(run: Run, folder: Path) -> Speed:
    """Return how fast the bare backbone and the run in `folder` predict; on half the examples if memory runs out."""
    run, loaded, device = resolve_dtype(run), load_task(run.task), choose_device(run.trainer)
    examples = min(EXAMPLES, run.trainer.eval_batch_size)
    while True:
        try:
            bare = _measure(run, loaded, load_backbone(run.model, loaded.task, device), examples)
            gc.collect()
            trained = _measure(run, loaded, restore_backbone(folder, run, loaded.task, device), examples)
        except RuntimeError as error:
            if examples == 1 or not is_out_of_memory(error):
                raise
        else:
            of: Literal["written", "read"] = "written" if run.task.kind is TaskKind.text_to_text else "read"
            return Speed(of, trained.examples, trained.tokens, bare.throughput, trained.throughput)
        examples //= 2
        make_room()


class _Measured(NamedTuple):
    """A batch, and how fast a model predicts for it."""

    examples: int
    tokens: int
    throughput: Throughput


def _measure(run: Run, loaded: Loaded, backbone: Backbone, examples: int) -> _Measured:
    """Return how fast a model predicts the first examples of the report split as one batch. The time of merging is not
    counted: a model is merged once, and used as long as one likes."""
    model, device = backbone.model, choose_device(run.trainer)
    data = prepare_data(loaded, backbone.tokenizer, model)
    model.to(device)
    rows = data.report.select(range(min(examples, len(data.report))))
    padded = data.collator(list(drop_labels(rows)))
    batch = {name: tensor.to(device) for name, tensor in padded.items() if tensor is not None}
    evaluator = Evaluator(model, data, run)
    generation = None if evaluator.generation is None else write_to_the_end(evaluator.generation)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    with (
        set_configs([] if generation is None else [model], "generation_config", GenerationConfig()),
        open_model(model, data.read_outputs, generation, evaluator.autocast_dtype) as predict,
    ):
        for _ in range(TIMES + 1):
            began = time.perf_counter()
            predict(batch).cpu()  # waits for the GPU
            seconds.append(time.perf_counter() - began)
    tokens = _count_tokens(rows["input_ids"], generation)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return _Measured(len(rows), tokens, Throughput(tokens / statistics.median(seconds[1:]), memory))


def write_to_the_end(generation: GenerationConfig) -> GenerationConfig:
    """Return generation settings with which each text has the maximum length."""
    found = copy(generation)
    if found.max_new_tokens is not None:
        found.min_new_tokens = found.max_new_tokens
    else:
        found.min_length = found.max_length
    return found


def _count_tokens(inputs: list[list[int]], generation: GenerationConfig | None) -> int:
    """Return the number of tokens that are written, or read if none is."""
    if generation is None:
        return sum(map(len, inputs))
    longest: int = generation.max_new_tokens or generation.max_length - 1  # after a decoder's first token
    return len(inputs) * longest
