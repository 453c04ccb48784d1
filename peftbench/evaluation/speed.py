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

import torch
from transformers import GenerationConfig

from peftbench.backbones.load import Backbone, load_backbone
from peftbench.backbones.precision import choose_device, resolve_dtype
from peftbench.backbones.sites import set_configs
from peftbench.config.schema import Run
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.finished import restore_backbone
from peftbench.evaluation.predict import predict
from peftbench.records.record import Speed, Throughput
from peftbench.tasks.base import TaskData
from peftbench.tasks.load import Loaded, load_task
from peftbench.tasks.prepare import prepare_data

EXAMPLES = 64  # at most, and at most a batch of the evaluation
TIMES = 3


def measure_speed(run: Run, folder: Path) -> Speed:
    """Return how fast the bare backbone and the run in `folder` predict."""
    run, loaded, device = resolve_dtype(run), load_task(run.task), choose_device(run.trainer)
    examples, tokens, bare = _measure(run, loaded, load_backbone(run.model, loaded.task, device))
    gc.collect()
    _, _, trained = _measure(run, loaded, restore_backbone(folder, run, loaded.task, device))
    return Speed("read" if _writes_nothing(run) else "written", examples, tokens, bare, trained)


def _writes_nothing(run: Run) -> bool:
    return run.task.kind.name != "text_to_text"


def _measure(run: Run, loaded: Loaded, backbone: Backbone) -> tuple[int, int, Throughput]:
    """Return how many examples and tokens a model predicts, and how fast."""
    model, device = backbone.model, choose_device(run.trainer)
    data = prepare_data(loaded, backbone.tokenizer, model)
    model.to(device)
    rows = data.report.select(range(min(EXAMPLES, run.trainer.eval_batch_size, len(data.report))))
    evaluator = Evaluator(model, data, run)
    generation = None if evaluator.generation is None else write_to_the_end(evaluator.generation)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        with set_configs([] if generation is None else [model], "generation_config", GenerationConfig()):
            predict(
                model,
                rows,
                data.collator,
                len(rows),
                max_tokens=run.trainer.eval_batch_tokens,
                generation=generation,
                autocast_dtype=evaluator.autocast_dtype,
            )
        seconds.append(time.perf_counter() - began)
    tokens = _count_tokens(data, rows["input_ids"], generation)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return len(rows), tokens, Throughput(tokens / statistics.median(seconds[1:]), memory)


def write_to_the_end(generation: GenerationConfig) -> GenerationConfig:
    """Return generation settings with which each text has the maximum length."""
    found = copy(generation)
    if found.max_new_tokens is not None:
        found.min_new_tokens = found.max_new_tokens
    else:
        found.min_length = found.max_length
    return found


def _count_tokens(data: TaskData, inputs: list[list[int]], generation: GenerationConfig | None) -> int:
    """Return the number of tokens that are written, or read if none is."""
    if generation is None:
        return sum(map(len, inputs))
    longest: int = generation.max_new_tokens or generation.max_length - 1  # after a decoder's first token
    return len(inputs) * longest
