"""The chat template of a backbone's tokenizer: conversations as token ids, and the token that ends a turn.

A template makes one text of a conversation, in which nothing tells its own special tokens from those that a message
spells. `protect` therefore puts a mark into the latter before a template is rendered, and `ChatTemplate` removes the
mark when it tokenises the text: a message's `<|im_end|>` is ten letters. Conversations that spell no special token have
exactly the ids of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from peftbench.config.schema import Task, TaskKind
from peftbench.utils.errors import UserError

T = TypeVar("T")
Message = dict[str, Any]  # role, content, and whatever else the template reads

MARK = "\ufdd0"  # Unicode keeps this code point out of texts
ASSISTANT = "assistant"
DATE = date(2024, 7, 26)  # what a template gets that asks for today's date: a run must not depend on its day
_PROBE = "0123456789"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = "strftime_now"  # the function of transformers' templates, which takes a format
_FORMATS = re.compile(rf"""{_TODAY}\s*\(\s*["'](.*?)["']""")


class NotRenderedError(Exception):
    """A conversation that a template, or its tokenizer, cannot take; the message is the end of a sentence."""


@dataclass(frozen=True)
class Taught:
    """The ids of a conversation, and for each whether the model learns to write it."""

    ids: list[int]
    learned: list[bool]


class ChatTemplate:
    """Tokenises conversations with the chat template of a tokenizer.

    Messages and tools must have gone through `protect`. A turn of the assistant begins after the tokens with which the
    template asks for a reply, and ends with `end` or another token at which generation stops. What the template adds
    after that token, such as a line break, is never written by the model, and so not learned.

    Args:
        ends: the ids at which generation stops.

    Raises:
        UserError: the tokenizer has no template, or its template ends a turn with no special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no chat template; give one as "
                "model.chat_template=FILE, a Jinja file such as the chat_template.jinja of an instruct model with the "
                "same special tokens."
            )
        self.tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        words = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        # The unknown token also stands for letters that the vocabulary lacks.
        self._special_ids = {*tokenizer.convert_tokens_to_ids(words)} - {tokenizer.unk_token_id}
        self._special = _any_of(words)
        self._spelled = _any_of(map(_mark, words))
        self.ends = {self.end, *ends}

    @cached_property
    def end(self) -> int:
        """The id of the token that the template puts after a turn of the assistant."""
        after = self._split_probe()[1]
        found = self._special.search(after)
        if found is None:
            raise UserError(
                f"The chat template of {self.tokenizer.name_or_path or 'the backbone'} puts no special token after a "
                "turn of the assistant, so that generation could not stop there; give a template that does as "
                "model.chat_template=FILE."
            )
        index: int = self.tokenizer.convert_tokens_to_ids(found[0])
        return index

    @property
    def end_token(self) -> str:
        """The token that the template puts after a turn of the assistant, as text."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end))

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that stand for the template's text."""
        return hashlib.sha256(repr(self.tokenizer.chat_template).encode()).hexdigest()[:12]

    @property
    def is_dated(self) -> bool:
        """Whether the template asks for today's date, for which it gets `DATE`."""
        return _TODAY in repr(self.tokenizer.chat_template)

    def protect(self, value: T) -> T:
        """Return a JSON value with a mark in each special token that one of its texts or keys spells."""
        found: Any = value
        if isinstance(value, str):
            found = self._special.sub(lambda match: _mark(match[0]), value.replace(MARK, ""))
        elif isinstance(value, dict):
            found = {self.protect(key): self.protect(below) for key, below in value.items()}
        elif isinstance(value, list):
            found = [self.protect(below) for below in value]
        return found  # type: ignore[no-any-return]  # of the value's own type

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[Taught]:
        """Return the examples of a conversation that ends with a turn of the assistant.

        That is one example, in which each turn of the assistant is learned. A template may show a turn otherwise once
        another one follows: Qwen3's leaves out its thinking. If so, there is an example for each of the turns, which is
        preceded by what precedes it in generation. A template that marks what the assistant writes, by
        `{% generation %}`, decides by itself.

        Raises:
            NotRenderedError: the template refuses the conversation, or begins a turn otherwise than it asks for one.
        """
        if self._is_marked(tools):
            return [self._encode_marked(messages, tools)]
        turns = [
            self.encode_reply(messages[:place], message, tools)
            for place, message in enumerate(messages)
            if message["role"] == ASSISTANT
        ]
        whole = turns[-1].ids
        if any(turn.ids != whole[: len(turn.ids)] for turn in turns):
            return turns
        learned = [False] * len(whole)
        for turn in turns:
            for place, is_learned in enumerate(turn.learned):
                learned[place] |= is_learned
        return [Taught(whole, learned)]

    def encode_reply(self, before: Sequence[Message], reply: Message, tools: Sequence[Any] = ()) -> Taught:
        """Return the ids of messages and of the assistant's reply, of which only the reply is learned.

        Raises:
            NotRenderedError: see `encode`.
        """
        asked, text = self.render(before, tools, asks=True), self.render([*before, reply], tools)
        prompt, whole = self._tokenize(asked)[0], self._tokenize(text)[0]
        if whole[: len(prompt)] != prompt:
            raise NotRenderedError(
                "the assistant's turn begins with characters that the tokenizer joins with those of the chat template, "
                "as it never does in generation; remove the white space at its beginning"
                if text.startswith(asked)
                else "the chat template begins the assistant's turn otherwise than it asks for one, so that the model "
                "would not learn to write what it is asked for"
            )
        end = next((place for place in range(len(prompt), len(whole)) if whole[place] in self.ends), None)
        if end is None:
            raise NotRenderedError(f"the chat template does not end the assistant's turn with {self.end_token}")
        return Taught(whole[: end + 1], [place >= len(prompt) for place in range(end + 1)])

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Return the ids after which the model writes the assistant's next turn. Raises NotRenderedError."""
        return self._tokenize(self.render(messages, tools, asks=True))[0]

    def read_reply(self, before: Sequence[Message], reply: Message, tools: Sequence[Any] = ()) -> str:
        """Return the text that the model has to write for a reply, in the form of `clean`. Raises NotRenderedError."""
        prompt, whole = self.render(before, tools, asks=True), self.render([*before, reply], tools)
        written = whole[len(prompt) :]
        ends = [self.tokenizer.convert_ids_to_tokens(index) for index in self.ends]
        for match in self._special.finditer(written):
            if match[0] in ends:
                written = written[: match.start()]
                break
        return self.clean(self._special.sub("", written).replace(MARK, ""))

    def clean(self, written: str) -> str:
        """Return a text that the model wrote without what the template puts before each reply: an empty thought."""
        return written.strip().removeprefix(self._opening).strip()

    @cached_property
    def _opening(self) -> str:
        return self._special.sub("", self._split_probe()[0]).strip()

    def _split_probe(self) -> tuple[str, str]:
        """Return what the template writes in an assistant's turn before its content, and after it."""
        asked: list[Message] = [{"role": "user", "content": _PROBE}]
        try:
            prompt = self.render(asked, asks=True)
            text = self.render([*asked, {"role": ASSISTANT, "content": _PROBE}])
        except NotRenderedError as error:
            raise UserError(
                f"A user's and an assistant's turn cannot be put into the chat template: {error}."
            ) from error
        before, _, after = text.rpartition(_PROBE)
        return before[len(prompt) :] if before.startswith(prompt) else "", after

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = (), *, asks: bool = False) -> str:
        """Return the text of a conversation; `asks` adds what precedes the assistant's next turn.

        Raises:
            NotRenderedError: the template refuses the conversation.
        """
        return self._render(messages, tools, asks, marked=False)[0]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any], asks: bool, marked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and where the assistant's parts begin and end if the template marks them."""
        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=self._source(tools),
                add_generation_prompt=asks,
                return_assistant_tokens_mask=marked,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise NotRenderedError(f"the chat template refuses it: {reason}") from error
        return texts[0], spans[0] if marked else []

    def _source(self, tools: Sequence[Any]) -> str:
        """Return the template's text; a tokenizer may have another one for conversations with tools."""
        source: str = self.tokenizer.get_chat_template(tools=list(tools) or None)
        if _TODAY not in source:
            return source
        kept = "\n" if source.startswith("\n") else ""  # the first line break after a block is dropped
        known = json.dumps({form: DATE.strftime(form) for form in _FORMATS.findall(source)})
        written = f"{{{{ {known}.get(format, '{DATE}') }}}}"
        return f"{{% macro {_TODAY}(format) %}}{written}{{% endmacro %}}{kept}{source}"

    def _is_marked(self, tools: Sequence[Any]) -> bool:
        return self.tokenizer.is_fast and _GENERATION.search(self._source(tools)) is not None

    def _encode_marked(self, messages: Sequence[Message], tools: Sequence[Any]) -> Taught:
        """Return the ids of a conversation of which what the template marks is learned, with the end of each turn."""
        text, spans = self._render(messages, tools, asks=False, marked=True)
        ids, offsets = self._tokenize(text)
        # The marks of `protect` are in the spans, and no longer in the text that the offsets count.
        spans = [(start - text.count(MARK, 0, start), stop - text.count(MARK, 0, stop)) for start, stop in spans]
        learned = [any(start < last and first < stop for start, stop in spans) for first, last in offsets]
        if not any(learned):
            raise NotRenderedError("the chat template marks nothing of it as the assistant's")
        for place in range(1, len(ids)):
            learned[place] |= learned[place - 1] and ids[place] in self.ends and ids[place - 1] not in self.ends
        last = max(place for place, is_learned in enumerate(learned) if is_learned)
        return Taught(ids[: last + 1], learned[: last + 1])

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a rendered text, and their places in it without marks (none from a slow tokenizer).

        Without a mark, the text is tokenised as a whole. A tokenizer splits a text at its special tokens first, and so
        the text between those of the template can be tokenised by itself, where special tokens are letters. That this
        makes no difference is checked on the same text without those that it spells.

        Raises:
            NotRenderedError: it does make a difference.
        """
        if MARK not in text:
            return self._tokenize_piece(text)
        bare = self._spelled.sub("", text)
        if MARK in bare or self._tokenize_pieces(bare)[0] != self._tokenize_piece(bare)[0]:
            raise self._describe_spelled(text)
        found = self._tokenize_pieces(text)
        own = sum(1 for _ in self._special.finditer(text))
        if sum(index in self._special_ids for index in found[0]) > own:
            raise self._describe_spelled(text)
        return found

    def _describe_spelled(self, text: str) -> NotRenderedError:
        found = self._spelled.search(text)
        spelled = (found[0] if found else text[text.find(MARK) - 1 :][:20]).replace(MARK, "")
        return NotRenderedError(f"it spells {spelled}, which the tokenizer cannot read as letters there")

    def _tokenize_pieces(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for piece, is_special in _split(self._special, text):
            plain = piece.replace(MARK, "")
            found, places = self._tokenize_piece(plain, letters=not is_special)
            ids.extend(found)
            offsets.extend((start + first, start + last) for first, last in places)
            start += len(plain)
        return ids, offsets

    def _tokenize_piece(self, text: str, letters: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=letters,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        return encoded["input_ids"], encoded.get("offset_mapping", [])


def choose_template(task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the template through which a task's texts go; None if they go through none.

    `task.chat=auto` takes the template of an instruct model: a decoder alone whose generation stops at the token with
    which its template ends a turn. Base models may have the template of their instruct model, and stop elsewhere.

    Raises:
        UserError: the task needs a template, and there is none, or the backbone is an encoder-decoder.
    """
    if task.kind is not TaskKind.text_to_text:
        return None
    if task.messages_column is None and task.chat is not True:
        is_plain = task.chat is False or explain_plain(model, tokenizer) is not None
        return None if is_plain else ChatTemplate(tokenizer, list_ends(model))
    if model.config.is_encoder_decoder:
        asked = "task.chat=true" if task.messages_column is None else f"task={task.name}"
        raise UserError(
            f"{asked} needs a decoder-only backbone, and {model.config.model_type} is an encoder-decoder; give another "
            "one, such as model=llama model.path=FOLDER."
        )
    return ChatTemplate(tokenizer, list_ends(model))


def explain_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return why a backbone is no instruct model for `task.chat=auto`; None if it is one."""
    if model.config.is_encoder_decoder:
        return "the backbone is an encoder-decoder"
    if not tokenizer.chat_template:
        return "the tokenizer has no chat template"
    try:
        template = ChatTemplate(tokenizer)
    except UserError as error:
        return str(error).rstrip(".")
    if template.end not in list_ends(model):
        return (
            f"generation does not stop at {template.end_token}, with which the chat template ends a turn, as if the "
            "backbone were not trained on it; task.chat=true uses it all the same"
        )
    return None


def stop_at_turns(model: PreTrainedModel, template: ChatTemplate) -> None:
    """Make generation stop at the end of a turn, too."""
    before = list_ends(model)
    if template.end not in before:
        assert model.generation_config is not None
        model.generation_config.eos_token_id = [template.end, *before]


def list_ends(model: PreTrainedModel) -> list[int]:
    """Return the ids at which generation stops."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # a classifier has none
    return [*found] if isinstance(found, list | tuple) else [] if found is None else [found]


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches each of the words, or nothing if there are none."""
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def _mark(word: str) -> str:
    return f"{word[0]}{MARK}{word[1:]}"


def _split(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text that match a pattern and those between them, and whether each matches."""
    last = 0
    for match in pattern.finditer(text):
        if match.start() > last:
            yield text[last : match.start()], False
        yield match[0], True
        last = match.end()
    if last < len(text):
        yield text[last:], False
