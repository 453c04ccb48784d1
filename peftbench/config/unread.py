"""Find keys that were typed for a finished run and that a command does not read: its training is over, and who types a
key means it to have an effect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from peftbench.config.idle import describe_idle, find_idle_keys
from peftbench.config.schema import Run, Task, Trainer

# Commands and functions that read a finished run, as they are called.
EVALUATE, PREDICT, EXPORT, IMPORT, LOAD_RUN, LOAD_HARNESS_MODEL = COMMANDS = (
    *("evaluate", "predict", "export", "import"),
    *("load_run", "load_harness_model"),
)

COMPUTES = ("device", "precision", "eval_batch_size", "eval_batch_tokens")
TRAINER = {EVALUATE: COMPUTES, PREDICT: COMPUTES, IMPORT: COMPUTES, LOAD_HARNESS_MODEL: ("device",)}
OF_TRAINING = (
    *("name", "sizes", "max_train", "max_selection", "selection_metric", "baselines", "paper", "quick"),
    "deal_by",
)
OF_DATA = (
    *("hub_id", "hub_config", "hub_revision", "packages", "data_dir", "data_files"),
    *("train_file", "validation_file", "test_file", "train_split", "selection_split", "report_split"),
    *("further_splits", "max_eval", "group_column", "merge_references", "metric"),
)
OF_THE_BACKBONE = ("kind", "_target_", "labels", "chat", "messages_column", "tools_column")
OF_THE_CARD = ("name", "prompt", "hub_id", "data_dir", "data_files", "train_file")
OF_TRAINER, ALL = ({field.name for field in fields(schema)} for schema in (Trainer, Task))
UNREAD_OF_TASK = {
    EVALUATE: {*OF_TRAINING},
    PREDICT: {*OF_TRAINING, *OF_DATA},
    EXPORT: ALL - {*OF_THE_BACKBONE, *OF_THE_CARD},
    IMPORT: {*OF_TRAINING} - {"name"},
    LOAD_RUN: ALL - {*OF_THE_BACKBONE},
    LOAD_HARNESS_MODEL: ALL - {*OF_THE_BACKBONE},
}
COUNTED = {"name", "sizes", "architecture"}  # what only counting reads, and the name, which a path gives
UNREAD_OF_MODEL = {**dict.fromkeys(COMMANDS, COUNTED), EXPORT: {*COUNTED, "dtype"}, IMPORT: set[str]()}


def explain_unread(key: str, command: str) -> str | None:
    """Return why a command does not read a key, as the end of a sentence; None: it does.

    Args:
        command: one of `COMMANDS`.
    """
    group, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if group == "trainer":
        read = TRAINER.get(command, ())
        if name in read or name not in OF_TRAINER:
            return None
        others = f"{', '.join(f'trainer.{other}' for other in read)} alone" if read else "no key of trainer"
        return f"for {command}, which reads {others}; leave it out"
    unread = {"task": UNREAD_OF_TASK, "model": UNREAD_OF_MODEL}.get(group, {}).get(command, set())
    if name not in unread:
        return None
    if command == PREDICT and name in OF_DATA:
        return "for predict, which reads FILE, and no data of the run; leave it out"
    return f"for {command}, which does not read it; leave it out"


def find_unread_keys(typed: Iterable[tuple[str, str]], run: Run, command: str) -> Iterator[str]:
    """Yield a sentence for each key that was typed for a finished run and changes nothing for a command.

    Args:
        typed: KEY=VALUE as it was typed, and its key.
        run: with what was typed.
        command: one of `COMMANDS`.
    """
    for line, key in typed:
        own = run.task._target_ is not None and key.startswith("task.")  # a task of one's own may read any key
        if not own and (why := explain_unread(key, command)) is not None:
            yield describe_idle(line, why)
        else:
            yield from find_idle_keys([(line, key)], run)
