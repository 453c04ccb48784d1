"""Find what is wrong with the numbers of a run and with the trainer's settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from peftbench.config.peft_methods import has_identity_form
from peftbench.config.schema import (
    OPTIMIZERS,
    WITH_LABELS,
    Batching,
    Compile,
    Device,
    Keep,
    Quantization,
    Representation,
    Run,
    Sharding,
    Task,
    TaskKind,
    Trainer,
    Unfreeze,
    get_value,
    list_modifications,
)
from peftbench.utils.differences import flatten
from peftbench.utils.errors import describe_unknown

MOST_EPOCHS = 1_000_000


LARGEST = 2**31 - 1  # of the whole numbers that torch, Arrow and transformers take everywhere


def _is_count(value: str) -> bool:
    return value.isdecimal() and int(value) > 0


# Keys, a condition on their values (if they are not null), and the sentence that states it.
RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        (
            "trainer.batch_size",
            "trainer.batch_tokens",
            "trainer.accumulation",
            "trainer.eval_batch_size",
            "trainer.eval_batch_tokens",
            "trainer.max_steps",
            "trainer.evaluate_every",
            "trainer.early_stopping",
            "task.max_train",
            "task.max_selection",
            "task.max_eval",
            "task.max_source_length",
            "task.max_target_length",
            "task.max_length",
            "task.stride",
            "task.max_answer_length",
            "task.generation.num_beams",
            "task.generation.max_length",
        ),
        lambda number: number >= 1,
        "it must be a whole number of at least 1",
    ),
    # The range of numpy's generator.
    (("seed",), lambda number: 0 <= number < 2**32, "it must be a whole number from 0 to 4294967295"),
    (
        ("trainer.devices",),
        lambda number: number == "auto" or _is_count(number),
        "it must be a whole number of at least 1, or auto",
    ),
    (("jobs",), lambda jobs: jobs == "auto" or _is_count(jobs), "it must be a whole number of at least 1, or auto"),
    (
        ("mps", "trainer.padding_free", "trainer.graphs", "task.chat"),
        lambda switch: switch in (True, False, "auto"),
        "it must be auto, true or false",
    ),
    (
        ("trainer.micro_batch",),
        lambda examples: examples == "auto" or _is_count(examples),
        "it must be a whole number of at least 1, auto or null",
    ),
    (
        ("trainer.learning_rate", "trainer.lora_plus"),
        lambda number: 0 < number < math.inf,
        "it must be a number above 0",
    ),
    (("trainer.epochs",), lambda number: 0 < number <= MOST_EPOCHS, f"it must be above 0, and at most {MOST_EPOCHS:,}"),
    (
        ("task.generation.min_length", "task.generation.no_repeat_ngram_size"),
        lambda number: number >= 0,
        "it must be a whole number of at least 0",
    ),
    (("task.generation.length_penalty",), math.isfinite, "it must be a finite number"),
    (("trainer.warmup", "trainer.label_smoothing"), lambda share: 0 <= share < 1, "it must be in [0, 1)"),
    (
        ("trainer.weight_decay", "trainer.max_grad_norm", "trainer.epsilon", "trainer.checkpoint_minutes"),
        lambda number: 0 <= number < math.inf,
        "it must be a number of at least 0",
    ),
)


def find_number_faults(run: Run) -> Iterator[str]:
    for name, number in flatten(run):
        if name != "seed" and type(number) is int and abs(number) > LARGEST:
            yield f"{name}={number}: it must be at most {LARGEST}."
    for keys, holds, sentence in RANGES:
        for key in keys:
            value = get_value(run, key)
            if value is not None and not holds(value):
                yield f"{key}={value}: {sentence}."
    for prefix, m in list_modifications(run).items():
        if not math.isfinite(m.composition_function.scale):
            yield f"{prefix}composition_function.scale={m.composition_function.scale}: it must be a finite number."
    generation, betas = run.task.generation, run.trainer.betas
    if generation.min_length > generation.max_length:
        yield (
            f"task.generation.min_length={generation.min_length} is above "
            f"task.generation.max_length={generation.max_length}; make it at most that."
        )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"trainer.betas={betas}: Adam takes two numbers in [0, 1), such as [0.9,0.999]."


def find_trainer_faults(run: Run) -> Iterator[str]:
    """Yield faults for settings of the trainer that exclude each other."""
    trainer = run.trainer
    if trainer.lora_plus is not None and not has_identity_form(run):
        yield (
            f"trainer.lora_plus={trainer.lora_plus:g} with method={run.method}: it is for LoRA's two matrices, and "
            "this method has none; use trainer.lora_plus=null."
        )
    if trainer.optimizer not in OPTIMIZERS:
        yield describe_unknown("trainer.optimizer", trainer.optimizer, OPTIMIZERS)
    if trainer.sharding is Sharding.full:
        yield from _find_sharding_faults(run)
    if trainer.graphs is True:
        for key, value in list_unrecordable(trainer).items():
            yield (
                f"trainer.graphs=true with trainer.{key}: a CUDA graph needs a whole batch that fits in memory; use "
                f"trainer.graphs=false, or trainer.{key}={value}."
            )
        if trainer.device is Device.cpu:
            yield "trainer.graphs=true with trainer.device=cpu: CUDA graphs need a GPU; use trainer.graphs=false."
    for prefix, m in list_modifications(run).items():
        if trainer.padding_free is True and m.modified_representation.name is Representation.embedding:
            yield (
                f"trainer.padding_free=true with {prefix}modified_representation=embedding: prompts are added to a "
                "batch after its embeddings; use trainer.batching=bucketed, which has little padding."
            )
    if trainer.batching is Batching.bucketed and trainer.batch_tokens is not None:
        yield (
            f"trainer.batching=bucketed with trainer.batch_tokens={trainer.batch_tokens}: batches by tokens already "
            "have similar lengths; leave trainer.batching out, or set trainer.batch_tokens=null."
        )
    if trainer.compile is not Compile.none and trainer.gradient_checkpointing:
        yield (
            f"trainer.compile={trainer.compile.name} with trainer.gradient_checkpointing=true is not supported; "
            "set one of them to none or false."
        )
    if trainer.early_stopping is not None and trainer.keep is not Keep.best:
        yield (
            f"trainer.early_stopping={trainer.early_stopping} needs evaluations on the selection split; add "
            "trainer.keep=best."
        )
    if trainer.class_weights is not None:
        yield from _find_class_weight_faults(trainer.class_weights, run.task)
    if trainer.label_smoothing and run.task.kind is TaskKind.regression:
        yield (
            f"trainer.label_smoothing={trainer.label_smoothing} with task={run.task.name}: a number is predicted, "
            "and there are no labels to spread probability over; set trainer.label_smoothing=0."
        )
    if trainer.label_smoothing and run.task.kind is TaskKind.question_answering:
        yield (
            f"trainer.label_smoothing={trainer.label_smoothing} with task={run.task.name} is not supported: an answer "
            "has no label; set trainer.label_smoothing=0."
        )
    if trainer.micro_batch is not None and trainer.micro_batch.isdecimal() and trainer.batch_tokens is not None:
        yield (
            f"trainer.micro_batch={trainer.micro_batch} with trainer.batch_tokens={trainer.batch_tokens}: such batches "
            "have no fixed number of examples; use trainer.micro_batch=auto."
        )


def _find_class_weight_faults(weights: Any, task: Task) -> Iterator[str]:
    typed = f"[{','.join(map(str, weights))}]" if isinstance(weights, list) else weights
    if task.kind not in WITH_LABELS:
        yield f"trainer.class_weights={typed} is for tasks with labels; leave it out of task={task.name}."
    elif weights != "balanced" and not (isinstance(weights, list) and all(map(_is_weight, weights))):
        yield f"trainer.class_weights={typed}: it must be balanced, or a list of numbers above 0, one for each label."
    elif isinstance(weights, list) and task.labels and len(weights) != len(task.labels):
        yield (
            f"trainer.class_weights={typed} must have a number for each label, in this order: {', '.join(task.labels)}."
        )


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _find_sharding_faults(run: Run) -> Iterator[str]:
    """Yield faults of settings that weights in shares cannot serve."""
    trainer, typed = run.trainer, "trainer.sharding=full"
    if run.unfreeze is Unfreeze.all:
        yield (
            f"{typed} with unfreeze=all: what is trained is whole on each device, so that nothing would be shared; use "
            "trainer.sharding=none, or a method that adds parameters."
        )
    if run.model.quantization is not Quantization.none:
        yield f"{typed} with model.quantization={run.model.quantization.name} is not supported; set one to none."
    if run.retention is not None or run.speed:
        asked = "speed=true" if run.retention is None else f"retention={run.retention}"
        yield f"{typed} with {asked} is not supported, because a whole backbone is loaded for it; leave it out."
    if trainer.graphs is True:
        yield f"{typed} with trainer.graphs=true is not supported: use trainer.graphs=false."
    if trainer.compile is not Compile.none:
        yield f"{typed} with trainer.compile={trainer.compile.name} is not supported: use trainer.compile=none."
    if trainer.micro_batch is not None:
        yield (
            f"{typed} with trainer.micro_batch={trainer.micro_batch} is not supported, because all devices compute a "
            "layer at the same time; use trainer.accumulation with a smaller trainer.batch_size."
        )


def list_unrecordable(trainer: Trainer) -> dict[str, str]:
    """Return the keys that prevent a step from being recorded as a CUDA graph, each with the value that it needs."""
    needed = {
        "gradient_checkpointing": ("false", trainer.gradient_checkpointing),
        "micro_batch": ("null", trainer.micro_batch is not None),
        "accumulation": ("1", trainer.accumulation > 1),
    }
    return {key: value for key, (value, hinders) in needed.items() if hinders}
