"""Token ids of sources with a prompt around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftbench.tasks.tokens import SOURCE_CUT, Encoder
from peftbench.utils.errors import UserError

SOURCE, MASK = "{source}", "{mask}"  # the placeholders of task.prompt


def frame_sources(
    encoder: Encoder, prompt: str, sources: Sequence[str], max_length: int, *, goes_on: bool = False
) -> dict[str, list[Any]]:
    """Return `input_ids` and `attention_mask` of `prompt` with each source in place of {source}, and as `source_cut`
    whether the source was truncated.

    A source is truncated if the whole would be longer than `max_length` tokens, including special tokens; the prompt
    never is. {mask} becomes the tokenizer's mask token, which a denoiser was pretrained to fill. Special tokens that
    are typed in the prompt are special, unlike those that a source spells. If the tokenizer adds the same token at that
    end of every text anyway, it appears only once. With `goes_on` the tokenizer adds no end token, because a
    decoder-only model continues with the target.

    Raises:
        UserError: the prompt has {mask} but the tokenizer no such token, or the prompt leaves no room for a source.
    """
    if prompt == SOURCE and not goes_on:
        return encoder(sources, max_length=max_length)
    mask = encoder.tokenizer.mask_token_id
    if MASK in prompt and mask is None:
        raise UserError(
            f"task.prompt has {MASK}, but the tokenizer of {encoder.tokenizer.name_or_path} has no mask token; remove "
            "it, or set task.prompt=null."
        )

    def ids(text: str) -> list[int]:
        """Return the ids of a text that may contain {mask}."""
        first, *others = (encoder.typed(piece) if piece else [] for piece in text.split(MASK))
        return sum(([mask, *piece] for piece in others), first)

    before, after = prompt.split(SOURCE)
    front, joined = _at_last_special(encoder, before)  # text next to the source is tokenised with it
    left, right = ids(front), ids(after)
    opening, closing = encoder.ends()
    if opening == left[: len(opening)]:
        opening = []
    if goes_on or (closing and closing == right[-len(closing) :]):
        closing = []
    length = min(max_length, encoder.limit)
    room = length - len(left) - len(right) - len(opening) - len(closing)
    if room < 1 + len(encoder.ids([joined])[0]):
        raise UserError(f"task.prompt={prompt!r} leaves no room for a source in {length} tokens; shorten it.")
    inner = encoder([f"{joined}{source}" for source in sources], max_length=room, special=False)
    found = [[*opening, *left, *source, *right, *closing] for source in inner["input_ids"]]
    return {
        "input_ids": found,
        "attention_mask": [[1] * len(whole) for whole in found],
        SOURCE_CUT: inner[SOURCE_CUT],
    }


def special_tokens(encoder: Encoder, prompt: str) -> list[str]:
    """Return the special tokens that are typed in a prompt, in order."""
    return [match[0] for match in encoder.special_tokens.finditer(prompt)]


def _at_last_special(encoder: Encoder, text: str) -> tuple[str, str]:
    """Split `text` after its last special token or {mask}."""
    masked = text.rfind(MASK)
    last, strips = (0, False) if masked < 0 else (masked + len(MASK), False)
    added = {token.content: token for token in encoder.tokenizer.added_tokens_decoder.values()}
    for match in encoder.special_tokens.finditer(text):
        if match.end() > last:
            last, strips = match.end(), match[0] in added and added[match[0]].rstrip
    rest = text[last:]
    return text[:last], rest.lstrip() if strips else rest
