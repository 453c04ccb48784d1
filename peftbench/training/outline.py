"""What a run is about to train, in a sentence or two for the screen."""

from __future__ import annotations

from peftbench.config.roles import HELD_OUT
from peftbench.config.schema import Keep, Run
from peftbench.records.record import RecordedCounts
from peftbench.tasks.base import TaskData
from peftbench.training.batching import count_steps


def describe_training(run: Run, counts: RecordedCounts, data: TaskData, head_too: bool) -> str:
    """Return what is trained on what, and for how long.

    Args:
        head_too: the task head is trained alone afterwards, as a baseline.
    """
    trainer, train = run.trainer, data.splits["train"]
    steps = count_steps(data, trainer)
    examples = trainer.batch_size * trainer.accumulation
    batch = f"{examples:,} examples" if trainer.batch_tokens is None else f"{trainer.batch_tokens:,} tokens"
    length = f"{steps:,} steps of {batch}"
    if trainer.max_steps is None:
        length = f"{trainer.epochs:g} epoch{'s' if trainer.epochs != 1 else ''}, {length}"
    stored = "" if counts.stored == counts.trained else f" ({counts.stored:,} to store)"
    sentence = (
        f"{run.method} trains {counts.trained:,} parameters{stored} on {run.model.name} of {counts.backbone:,} for "
        f"{run.task.name}: {train['examples']:,} examples, {length}."
    )
    if not head_too:
        return sentence
    others = ",".join(name for name in run.task.baselines if name != "head")
    return (
        f"{sentence} The task head is then trained alone in the same way: that score is the baseline head, and "
        f"task.baselines=[{others}] leaves it out."
    )


def describe_reported_choice(run: Run) -> str | None:
    """The sentence that the reported split chooses the state that is scored on it; None if it does not."""
    task = run.task
    if run.trainer.keep is not Keep.best or task.selection_split != task.report_split:
        return None
    return (
        f"The state is chosen on {task.selection_split}, the split that is reported on, so that its score is too good; "
        f"task.selection_split={HELD_OUT} chooses it on a tenth of {task.train_split}."
    )
