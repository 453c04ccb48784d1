"""Token ids of sources with a prompt around them, for an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence

from peftbench.tasks.tokens import Encoder
from peftbench.utils.errors import UserError

SOURCE, MASK = "{source}", "{mask}"  # what task.prompt may hold


def framed(encoder: Encoder, prompt: str, sources: Sequence[str], max_length: int) -> dict[str, list[list[int]]]:
    """`input_ids` and `attention_mask` of `prompt` with each source in the place of {source}.

    A source is cut where the whole would be longer than `max_length` tokens, special ones included, never the prompt.
    {mask} becomes the tokenizer's mask token: what a denoiser was pretrained to fill.

    Raises:
        UserError: {mask} where the tokenizer has no such token, or no room for a source beside the prompt.
    """
    if prompt == SOURCE:
        return encoder(sources, max_length=max_length)
    mask = encoder.tokenizer.mask_token_id
    if MASK in prompt and mask is None:
        raise UserError(
            f"task.prompt has {MASK}, and the tokenizer of {encoder.tokenizer.name_or_path} has no mask token; write "
            "the prompt without, or task.prompt=null."
        )

    def ids(text: str) -> list[int]:
        """Of a text in which {mask} may stand."""
        first, *others = (_plain(encoder, piece) for piece in text.split(MASK))
        return sum(([mask, *piece] for piece in others), first)

    before, after = prompt.split(SOURCE)
    front, _, joined = before.rpartition(MASK)  # what touches the source is tokenised with it
    left, right = ids(front + MASK) if MASK in before else [], ids(after)
    opening, closing = _specials(encoder)
    length = min(max_length, encoder.limit)
    room = length - len(left) - len(right) - len(opening) - len(closing)
    if room < 1 + len(_plain(encoder, joined)):
        raise UserError(f"task.prompt={prompt!r} leaves no room for a source among {length} tokens; make it shorter.")
    inner = encoder([f"{joined}{source}" for source in sources], max_length=room, special=False)["input_ids"]
    found = [[*opening, *left, *source, *right, *closing] for source in inner]
    return {"input_ids": found, "attention_mask": [[1] * len(whole) for whole in found]}


def _plain(encoder: Encoder, text: str) -> list[int]:
    return encoder([text], max_length=encoder.limit, special=False)["input_ids"][0] if text else []


def _specials(encoder: Encoder) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text."""
    text = "a"
    plain, whole = _plain(encoder, text), encoder([text], max_length=encoder.limit)["input_ids"][0]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]
