"""The one place that knows which class serves which kind of task."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config import TaskKind
from peftbench.tasks.base import TaskData
from peftbench.tasks.classification import Classification, Regression
from peftbench.tasks.completion import Completion
from peftbench.tasks.load import Loaded
from peftbench.tasks.text_to_text import TextToText

KINDS: dict[TaskKind, type[TaskData]] = {
    TaskKind.classification: Classification,
    TaskKind.regression: Regression,
    TaskKind.text_to_text: TextToText,
}


def prepare(loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TaskData:
    """Tokenises the task's splits for a backbone. Raises UserError for a backbone that cannot read them."""
    if loaded.task.kind is TaskKind.text_to_text and not model.config.is_encoder_decoder:
        return Completion(loaded, tokenizer, model)
    return KINDS[loaded.task.kind](loaded, tokenizer, model)
