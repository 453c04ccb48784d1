"""The one place that knows which class serves which kind of task."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config import Task, TaskKind
from peftbench.tasks.base import TaskData
from peftbench.tasks.classification import Classification
from peftbench.tasks.summarization import Summarization

KINDS: dict[TaskKind, type[TaskData]] = {
    TaskKind.classification: Classification,
    TaskKind.summarization: Summarization,
}


def prepare(task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TaskData:
    """Reads and tokenises the task's splits for a backbone. Raises UserError for data that cannot be used."""
    return KINDS[task.kind](task, tokenizer, model)
