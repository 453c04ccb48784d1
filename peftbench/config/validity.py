"""Find what is wrong with a run before anything is loaded.

`faults(run)` returns a plain sentence for every fault, with the key as it is typed. The rules for the four axes are a
table in config/axes.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from peftbench.config.axes import find_refusals, read_axes
from peftbench.config.budget import parse_budget
from peftbench.config.fidelity import find_idle_switches
from peftbench.config.lists import find_nested_lists
from peftbench.config.own_parts import find_own_faults
from peftbench.config.peft_methods import find_peft_faults, has_rank
from peftbench.config.schema import (
    DOCSTRINGS,
    TRACKERS,
    Compile,
    DType,
    Precision,
    Quantization,
    Representation,
    Run,
    TaskKind,
    Unfreeze,
    list_bottlenecks_of,
    list_files,
    list_modifications,
)
from peftbench.config.task_validity import find_task_faults
from peftbench.config.trainer_validity import find_number_faults, find_trainer_faults
from peftbench.utils.errors import UserError, describe_unknown
from peftbench.utils.files import expand_home
from peftbench.utils.text import strip_controls

UNFREEZING = ("full", "bitfit", "layernorm_tuning")  # presets that are nothing but a value of `unfreeze`


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
        *find_number_faults(run),
        *_find_path_faults(run),
        *find_task_faults(run.task, reads_data),
        *_find_dtype_faults(run),
        *_find_quantization_faults(run),
        *_find_attention_faults(run),
        *find_trainer_faults(run),
        *_find_nothing_to_train(run),
        *find_idle_switches(run),
        *_find_tracker_faults(run),
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
    for key, path in folders.items():
        if path is not None and not expand_home(path).is_dir():
            yield f"{key}={path} is not a folder{_describe_base(path)}; give the path of an existing one."
    for key, path in ((key, path) for key, paths in files.items() for path in paths):
        if not expand_home(path).is_file():
            other = f"give {DOCSTRINGS}, or" if key == "retention" else "give"
            yield f"{key}={path} is not a file{_describe_base(path)}; {other} the path of an existing one."


def _describe_base(path: str) -> str:
    """Return the folder that a relative path starts from: the paths of a saved run may have been typed elsewhere."""
    return "" if expand_home(path).is_absolute() else f" below {Path.cwd()}"


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


def _find_tracker_faults(run: Run) -> Iterator[str]:
    for name in run.trackers:
        if name not in TRACKERS:
            yield describe_unknown("trackers", name, TRACKERS)
        elif find_spec(TRACKERS[name]) is None:
            yield f"trackers=[{name}] needs {name}, which is not installed: pip install {name}."


def _find_nothing_to_train(run: Run) -> Iterator[str]:
    if run.peft or run.mix or any(axis != "none" for axis in read_axes(run)) or run.unfreeze is not Unfreeze.none:
        return
    if run.method in UNFREEZING:
        yield (
            f"unfreeze=none with method={run.method} leaves the task head alone to train, which is method=head; use "
            "that, or leave out unfreeze."
        )
    elif run.task.kind is TaskKind.text_to_text:
        yield (
            f"method={run.method} with task={run.task.name} leaves nothing to train: a task that writes text has no "
            "head; use a method that changes the backbone, such as method=lora or method=full."
        )
    elif run.fidelity.frozen_task_head:
        yield (
            f"fidelity.frozen_task_head=true with method={run.method} leaves nothing to train; use "
            "fidelity.frozen_task_head=false, or a method that changes the backbone, such as method=lora."
        )
