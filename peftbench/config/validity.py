"""Find what is wrong with a run before anything is loaded.

`faults(run)` returns a plain sentence for every fault, with the key as it is typed. The rules for the four axes are a
table in config/axes.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peftbench.config.axes import find_refusals, read_axes
from peftbench.config.budget import parse_budget
from peftbench.config.fidelity import find_idle_switches
from peftbench.config.lists import find_nested_lists
from peftbench.config.own_parts import METRIC, find_own_faults, is_own, list_entry_points
from peftbench.config.peft_methods import find_peft_faults, has_identity_form, has_rank
from peftbench.config.schema import (
    DOCSTRINGS,
    EMBEDDED,
    LOSS,
    OPTIMIZERS,
    TRACKERS,
    WITH_LABELS,
    Batching,
    Compile,
    Device,
    DType,
    Keep,
    Precision,
    Quantization,
    Representation,
    Run,
    Sharding,
    Task,
    TaskKind,
    Trainer,
    Unfreeze,
    get_value,
    list_bottlenecks_of,
    list_files,
    list_modifications,
    list_task_files,
)
from peftbench.utils.differences import flatten
from peftbench.utils.errors import UserError, describe_unknown
from peftbench.utils.files import expand_home
from peftbench.utils.text import strip_controls

# The metrics for each kind of task, by name; `metrics.measure.DEFINITIONS` computes them.
METRIC_NAMES = {
    TaskKind.classification: ("accuracy", "f1", "macro_f1", "matthews"),
    TaskKind.regression: ("pearson", "spearman"),
    TaskKind.token_classification: ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"),
    TaskKind.question_answering: ("squad_f1", "squad_exact_match"),
    TaskKind.text_to_text: (
        "rouge1",
        "rouge2",
        "rougeL",
        "rougeLsum",
        "bleu",
        "chrf",
        "bleu_ro",
        "exact_match",
        "final_number",
        "choice",
    ),
}

BASELINES = {
    TaskKind.classification: ("majority", "head"),
    TaskKind.regression: ("head",),
    TaskKind.token_classification: ("majority", "head"),
    TaskKind.question_answering: ("copy", "no_answer", "head"),
    TaskKind.text_to_text: ("lead1", "copy"),
}


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


def find_faults(run: Run, *, reads_data: bool = True) -> list[str]:
    """Return all faults of `run`, one plain sentence each; an empty list if it can run.

    Without `reads_data` the run is only counted, and its task needs no data.
    """
    if nested := list(find_nested_lists(run)):
        return nested
    return [
        *_find_name_faults(run),
        *_find_axes_faults(run),
        *find_own_faults(run),
        *find_peft_faults(run),
        *_find_budget_faults(run),
        *_find_number_faults(run),
        *_find_path_faults(run),
        *_find_source_faults(run.task, reads_data),
        *_find_data_faults(run.task),
        *_find_dtype_faults(run),
        *_find_quantization_faults(run),
        *_find_attention_faults(run),
        *_find_trainer_faults(run),
        *_find_nothing_to_train(run),
        *find_idle_switches(run),
        *_find_tracker_faults(run),
        *_find_metric_faults(run.task),
    ]


def _find_name_faults(run: Run) -> Iterator[str]:
    """Yield faults of names that are folders in output_dir."""
    for key, name in (("task.name", run.task.name), ("model.name", run.model.name), ("method", run.method)):
        if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
            yield f"{key}={strip_controls(name)}: it names a folder of runs, so that it must be a name without slashes."


def _find_axes_faults(run: Run) -> Iterator[str]:
    for prefix, m in list_modifications(run).items():
        yield from find_refusals(prefix, m)
    if run.functional_form.name == "none" and not run.peft and any(axis != "none" for axis in read_axes(run)):
        yield from find_refusals("", run)


def _find_budget_faults(run: Run) -> Iterator[str]:
    if run.budget is None:
        if run.budget_split is not None:
            yield "budget_split divides a budget, but there is none; give one, such as budget=1%, or leave it out."
        return
    try:
        parse_budget(run.budget, backbone=100)
    except UserError as error:
        yield from error.faults
    if not list_bottlenecks_of(run) and not has_rank(run):
        yield (
            f"budget={run.budget} determines bottlenecks, but method={run.method} has none: its size follows from the "
            "backbone; leave budget out, or take a method with a bottleneck such as method=lora."
        )
        return
    split, names = run.budget_split, [prefix.rstrip(".") or "the root's" for prefix in list_modifications(run) or [""]]
    if split is not None and (len(split) != len(names) or not all(0 < share < math.inf for share in split)):
        shares = ", ".join(f"{share:g}" for share in split)
        yield (
            f"budget_split=[{shares}] must have a number above 0 for each modification of method={run.method}, in this "
            f"order: {', '.join(names)}."
        )


def _find_path_faults(run: Run) -> Iterator[str]:
    """Yield faults of paths that do not exist; their content is checked when it is read."""
    folders = {"model.path": run.model.path, "task.data_dir": run.task.data_dir}
    files = {
        **{f"task.data_files.{split}": list_files(files) for split, files in run.task.data_files.items()},
        "task.train_file": list_files(run.task.train_file),
        "task.validation_file": list_files(run.task.validation_file),
        "task.test_file": list_files(run.task.test_file),
        "model.chat_template": list_files(run.model.chat_template),
        "retention": [] if run.retention == DOCSTRINGS else list_files(run.retention),
    }
    if run.model.hub_id is not None and run.model.path is not None and Path(run.model.path).parent == EMBEDDED:
        yield (
            f"model.hub_id={run.model.hub_id} has no effect, because model={run.model.name} ships with peftbench; "
            "start from another model, such as model=bart_large, or add model.path=null."
        )
    for key, path in folders.items():
        if path is not None and not expand_home(path).is_dir():
            yield f"{key}={path} is not a folder{_describe_base(path)}; give the path of an existing one."
    for key, path in ((key, path) for key, paths in files.items() for path in paths):
        if not expand_home(path).is_file():
            yield f"{key}={path} is not a file{_describe_base(path)}; give the path of an existing one."


def _describe_base(path: str) -> str:
    """Return the folder that a relative path starts from: the paths of a saved run may have been typed elsewhere."""
    return "" if expand_home(path).is_absolute() else f" below {Path.cwd()}"


def _find_source_faults(task: Task, reads_data: bool) -> Iterator[str]:
    """Yield a fault if there is no data but it is needed: to train, or to count a head with one output per label."""
    if any((list_task_files(task), task.data_dir, task.packages, task.hub_id, task._target_)):  # may have own rows
        return
    if reads_data:
        yield (
            f"task={task.name} has no data; give task.train_file=FILE (.csv, .tsv, .jsonl, .json or .parquet), with "
            "task.validation_file and task.test_file if you have them, or task.data_dir=FOLDER with all of them."
        )
    elif task.kind in WITH_LABELS and not task.labels:
        yield (
            f"task={task.name} has no labels, and their number is the size of the task head; give task.labels=[A,B], "
            "or task.train_file=FILE or task.data_dir=FOLDER, from which they are read."
        )


def _find_data_faults(task: Task) -> Iterator[str]:
    """Yield faults in the settings for reading the data."""
    if task.validation_file and task.test_file and task.selection_split == task.report_split:
        yield (
            f"task.test_file={task.test_file}: task={task.name} selects and reports on its {task.report_split} split; "
            "give only task.validation_file, or set task.report_split=test."
        )
    if task.kind is TaskKind.token_classification and len(task.text_columns) != 1:
        yield f"task.text_columns=[{','.join(task.text_columns)}] must name one column, that of the words."
    elif task.kind is TaskKind.question_answering and len(task.text_columns) != 2:
        yield f"task.text_columns=[{','.join(task.text_columns)}] must name two columns: question and context."
    elif task.kind is not TaskKind.text_to_text and len(task.text_columns) not in (1, 2):
        yield f"task.text_columns=[{','.join(task.text_columns)}] must name one column, or two for a pair."
    if len(set(task.column_names)) < len(task.column_names):
        yield f"task.column_names=[{','.join(task.column_names)}] names a column twice."
    if task.delimiter is not None and (len(task.delimiter) != 1 or task.delimiter in '\r\n"'):
        yield f"task.delimiter={task.delimiter!r} must be one character, such as ';' or '|'."
    if task.prompt is not None and task.prompt.count("{source}") != 1:
        yield f"task.prompt={task.prompt!r} must contain {{source}} once, where the source goes."
    yield from _find_chat_faults(task)
    if len(set(task.labels)) < len(task.labels):
        yield f"task.labels=[{','.join(task.labels)}] names a label twice."
    elif len(task.labels) == 1 and task.kind in WITH_LABELS:
        yield f"task.labels=[{task.labels[0]}] names one label; two or more are needed."
    yield from find_label_faults("task.metric", task.metric, task.labels)


def _find_chat_faults(task: Task) -> Iterator[str]:
    """Yield faults of keys that do not go with conversations, or with a chat template."""
    if task.kind is not TaskKind.text_to_text:
        for key, is_set in (("chat", task.chat is not False), ("messages_column", task.messages_column is not None)):
            if is_set:
                yield f"task.{key}={getattr(task, key)} is for tasks that write text; leave it out of task={task.name}."
    elif task.messages_column is not None:
        for key, default in (("prompt", None), ("source_join", None), ("merge_references", False), ("chat", False)):
            if getattr(task, key) != default:
                yield (
                    f"task.{key}={getattr(task, key)} is for sources and targets, and task={task.name} has "
                    "conversations; leave it out."
                )
        if task.baselines:
            yield f"task.baselines=[{','.join(task.baselines)}]: conversations have no baseline; use task.baselines=[]."
    elif task.tools_column is not None:
        yield f"task.tools_column={task.tools_column} is for conversations; name their column by task.messages_column."


_MARK = re.compile(r"O|[BIES]-.*")  # the label of a word outside or inside an entity: IOB1, IOB2 or IOBES


def find_label_faults(key: str, metric: str, labels: Sequence[str]) -> Iterator[str]:
    """Yield a fault if a metric, typed as `key`, does not fit the labels, which may be known only from the data."""
    if metric == "f1" and len(labels) > 2:
        yield f"{key}=f1 is the F1 of the second of two labels; with more labels use macro_f1."
    if metric.startswith("entity_") and (odd := [label for label in labels if not _MARK.fullmatch(label)]):
        yield (
            f"{key}={metric} counts entities, whose words have labels such as B-PER and I-PER, and the label "
            f"{odd[0]} is none of them, nor O; use token_accuracy, or name labels that are codes by task.labels, in "
            "the order of the codes."
        )


def _find_number_faults(run: Run) -> Iterator[str]:
    for name, number in flatten(asdict(run)):
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


def _find_dtype_faults(run: Run) -> Iterator[str]:
    if run.model.dtype is not DType.bfloat16:
        return
    if run.unfreeze is not Unfreeze.none:
        yield (
            f"unfreeze={run.unfreeze.name} trains the backbone's own parameters, which must then be float32; set "
            "model.dtype=float32."
        )
    if run.trainer.precision in (Precision.fp32, Precision.fp16):
        yield (
            f"trainer.precision={run.trainer.precision.name} with model.dtype=bfloat16: a bfloat16 backbone computes "
            "in bfloat16; set trainer.precision=auto, or model.dtype=float32."
        )


def _find_quantization_faults(run: Run) -> Iterator[str]:
    """Yield faults of settings that packed weights cannot serve."""
    if run.model.quantization is Quantization.none:
        return
    typed = f"model.quantization={run.model.quantization.name}"
    if run.unfreeze is not Unfreeze.none:
        yield (
            f"unfreeze={run.unfreeze.name} with {typed}: a packed backbone is frozen as a whole; use "
            "model.quantization=none, or a method that adds parameters, such as method=lora."
        )
    if run.trainer.compile is not Compile.none:
        yield f"trainer.compile={run.trainer.compile.name} with {typed} is not supported; use trainer.compile=none."


def _find_attention_faults(run: Run) -> Iterator[str]:
    """Yield faults of an attention function that ours, which a modification or a fast path needs, would replace."""
    chosen = run.model.attn_implementation
    if chosen in (None, "sdpa"):
        return
    instead = "leave it out, or use sdpa"
    for prefix, m in list_modifications(run).items():
        representation = m.modified_representation.name
        if representation in (Representation.heads, Representation.embedding):
            yield (
                f"model.attn_implementation={chosen} with {prefix}modified_representation={representation.name}: these "
                f"modifications are part of an attention function of their own; {instead}."
            )
    if run.trainer.padding_free is True:
        yield (
            f"model.attn_implementation={chosen} with trainer.padding_free=true, which has an attention function of "
            f"its own; {instead}, or use trainer.padding_free=false."
        )


def _find_trainer_faults(run: Run) -> Iterator[str]:
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


def _find_tracker_faults(run: Run) -> Iterator[str]:
    for name in run.trackers:
        if name not in TRACKERS:
            yield describe_unknown("trackers", name, TRACKERS)
        elif find_spec(TRACKERS[name]) is None:
            yield f"trackers=[{name}] needs {name}, which is not installed: pip install {name}."


def _find_nothing_to_train(run: Run) -> Iterator[str]:
    if run.peft or run.mix or any(axis != "none" for axis in read_axes(run)) or run.unfreeze is not Unfreeze.none:
        return
    if run.task.kind is TaskKind.text_to_text:
        yield (
            f"method={run.method} with task={run.task.name} leaves nothing to train: a task that writes text has no "
            "head; use a method that changes the backbone, such as method=lora or method=full."
        )
    elif run.fidelity.frozen_task_head:
        yield (
            f"fidelity.frozen_task_head=true with method={run.method} leaves nothing to train; use "
            "fidelity.frozen_task_head=false, or a method that changes the backbone, such as method=lora."
        )


def _find_metric_faults(task: Task) -> Iterator[str]:
    for baseline in task.baselines:
        if baseline not in BASELINES[task.kind]:
            yield describe_unknown("task.baselines", baseline, BASELINES[task.kind])
    if task.metric not in METRIC_NAMES[task.kind] and not is_own(task.metric):
        offered = list_entry_points(METRIC)
        yield describe_unknown("task.metric", task.metric, [*METRIC_NAMES[task.kind], *offered])
    selectors = (task.metric, *([LOSS] if task.kind is TaskKind.text_to_text else []))
    if task.selection_metric is not None and task.selection_metric not in selectors:
        yield describe_unknown("task.selection_metric", task.selection_metric, selectors)
