"""Special tokens on which a backbone's files disagree: the end of a text, the padding, the start of the output.

Three files name them: tokenizer_config.json, config.json and generation_config.json. Training reads the first two,
generation the third. If they disagree, a model may learn an end token at which generation does not stop. `settle`
makes them agree when a backbone is loaded, and reports each choice. Files that agree are not changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Usable = Callable[[int], bool]


@dataclass(frozen=True)
class Named:
    """The ids that a backbone's files name for one role: for each file a tuple without repetitions, maybe empty."""

    tokenizer: tuple[int, ...] = ()
    config: tuple[int, ...] = ()
    generation: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: object, config: object, generation: object) -> Named:
        """Return the ids from the files' values: an id, a list of them or null."""
        return cls(*map(_list_ids, (tokenizer, config, generation)))

    def own(self, is_special: Usable) -> tuple[int, ...]:
        """Return the ids that the model itself names, those of generation first.

        An id that the tokenizer uses for ordinary text, such as a default that nobody has set, does not count, unless
        the tokenizer names it too.
        """
        found = _deduplicate(self.generation, self.config)
        return tuple(i for i in found if is_special(i) or i in self.tokenizer)

    def chosen(self, is_special: Usable) -> int | None:
        """Return the one id to use, if there is any.

        It is the tokenizer's if the model names it too, else the model's first, else the tokenizer's.
        """
        own = self.own(is_special)
        return next(iter([*(i for i in self.tokenizer if i in own), *own, *self.tokenizer]), None)

    def all(self, is_special: Usable) -> tuple[int, ...]:
        """Return the union: every end of a text stops generation."""
        return _deduplicate(self.own(is_special), self.tokenizer)

    def differ(self) -> bool:
        """Return whether two files name different ids."""
        return len({frozenset(ids) for ids in (self.tokenizer, self.config, self.generation) if ids}) > 1


def settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, writes: bool) -> list[str]:
    """Make tokenizer, config and generation config name the same special tokens.

    A token for which the embedding has no row is ignored. The choices are:

    - the end of a text: the model's own, which the tokenizer then also puts after a text; generation stops there and at
      every other end that is named.
    - padding: the model's own, or else the end of a text.
    - the start of an encoder-decoder's output: that of the generation config.
    - the beginning of a text: that of the tokenizer.

    Args:
        writes: the model will write text; otherwise only what a classifier reads matters.

    Returns:
        A sentence for each role on which the files disagree.
    """
    files = _Files(model, tokenizer)
    both = model.config.is_encoder_decoder
    return [
        *files.outside(),
        *(_settle_end(files) if writes or both else []),
        *_settle_pad(files),
        *(_settle_start(files) if both else []),
        *(_settle_bos(files) if writes and not both else []),
    ]


class _Files:
    """The contents of a backbone's three files, as loaded; ids outside the embedding are ignored."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = model.config, tokenizer
        self.generation: GenerationConfig | None = getattr(model, "generation_config", None)
        self.height: int = model.get_input_embeddings().weight.shape[0]
        self.special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}

    def is_special(self, index: int) -> bool:
        """Return whether the id is a token of the tokenizer that ordinary text never contains."""
        return index in self.special

    def outside(self) -> list[str]:
        """Return a sentence for each padding or end token of the tokenizer for which the embedding has no row."""
        ids = {key: getattr(self.tokenizer, f"{key}_id") for key in ("eos_token", "pad_token")}
        return [
            f"The tokenizer's {key} {self.said(i)} ({i}) is not used: the embedding has {self.height:,} rows."
            for key, i in ids.items()
            if i is not None and i >= self.height
        ]

    def openings(self) -> set[int]:
        """Return the tokens that precede each text of an encoder-decoder, and so cannot end one."""
        if not self.config.is_encoder_decoder:
            return set()
        first = self.tokenizer("a")["input_ids"][0]
        return {first, *_list_ids(getattr(self.generation, "forced_bos_token_id", None))} & self.special

    def named(self, role: str, tokenizer: bool = True) -> Named:
        """Return the ids that the files name for a role such as eos; `tokenizer` is false if it has no such role."""
        key = f"{role}_token_id"
        held = (getattr(self.tokenizer, key) if tokenizer else None, getattr(self.config, key, None))
        found = Named.of(*held, getattr(self.generation, key, None))
        return Named(*(tuple(i for i in ids if 0 <= i < self.height) for ids in vars(found).values()))

    def name(self, role: str, index: int | None) -> None:
        """Set the tokenizer's token for a role by its id."""
        if getattr(self.tokenizer, f"{role}_token_id") != index:
            setattr(self.tokenizer, f"{role}_token", None if index is None else self.said(index))

    def said(self, index: int) -> str:
        """Return the id's token as text."""
        token = self.tokenizer.convert_ids_to_tokens(index)
        return str(index) if token is None else str(token)

    def differing(self, role: str, named: Named) -> str:
        """Return the beginning of a sentence, with what each file names."""
        places = (
            ("tokenizer_config.json", named.tokenizer),
            ("config.json", named.config),
            ("generation_config.json", named.generation),
        )
        each = [f"{' and '.join(f'{self.said(i)} ({i})' for i in ids)} in {place}" for place, ids in places if ids]
        return f"The backbone's {role} is {', '.join(each)}"


def _settle_end(files: _Files) -> list[str]:
    named = files.named("eos")
    end = named.chosen(files.is_special)
    ends = tuple(index for index in named.all(files.is_special) if index == end or index not in files.openings())
    before = files.tokenizer.eos_token_id
    if end is None:
        files.name("eos", None)
        return []
    chose = named.tokenizer and end not in named.tokenizer
    more = bool(named.generation) and set(ends) != set(named.generation)
    files.name("eos", end)
    if before is not None and before != end:
        _end_texts_with(files.tokenizer, before, end)
    if files.generation is not None and set(ends) != set(_list_ids(files.generation.eos_token_id)):
        files.generation.eos_token_id = list(ends) if len(ends) > 1 else end
    if not set(_list_ids(files.config.eos_token_id)) & set(ends):
        files.config.eos_token_id = end
    if not (chose or more):
        return []
    stops = "" if len(ends) == 1 else f", and generation stops at {' and '.join(map(files.said, ends))}"
    return [f"{files.differing('eos_token', named)}: {files.said(end)} ends the texts that are learnt{stops}."]


def _settle_pad(files: _Files) -> list[str]:
    named = files.named("pad")
    # The config's comes first: a classifier uses it to count positions and to find a text's last token.
    pad = Named(named.tokenizer, (), _deduplicate(named.config, named.generation)).chosen(files.is_special)
    files.name("pad", pad)
    if (
        pad is None and files.named("eos").tokenizer
    ):  # GPT-2 and Llama have no padding token: a mask hides the substitute
        pad = files.named("eos").tokenizer[0]
        files.tokenizer.pad_token = files.tokenizer.eos_token
    if pad is None:
        return []
    if files.config.pad_token_id != pad:
        files.config.pad_token_id = pad
    if files.generation is not None and files.generation.pad_token_id not in (None, pad):
        files.generation.pad_token_id = pad
    return [f"{files.differing('pad_token', named)}: {files.said(pad)} pads."] if named.differ() else []


def _settle_start(files: _Files) -> list[str]:
    named = files.named("decoder_start", tokenizer=False)
    start = next(iter(_deduplicate(named.generation, named.config)), None)
    if start is None:
        return []
    files.config.decoder_start_token_id = start
    if files.generation is not None:
        files.generation.decoder_start_token_id = start
    said = f"{files.differing('decoder_start_token', named)}: {files.said(start)} begins what is written."
    return [said] if named.differ() else []


def _settle_bos(files: _Files) -> list[str]:
    named = files.named("bos")
    if not named.tokenizer or not named.differ() or named.tokenizer[0] in named.own(files.is_special):
        return []
    for place in filter(None, (files.config, files.generation)):
        place.bos_token_id = named.tokenizer[0]
    return [f"{files.differing('bos_token', named)}: a text begins as the tokenizer begins it."]


def _end_texts_with(tokenizer: PreTrainedTokenizerBase, before: int, end: int) -> None:
    """Make the tokenizer put the token `end` after a text where it puts `before` now."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.post_processor is None:
        return
    whole = json.loads(backend.to_str())
    old, new = map(str, tokenizer.convert_ids_to_tokens([before, end]))
    _replace_end(whole["post_processor"], old, new, end)
    backend.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor


def _replace_end(processor: dict[str, Any], old: str, new: str, index: int) -> None:
    """Replace the end token in the JSON of a post-processor, in each of its kinds."""
    for below in processor.get("processors", []):
        _replace_end(below, old, new, index)
    if processor.get("sep", [None])[0] == old:
        processor["sep"] = [new, index]
    for pattern in (processor.get("single", []), processor.get("pair", [])):
        for piece in reversed(pattern):
            if "SpecialToken" not in piece:  # tokens before the last text stay
                break
            if piece["SpecialToken"]["id"] == old:
                piece["SpecialToken"]["id"] = new
                processor["special_tokens"][new] = {"id": new, "ids": [index], "tokens": [new]}


def _list_ids(value: object) -> tuple[int, ...]:
    values: Sequence[object] = value if isinstance(value, list | tuple) else (value,)
    return _deduplicate([index for index in values if isinstance(index, int)])


def _deduplicate(*parts: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index for part in parts for index in part))
