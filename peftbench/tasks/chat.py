"""Text through the chat template of a decoder-only backbone: sources and targets as two turns, or conversations."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.backbones.chat_template import (
    ASSISTANT,
    DATE,
    ChatTemplate,
    Message,
    NotRenderedError,
    Taught,
    list_ends,
    stop_at_turns,
)
from peftbench.metrics.statistics import References
from peftbench.tasks.completion import LEARNED, Completion
from peftbench.tasks.deal import ROW
from peftbench.tasks.framing import SOURCE
from peftbench.tasks.load import Loaded
from peftbench.tasks.rows import Source
from peftbench.tasks.source import find_files, has_source
from peftbench.tasks.tokens import CONVERSATION_CUT, SOURCE_CUT, TARGET_CUT
from peftbench.utils.errors import UserError, quote
from peftbench.utils.text import format_count


class Chat(Completion):
    """A task whose source in `task.prompt` is a user's turn, and whose target is the assistant's reply."""

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self.template = ChatTemplate(tokenizer, list_ends(model))
        self.loaded_rows = loaded.rows
        super().__init__(loaded, tokenizer, model)
        if self.template.end != tokenizer.eos_token_id:
            self.notes.append(
                f"The chat template ends a turn with {self.template.end_token}: replies are taught to end with it, and "
                "generation stops there."
            )
        if self.template.is_dated:
            self.notes.append(f"The chat template asks for today's date: it is {DATE:%d %B %Y} in every run.")
        if self.task.chat == "auto":
            self.notes.append(
                "Sources and targets go through the chat template (task.chat=auto): generation stops at "
                f"{self.template.end_token}, with which it ends a turn."
            )

    def serve(self, model: PreTrainedModel) -> None:
        """Set `collator`, and make generation stop at the end of a turn."""
        super().serve(model)
        stop_at_turns(model, self.template)

    def settings(self) -> list[Any]:
        """Return the settings on which `encode` depends, with the template."""
        return [*super().settings(), self.template.fingerprint, sorted(self.template.ends)]

    def reading(self) -> dict[str, Any]:
        """Return for the record also the template, and what ends a turn."""
        return {**super().reading(), "chat_template": self.template.fingerprint, "turn_end": self.template.end_token}

    def taught_ends(self) -> list[str]:
        """Return the token with which the template ends a turn."""
        return [self.template.end_token]

    @property
    def prompt(self) -> str:
        """The template of the user's turn; by default the source alone."""
        return self.task.prompt or SOURCE

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """Return `input_ids` up to where the assistant writes, and the ids of its reply as `labels`.

        A source is truncated if the whole prompt would be longer than `task.max_source_length`. A truncated target has
        no end of a turn.
        """
        self.check_prompt()
        longest, room = self.limits()["targets"], self.limits()["sources"]
        found: dict[str, list[Any]] = {"input_ids": [], SOURCE_CUT: [], "labels": [], TARGET_CUT: []}
        for source, target in zip(*self.pairs(rows, training), strict=True):
            kept, prompt = self._fit(source, room)
            reply = {"role": ASSISTANT, "content": self.template.protect(target)}
            with self._naming_row(source):
                labels = self.template.encode_reply([self._ask(kept)], reply).ids[len(prompt) :]
            found["input_ids"].append(prompt)
            found[SOURCE_CUT].append(len(kept) < len(source))
            found["labels"].append(labels[:longest])
            found[TARGET_CUT].append(len(labels) > longest)
        return found

    def decode(self, predictions: np.ndarray, role: str = "report") -> list[str]:
        """Return the texts of generated ids, without what the template puts before each reply."""
        return [self.template.clean(text) for text in super().decode(predictions, role)]

    def _ask(self, source: str) -> Message:
        """Return the user's turn. Special tokens that are typed in the prompt are special, unlike a source's."""
        return {"role": "user", "content": self.prompt.replace(SOURCE, self.template.protect(source))}

    def _fit(self, source: str, room: int) -> tuple[str, list[int]]:
        """Return as many letters of a source as fit into a prompt of `room` tokens, and the prompt."""
        keeps_end = self.tokenizer.truncation_side == "left"

        def cut(letters: int) -> str:
            return source[len(source) - letters :] if keeps_end else source[:letters]

        def frame(letters: int) -> list[int]:
            return self.template.encode_prompt([self._ask(cut(letters))])

        with self._naming_row(source):
            prompt = frame(len(source))
            if len(prompt) <= room:
                return source, prompt
            letters = bisect_right(range(len(source)), room, key=lambda letters: len(frame(letters))) - 1
        if letters < 1:
            raise UserError(
                f"The chat template leaves no room for a source in {room} tokens; shorten task.prompt, or raise "
                "task.max_source_length."
            )
        return cut(letters), frame(letters)

    @contextmanager
    def _naming_row(self, source: str) -> Iterator[None]:
        """Turn a NotRenderedError of the block into a UserError that names the row with this source."""
        try:
            yield
        except NotRenderedError as error:
            raise UserError(f"{self._locate(source)}: {error}.") from error

    def _locate(self, source: str) -> str:
        """Return where the row with a source is."""
        for split, rows in self.loaded_rows.items():
            sources = rows[self.task.source_column][:]
            if source in sources:
                files = find_files(self.task, split if has_source(self.task, split) else self.task.train_split)
                index = sources.index(source)
                number = 1 + (rows[ROW][index] if ROW in rows.column_names else index)
                return Source(rows, f"the {split} split", files).at(number)
        return quote(source)


class Conversations(Chat):
    """A task of conversations, in which the assistant's turns are learned; the last one is generated and scored."""

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        super().__init__(loaded, tokenizer, model)
        if hasattr(self, "train") and len(self.train) > len(self.train_rows):
            self.notes.append(
                "The chat template shows the assistant's turn otherwise once another one follows: "
                f"{format_count(len(self.train_rows), 'conversation')} {'is' if len(self.train_rows) == 1 else 'are'} "
                f"{format_count(len(self.train), 'example')}, one for each turn where it does."
            )

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """Return `input_ids` up to where the assistant first writes, the ids that follow as `labels`, and which of them
        are `learned`. Except in training, only the last turn is.

        An example is at most `task.max_length` tokens long. Its end is cut off, and with it the end of the turn. Of
        what precedes the first learned turn, the beginning is cut off, so that `task.generation.max_length` tokens are
        left to write in: generation and training read the same.
        """
        limit = self.limits()["conversations"]
        room = limit - self.task.generation.max_length
        if room < 1:
            raise UserError(
                f"task.generation.max_length={self.task.generation.max_length} leaves no room for a conversation of "
                f"{limit} tokens ({self._limited_by('conversations')}); lower it."
            )
        found: dict[str, list[Any]] = {"input_ids": [], "labels": [], LEARNED: [], CONVERSATION_CUT: []}
        for context, reply in zip(rows[self.task.source_column], rows[self.task.target_column], strict=True):
            for taught in self._encode_row(context, reply, training):
                first = taught.learned.index(True)
                prompt = taught.ids[max(0, first - room) : first]
                last = first + limit - len(prompt)
                found["input_ids"].append(prompt)
                found["labels"].append(taught.ids[first:last])
                found[LEARNED].append(taught.learned[first:last])
                found[CONVERSATION_CUT].append(first > room or last < len(taught.ids))
        return found

    def settings(self) -> list[Any]:
        """Return the settings on which `encode` depends, with the length of conversations."""
        return [*super().settings(), self.task.max_length]

    def limits(self) -> dict[str, int]:
        """Return the maximum length in tokens of a conversation."""
        return {"conversations": min(self.task.max_length, self.encoder.limit)}

    def references(self, rows: Dataset) -> References:
        """Return the last reply of each conversation, as the model has to write it."""
        cells = zip(rows[self.task.source_column][:], rows[self.task.target_column][:], strict=True)
        return [self._read_reply(context, reply) for context, reply in cells]

    def _read_reply(self, context: str, reply: str) -> str:
        with self._naming_row(context):
            return self.template.read_reply(*self._read(context, reply))

    def _encode_row(self, context: str, reply: str, training: bool) -> list[Taught]:
        before, last, tools = self._read(context, reply)
        with self._naming_row(context):
            if training:
                return self.template.encode([*before, last], tools)
            return [self.template.encode_reply(before, last, tools)]

    def _read(self, context: str, reply: str) -> tuple[list[Message], Message, Sequence[Any]]:
        """Return what precedes the last reply, the reply, and the tools, from a row's JSON."""
        read = self.template.protect(json.loads(context))
        return read["messages"], self.template.protect(json.loads(reply)), read["tools"]

    def _limited_by(self, what: str) -> str:
        return (
            f"task.max_length={self.task.max_length}"
            if self.task.max_length <= self.encoder.limit
            else (self.encoder.limited_by)
        )
