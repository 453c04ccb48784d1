"""Find what is wrong with a task's settings: its data, labels, conversations and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from peftbench.config.own_parts import METRIC, is_own, list_entry_points
from peftbench.config.schema import (
    LOSS,
    WITH_LABELS,
    Task,
    TaskKind,
    list_task_files,
)
from peftbench.utils.errors import describe_unknown

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


def find_task_faults(task: Task, reads_data: bool) -> Iterator[str]:
    """Yield all faults of a task's settings; without `reads_data` it needs no data."""
    yield from _find_source_faults(task, reads_data)
    yield from _find_data_faults(task)
    yield from _find_metric_faults(task)


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
    if task.kind is not TaskKind.text_to_text and task.label_column in task.text_columns:
        yield (
            f"task.text_columns=[{','.join(task.text_columns)}] has {task.label_column}, which is task.label_column: "
            "the model would read what it is to predict; name another column."
        )
    elif len(set(task.text_columns)) < len(task.text_columns):
        yield f"task.text_columns=[{','.join(task.text_columns)}] names a column twice."
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
                typed = "true" if getattr(task, key) is True else getattr(task, key)
                yield f"task.{key}={typed} is for tasks that write text; leave it out of task={task.name}."
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
