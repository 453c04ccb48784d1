"""Choose the data class for a task's kind and tokenise the task for a backbone."""

from __future__ import annotations

import json

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.config.schema import TaskKind
from peftbench.tasks.base import TaskData
from peftbench.tasks.cache import Recent
from peftbench.tasks.classification import Classification, Regression
from peftbench.tasks.completion import Completion
from peftbench.tasks.load import Loaded
from peftbench.tasks.text_to_text import TextToText
from peftbench.tasks.tokens import describe_rules

KINDS: dict[TaskKind, type[TaskData]] = {
    TaskKind.classification: Classification,
    TaskKind.regression: Regression,
    TaskKind.text_to_text: TextToText,
}

_recent: Recent[TaskData] = Recent()


def prepare_data(loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TaskData:
    """Tokenise the task's splits for a backbone. Raises UserError for a backbone that cannot read them.

    Tokens of an earlier run of this process are reused if rows, tokenizer and the backbone's config are the same.
    Nothing else of that run gets into this one: rows and tokens are never changed, and its model is released.
    """
    completes = loaded.task.kind is TaskKind.text_to_text and not model.config.is_encoder_decoder
    kind = Completion if completes else KINDS[loaded.task.kind]
    words = [
        *describe_rules(tokenizer),
        tokenizer.name_or_path,
        tokenizer.model_max_length,
        tokenizer.special_tokens_map,
    ]
    backbone = [type(model).__name__, model.config.to_json_string(use_diff=False)]
    key = (loaded, json.dumps([words, backbone], default=str))
    return _recent.get(key, lambda: kind(loaded, tokenizer, model)).serving(model)
