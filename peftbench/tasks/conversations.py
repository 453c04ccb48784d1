"""Rows of conversations: their two common forms are read into one, and the last reply is taken apart as the target."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

from peftbench.backbones.chat_template import ASSISTANT, Message
from peftbench.config.schema import Task
from peftbench.tasks.rows import Source
from peftbench.utils.errors import UserError, describe_unknown, quote, suggest

# A template builds its special tokens from roles, and so only these are let through.
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")
# The names of ShareGPT's form, {"from": ..., "value": ...}.
SHARED_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def split_conversations(task: Task, source: Source) -> Dataset:
    """Return rows whose source is what precedes the last turn of the assistant, and whose target is this turn.

    Both are JSON, `{"messages": [...], "tools": [...]}` and a message: Arrow cannot hold lists of unlike dicts. What
    follows the last turn of the assistant is left out: nobody can learn from it or be scored by it.

    Raises:
        UserError: a column is missing, or a cell holds no conversation.
    """
    rows = source.rows
    assert task.messages_column is not None
    for key in ("messages_column", "tools_column"):
        column = getattr(task, key)
        if column is not None and column not in rows.column_names:
            raise UserError(f"{source.name}: {describe_unknown(f'task.{key}', column, rows.column_names)}")
    cells = rows[task.messages_column][:]
    tools = rows[task.tools_column][:] if task.tools_column else [None] * len(rows)
    contexts, replies = [], []
    for number, (cell, offered) in enumerate(zip(cells, tools, strict=True), 1):
        try:
            messages = _read_messages(cell)
            context = {"messages": messages[:-1], "tools": _read_tools(offered)}
        except _UnreadableError as error:
            raise UserError(f"{source.at(number)}: {error}.") from error
        contexts.append(json.dumps(context, ensure_ascii=False))
        replies.append(json.dumps(messages[-1], ensure_ascii=False))
    named = {task.source_column: contexts, task.target_column: replies}
    rows = rows.remove_columns([name for name in named if name in rows.column_names])
    for name, column in named.items():
        rows = rows.add_column(name, column)
    return rows


class _UnreadableError(Exception):
    """The end of a sentence about a cell."""


def _read_messages(cell: Any) -> list[Message]:
    """Return the messages of a cell, up to the last turn of the assistant."""
    found = [_read_message(number, entry) for number, entry in enumerate(_read_list(cell, "a conversation"), 1)]
    turns = [place for place, message in enumerate(found) if message["role"] == ASSISTANT]
    if not turns:
        raise _UnreadableError("the conversation has no turn of the assistant, which would be learned")
    if all(message["role"] in ("system", "developer") for message in found[: turns[0]]):
        raise _UnreadableError("the assistant's first turn answers nobody; put a user's turn before it, or remove it")
    return found[: turns[-1] + 1]


def _read_message(number: int, entry: Any) -> Message:
    """Return a message in the form of OpenAI and transformers, `{"role": ..., "content": ...}`."""
    if not isinstance(entry, dict) or not ({"role"} <= entry.keys() or {"from", "value"} <= entry.keys()):
        raise _UnreadableError(
            f'message {number} is {quote(entry)}; write {{"role": "user", "content": "..."}}, or in ShareGPT\'s form '
            '{"from": "human", "value": "..."}'
        )
    message: Message = _drop_nulls(entry)
    if "role" not in message:
        named = message.pop("from", None)
        if named not in SHARED_ROLES:
            raise _UnreadableError(f"message {number} is from {named!r}{suggest(named, SHARED_ROLES)}".rstrip("."))
        message = {"role": SHARED_ROLES[named], "content": message.pop("value", ""), **message}
    if message["role"] not in ROLES:
        raise _UnreadableError(
            f"message {number} has the role {message['role']!r}{suggest(message['role'], ROLES)}".rstrip(".")
        )
    content = message.get("content")
    if content is None and not any(message.get(other) for other in ("tool_calls", "reasoning_content", "thinking")):
        raise _UnreadableError(f"message {number} has no content")
    return message


def _read_tools(cell: Any) -> list[Any]:
    tools = [] if cell is None or cell == "" else _drop_nulls(_read_list(cell, "a list of tools"))
    if not all(isinstance(tool, dict) for tool in tools):
        raise _UnreadableError("a tool is not an object, as in a JSON schema")
    found: list[Any] = tools
    return found


def _read_list(cell: Any, what: str) -> list[Any]:
    """Return the list in a cell, which may be written as JSON."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _UnreadableError(f"{quote(cell)} is not {what}: not JSON") from error
    if not isinstance(cell, list):
        raise _UnreadableError(f"{quote(cell)} is not {what}: not a list")
    return cell


def _drop_nulls(value: Any) -> Any:
    """Return a JSON value without keys that are null: Arrow gives each dict of a column the keys of all others."""
    if isinstance(value, dict):
        return {key: _drop_nulls(below) for key, below in value.items() if below is not None}
    return [_drop_nulls(below) for below in value] if isinstance(value, list) else value
