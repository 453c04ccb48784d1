"""Find keys that were typed and would change nothing: who types a key means it to have an effect.

A preset may set such a key, and an axis that is flipped leaves keys of the other choice behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftbench.config.axes import CHOICES
from peftbench.config.schema import (
    EMBEDDED,
    WITH_LABELS,
    Composition,
    Keep,
    Modification,
    Run,
    Task,
    TaskKind,
    list_modifications,
)

SCALE = "composition_function.scale"
OF_A_MODIFICATION = (
    *("bottleneck", "init", "bias", "layer_norm", "dropout", "input_dropout", "prefix_mlp"),
    *(SCALE, "composition_function.learned"),
    *("modified_representation.stacks", "modified_representation.attentions", "modified_representation.layers"),
    *("modified_representation.head_input", "modified_representation.ffn_input"),
)
TEXT, ANSWERS = (TaskKind.text_to_text,), (TaskKind.question_answering,)
WRITING = "tasks that write text"
# Keys that say what is read, and in which parts: which kinds of tasks read them, and these in words.
READERS: dict[tuple[str, ...], tuple[tuple[TaskKind, ...], str]] = {
    ("text_columns", "label_column"): (tuple(set(TaskKind) - set(TEXT)), "tasks that write no text"),
    ("labels",): (WITH_LABELS, "tasks with labels"),
    ("source_column", "target_column", "source_join", "prompt", "merge_references"): (TEXT, WRITING),
    ("source_language", "target_language", "tools_column", "max_target_length", "generation"): (TEXT, WRITING),
    ("stride",): ((TaskKind.token_classification, *ANSWERS), "labels of words, and answers in a context"),
    ("max_answer_length", "unanswerable"): (ANSWERS, "answers in a context"),
}

OF_A_STUDY = ("search.minutes", "search.sampler", "search.sampler_seed", "search.prune")
SEVERAL = ("jobs", "mps")  # of runs that are trained at the same time
CHANGES_NOTHING = " changes nothing "
IN_A_SWEEP = "Joined grids have keys of their own, as in -m method=full and method=lora bottleneck=8,16."


def find_idle_keys(typed: Iterable[tuple[str, str]], run: Run, in_sweep: bool = False) -> Iterator[str]:
    """Yield a sentence for each key that was typed and has no effect on `run`.

    In a sweep too, also if other runs of it need the key (`IN_A_SWEEP`): two values of it would be the same run twice.

    Args:
        typed: KEY=VALUE as it was typed, and its key. Those that a search varies are the search's own, and what it
            varies on the axes may need a key at some of its points only.
        in_sweep: the run is one of a sweep.
    """
    searched: Mapping[str, Any] = run.search.keys if run.search is not None else {}
    varies = any(key in CHOICES or key == "mix" for key in searched)
    for line, key in typed:
        if varies and not key.startswith(("trainer.", "task.", "search.")):
            continue
        if key in searched or _is_default(key, run):
            continue
        if (why := _explain_several(key, run, in_sweep) if key in SEVERAL else _explain(key, run)) is not None:
            yield describe_idle(line, why)


def describe_idle(typed: str, why: str) -> str:
    """Return the sentence for KEY=VALUE as it was typed, which has no effect."""
    return f"{typed}{CHANGES_NOTHING}{why}."


def _is_default(key: str, run: Run) -> bool:
    """Return whether a key of a modification has the value that it has anyway, which asks for nothing."""
    return key in OF_A_MODIFICATION and _get(run, key) == _get(Modification(), key)


def _get(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _explain(key: str, run: Run) -> str | None:
    """Return why a key has no effect, as the end of a sentence; None: it has one, or another check is about it."""
    if key in OF_A_MODIFICATION and not run.peft and "" not in list_modifications(run):
        return f"with method={run.method}, which has no modification; leave it out"
    if key.endswith(SCALE):
        return _explain_scale(key.removesuffix(SCALE), run)
    if key.startswith("trainer."):
        return _explain_trainer(key, run)
    if key.startswith("task.") and run.task._target_ is None:  # a task of one's own may read any key
        return _explain_task(key.removeprefix("task."), run)
    if key in ("model.hub_id", "model.revision"):
        return _explain_backbone(key, run)
    if key == "trackers_group" and run.trackers_group is not None and not run.trackers:
        return "without trackers; name one, as trackers=[tensorboard], or leave it out"
    return _explain_search(key, run)


def _explain_several(key: str, run: Run, in_sweep: bool) -> str | None:
    wanted = run.jobs == "auto" or (run.jobs.isdecimal() and int(run.jobs) > 1)
    if key == "jobs" and wanted and not in_sweep and run.search is None:  # which has several trials
        return "for one run; add -m and several values of a key, or for one run on several devices trainer.devices"
    if key == "mps" and run.mps in (True, "auto") and run.jobs == "1":
        return "for one run at a time; add jobs=auto, or leave it out"
    return None


def _explain_search(key: str, run: Run) -> str | None:
    if key not in OF_A_STUDY or run.search is None:
        return None
    if run.search.trials is None:
        return f"with search={run.search.name}, which tries all of its values; add search.trials, or leave it out"
    if key == "search.prune" and (run.budget is None or run.trainer.keep is Keep.last):
        return "without budget= and trainer.keep=best, which pruning needs; add both, or leave it out"
    return None


def _explain_backbone(key: str, run: Run) -> str | None:
    path = run.model.path
    if path is None or _get(run, key) is None:
        return None
    if Path(path).parent == EMBEDDED:
        return (
            f"with model={run.model.name}, which ships with peftbench; start from another model, such as "
            "model=bart_large, or add model.path=null"
        )
    return f"with model.path={path}, which counts; add model.path=null, or leave it out"


def _explain_data_set(name: str, task: Task) -> str | None:
    """Explain a key of the hub's dataset, in place of which `read_split` reads what comes first."""
    if getattr(task, name) is None:
        return None
    if task.data_dir is not None:
        return f"with task.data_dir={task.data_dir}, which counts; add task.data_dir=null, or leave it out"
    if task.packages is not None:
        return f"with task={task.name}, whose texts are docstrings of Python packages; leave it out"
    return None


def _explain_scale(prefix: str, run: Run) -> str | None:
    modifications = {"": run, **list_modifications(run)}
    if prefix not in modifications or modifications[prefix].composition_function.name is Composition.scaled:
        return None
    if run.peft:
        return f"with peft.type={run.peft.get('type')} without composition_function=scaled; leave it out"
    chosen = modifications[prefix].composition_function.name.name
    group = f"{prefix}composition_function"
    return f"with {group}={chosen}, which has no scale; use {group}{'.name' * bool(prefix)}=scaled, or leave it out"


def _explain_trainer(key: str, run: Run) -> str | None:
    trainer = run.trainer
    if run.debug is not None:  # which sets steps and batches of its own, for any line
        return None
    if key == "trainer.evaluate_every" and trainer.keep is Keep.last:
        return "with trainer.keep=last, which needs no evaluation; add trainer.keep=best, or leave it out"
    overriding = {"trainer.epochs": "max_steps", "trainer.batch_size": "batch_tokens"}.get(key)
    value = None if overriding is None else getattr(trainer, overriding)
    other = f"trainer.{overriding}"
    return None if value is None else f"with {other}={value}, which counts; add {other}=null, or leave it out"


def _explain_task(name: str, run: Run) -> str | None:
    task = run.task
    if name == "max_length" and task.messages_column is None:
        return f"with task={task.name}: it is for conversations; task.max_source_length limits other inputs"
    if name in ("hub_id", "hub_config", "hub_revision"):
        return _explain_data_set(name, task)
    for names, (kinds, words) in READERS.items():
        if name.partition(".")[0] in names and task.kind not in kinds:
            return f"with task={task.name}: it is for {words}; leave it out"
    return None
