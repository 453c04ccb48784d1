"""Choose the data class for a task's kind and tokenise the task for a backbone."""

from __future__ import annotations

import json

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.backbones.chat_template import choose_template, explain_plain, list_ends
from peftbench.config.own_parts import TASK, load_class
from peftbench.config.schema import Task, TaskKind
from peftbench.tasks.base import TaskData
from peftbench.tasks.cache import Recent
from peftbench.tasks.chat import Chat, Conversations
from peftbench.tasks.classification import Classification, Regression
from peftbench.tasks.completion import Completion
from peftbench.tasks.load import Loaded
from peftbench.tasks.question_answering import QuestionAnswering
from peftbench.tasks.text_to_text import TextToText
from peftbench.tasks.token_classification import TokenClassification
from peftbench.tasks.tokens import describe_rules
from peftbench.utils.errors import UserError

KINDS: dict[TaskKind, type[TaskData]] = {
    TaskKind.classification: Classification,
    TaskKind.regression: Regression,
    TaskKind.token_classification: TokenClassification,
    TaskKind.question_answering: QuestionAnswering,
    TaskKind.text_to_text: TextToText,
}

_recent: Recent[TaskData] = Recent()


def prepare_data(loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TaskData:
    """Tokenise the task's splits for a backbone. Raises UserError for a backbone that cannot read them.

    Tokens of an earlier run of this process are reused if rows, tokenizer and the backbone's config are the same.
    Nothing else of that run gets into this one: rows and tokens are never changed, and its model is released.
    """
    kind = _choose_kind(loaded, tokenizer, model)
    words = [
        *describe_rules(tokenizer),
        tokenizer.name_or_path,
        tokenizer.model_max_length,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    ]
    backbone = [type(model).__name__, model.config.to_json_string(use_diff=False), list_ends(model)]
    key = (loaded, json.dumps([words, backbone], default=str))
    return _recent.get(key, lambda: _make_data(kind, loaded, tokenizer, model)).serving(model)


def _make_data(
    kind: type[TaskData], loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> TaskData:
    data = kind(loaded, tokenizer, model)
    if loaded.task.chat == "auto" and not isinstance(data, Chat) and (why := explain_plain(model, tokenizer)):
        data.notes.append(f"Sources and targets do not go through a chat template (task.chat=auto): {why}.")
    return data


def _choose_kind(loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> type[TaskData]:
    chosen = _choose_own_kind(loaded.task, tokenizer, model)
    return chosen if loaded.task._target_ is None else derive_own_task(loaded.task, KINDS[loaded.task.kind], chosen)


def derive_own_task(task: Task, base: type[TaskData], chosen: type[TaskData]) -> type[TaskData]:
    """Return the class of a task of the user's own, for the backbone of a run.

    Args:
        base: the class of the task's kind, from which it must be derived.
        chosen: peftbench's class for the kind and the backbone; for a decoder-only model it is derived from `base`. Its
            methods come after the user's.

    Raises:
        UserError: it cannot be imported, or is not derived from `base`.
    """
    assert task._target_ is not None
    found: type[TaskData] = load_class(TASK, task._target_, base)
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{TASK}={task._target_} does not define {', '.join(missing)}.")
    return found if issubclass(found, chosen) else type(found.__name__, (found, chosen), {})


def find_own_task_faults(task: Task) -> list[str]:
    """Return what is wrong with a task of the user's own, before anything is loaded."""
    try:
        if task._target_ is not None:
            derive_own_task(task, KINDS[task.kind], KINDS[task.kind])
    except UserError as error:
        return error.faults
    return []


def _choose_own_kind(task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> type[TaskData]:
    """Return peftbench's own class for a task and a backbone."""
    if task.kind is not TaskKind.text_to_text:
        return KINDS[task.kind]
    if choose_template(task, model, tokenizer) is not None:
        return Chat if task.messages_column is None else Conversations
    return TextToText if model.config.is_encoder_decoder else Completion
