"""Tokenisation in which no text of the data can spell a special token."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.utils.errors import UserError

# Columns: whether the text of a row was truncated.
SOURCE_CUT, TARGET_CUT, CONVERSATION_CUT = "source_cut", "target_cut", "conversation_cut"
QUESTION_CUT = "question_cut"


UNREAD = {"token_type_ids"}  # given by some tokenizers, and refused by models that do not read it


class Encoder:
    """Tokenises texts for one backbone. A `</s>` in a text is four ordinary characters.

    Raises UserError for a tokenizer without a pad token, and for an encoder-decoder's tokenizer that adds no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no pad token, without which texts of "
                "unequal length cannot be batched; name one as pad_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        read, places = tokenizer.model_max_length, count_positions(model)
        self.limit = min(read, places or read)
        self.limited_by = (
            f"the tokenizer's model_max_length={read}" if self.limit == read else "the backbone's positions"
        )
        self._unread = UNREAD - inspect.signature(model.forward).parameters.keys()
        self._spelled = self._unsplit_tokens()
        if model.config.is_encoder_decoder and not self._ends_texts():
            end = f"{tokenizer.eos_token}, at which generation stops" if tokenizer.eos_token else "any token"
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} does not end a text with {end}; name the "
                "token as eos_token in its tokenizer_config.json, and let its post_processor add it after a text."
            )

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int,
        target: bool = False,
        special: bool = True,
    ) -> dict[str, list[Any]]:
        """Return `input_ids` and `attention_mask` (and what else the model reads) of each text or pair of texts, and
        as `source_cut` whether it was truncated.

        There are at most `max_length` tokens, including special tokens, and no more than the backbone can read; of a
        pair, the longer text is truncated first. If the tokenizer puts nothing between the texts of a pair,
        `separator` is added there. `target` says that the model has to write the texts. Without `special` none of the
        tokenizer's special tokens are added around them.

        Raises:
            UserError: special tokens alone fill `max_length`, at which tokenizers truncate nothing, or leave no text.
        """
        if special and not target and max_length <= (own := self._count_special(pairs is not None)):
            what = "pair of texts" if pairs is not None else "text"
            raise UserError(
                f"task.max_source_length={max_length}: the tokenizer adds {own} tokens to each {what}, so that nothing "
                "of it would be read; give more."
            )
        if pairs is not None and self.separator:
            return self._separated(texts, pairs, max_length)
        plain = self._plain(texts)
        kind = {"text_target": plain} if target else {"text": plain, "text_pair": pairs and self._plain(pairs)}
        encoded = self.tokenizer(
            **kind,
            truncation=True,
            max_length=min(max_length, self.limit),
            add_special_tokens=special,
            split_special_tokens=True,
        )
        read = {name: column for name, column in encoded.items() if name not in self._unread}
        return {**read, SOURCE_CUT: self._cut(encoded, kind, special)}

    def _count_special(self, pair: bool) -> int:
        """Return how many special tokens the tokenizer adds to a text, or to a pair of texts."""
        count: int = self.tokenizer.num_special_tokens_to_add(pair=pair)
        return count

    def ids(self, texts: Sequence[str], target: bool = False) -> list[list[int]]:
        """Return the ids of whole texts, without special tokens; `target` says that the model has to write them."""
        return self._whole({"text_target" if target else "text": self._plain(texts)}, special=False)

    def pieces(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield the ids of each whole text, without special tokens, and for each id its first character in the text and
        the one after its last. The tokenizer must be a fast one."""
        plain = self._plain(texts)
        encoded: Any = self.tokenizer(
            plain,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for text, other, ids, spans in zip(texts, plain, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if text != other and self._spelled is not None:  # a space was added after one character of each match
                added = [match.start() + 1 + number for number, match in enumerate(self._spelled.finditer(text))]
                spans = [(start - bisect_left(added, start), end - bisect_left(added, end)) for start, end in spans]
            yield ids, spans

    def frame_pair(self) -> tuple[list[int], list[int], list[int], tuple[int, int] | None]:
        """Return what stands before the first text of a pair, between the two and after the second, and the token types
        of both, each with what precedes it; None if the model reads no types."""
        one, other = self.ids(["a", "b"])
        encoded = self.tokenizer("a", "b", split_special_tokens=True)
        whole, types = encoded["input_ids"], encoded.get("token_type_ids")
        first = _place(one, whole)
        rest = [] if first is None else whole[first + len(one) :]
        between = _place(other, rest)
        if first is None or between is None:
            raise UserError(
                f"The tokenizer of {self.tokenizer.name_or_path or 'the backbone'} changes texts when it puts them in "
                "a pair, so that it is not known where each of them is; take another backbone."
            )
        kinds = None
        if types is not None and "token_type_ids" not in self._unread:
            kinds = types[first], types[first + len(one) + between]
        return whole[:first], self.separator or rest[:between], rest[between + len(other) :], kinds

    def typed(self, text: str) -> list[int]:
        """Return the ids of a text that the user typed, in which special tokens are special."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return found

    def ends(self, target: bool = False) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer adds before and after a text."""
        (plain,) = self.ids(["a"], target)
        (whole,) = self._whole({"text_target" if target else "text": ["a"]}, special=True)
        start = _place(plain, whole)
        assert start is not None, f"{type(self.tokenizer).__name__} changes a text when it puts tokens around it"
        return whole[:start], whole[start + len(plain) :]

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """A pattern that matches each special token."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return _any_of({*added, *self.tokenizer.all_special_tokens})

    @cached_property
    def separator(self) -> list[int]:
        """What to add between the texts of a pair if the tokenizer puts nothing there: a line break, or the end token
        if the tokenizer ignores line breaks; empty if the tokenizer has a separator of its own."""
        one, other = self.ids(["a", "b"])
        (whole,) = self._whole({"text": ["a"], "text_pair": ["b"]}, special=True)
        if _place([*one, *other], whole) is None:
            return []
        found = self.ids(["\n"])[0] or [self.tokenizer.eos_token_id]
        if found == [None]:
            raise UserError(
                f"The tokenizer of {self.tokenizer.name_or_path or 'the backbone'} has nothing to put between the "
                "texts of a pair: it ignores line breaks, and no token ends a text; name one as eos_token in its "
                "tokenizer_config.json."
            )
        return found

    @cached_property
    def fingerprint(self) -> list[Any]:
        """JSON values on which the ids depend."""
        return [
            *describe_rules(self.tokenizer),
            [getattr(self.tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
            {role: str(token) for role, token in self.tokenizer.special_tokens_map.items()},
            self.limit,
            transformers.__version__,
            tokenizers.__version__,
            *sorted(self._unread & set(self.tokenizer.model_input_names)),
        ]

    def _ends_texts(self) -> bool:
        (ids,) = self._whole({"text": ["a"]}, special=True)
        return self.tokenizer.eos_token_id in ids[1:]

    def _separated(self, texts: Sequence[str], pairs: Sequence[str], max_length: int) -> dict[str, list[Any]]:
        """Encode pairs with `separator` between the texts; the longer text is truncated first."""
        opening, closing = self.ends()
        room = max(0, min(max_length, self.limit) - len(opening) - len(self.separator) - len(closing))
        found: dict[str, list[Any]] = {"input_ids": [], SOURCE_CUT: []}
        for first, second in zip(self.ids(texts), self.ids(pairs), strict=True):
            kept = [
                self._shortened(ids, max(room - len(other), room // 2))
                for ids, other in ((first, second), (second, first))
            ]
            found["input_ids"].append([*opening, *kept[0], *self.separator, *kept[1], *closing])
            found[SOURCE_CUT].append(len(kept[0]) + len(kept[1]) < len(first) + len(second))
        found["attention_mask"] = [[1] * len(ids) for ids in found["input_ids"]]
        return found

    def _shortened(self, ids: list[int], length: int) -> list[int]:
        """Return at most `length` ids, from the side that the tokenizer keeps."""
        if len(ids) <= length:
            return ids
        return ids[len(ids) - length :] if self.tokenizer.truncation_side == "left" else ids[:length]

    def _whole(self, kind: dict[str, list[str]], special: bool) -> list[list[int]]:
        """Return the ids of the texts without truncation."""
        encoded = self.tokenizer(**kind, add_special_tokens=special, split_special_tokens=True, verbose=False)
        found: list[list[int]] = encoded["input_ids"]
        return found

    def _cut(self, encoded: Any, kind: dict[str, Any], special: bool) -> list[bool]:
        """Return for each text in `encoded` whether it was truncated."""
        if encoded.encodings is not None:
            return [bool(one.overflowing) for one in encoded.encodings]
        whole = self._whole({name: texts for name, texts in kind.items() if texts}, special)
        return [len(ids) < len(all_) for ids, all_ in zip(encoded["input_ids"], whole, strict=True)]

    def _plain(self, texts: Sequence[str]) -> list[str]:
        """Write `</s>` as `< /s>`, for the tokenizers that would take it for the special token."""
        if self._spelled is None:
            return list(texts)
        return [self._spelled.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) for text in texts]

    def _unsplit_tokens(self) -> re.Pattern[str] | None:
        """Return a pattern for the special tokens that `split_special_tokens` does not split; None if it splits all.

        A Unigram or word-level model (T5, mBART, XLM-R) has them among its ordinary pieces and finds them in text.
        """
        special: dict[int, str] = {
            index: token.content
            for index, token in self.tokenizer.added_tokens_decoder.items()
            # the unknown token represents any text that the vocabulary lacks
            if token.special and token.content != self.tokenizer.unk_token
        }
        if not special:  # in GPT-2 one token has all roles
            return None
        encoded: Any = self.tokenizer(list(special.values()), add_special_tokens=False, split_special_tokens=True)
        found = [
            token for (index, token), ids in zip(special.items(), encoded["input_ids"], strict=True) if index in ids
        ]
        return _any_of(found) if found else None


def _any_of(words: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def _place(part: list[int], whole: list[int]) -> int | None:
    """Return where `part` begins in `whole`; None if it is not there."""
    return next((i for i in range(len(whole)) if whole[i : i + len(part)] == part), None)


def describe_rules(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a tokenizer's class, a hash of its vocabulary and rules, and the side that it truncates."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for call in ("truncation", "padding"):  # they only reflect the last call
        found.pop(call, None)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return [type(tokenizer).__name__, digest, tokenizer.truncation_side]


def count_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens the backbone has positions for; None without a limit, as with relative positions.

    RoBERTa and similar models number positions from the padding index + 1, so that many of their embeddings are unused.
    """
    count: int | None = getattr(model.config, "max_position_embeddings", None)
    if count is None:
        return None
    unused = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return count - max(unused, default=0)
