"""Tokens that a backbone does not know: text outside its tokenizer's vocabulary, and ids without an embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from peftbench.utils.errors import UserError

MANY, TOO_MANY = 0.05, 0.5  # shares of unknown tokens that are noted, and that are refused
COLUMNS = ("input_ids", "labels")


def measure_unknown(
    splits: Mapping[str, Iterable[Dataset]], tokenizer: PreTrainedTokenizerBase, rows: int, *, required: bool = True
) -> dict[str, float]:
    """Return the share of unknown tokens in each split; special tokens around the texts do not count.

    The result is empty if the tokenizer has no unknown token, or one that also has another role, as in GPT-2, whose
    tokenizer knows every byte.

    Args:
        splits: tokenised texts, with `input_ids` and, if the labels are texts, `labels`.
        rows: how many ids the embedding has.
        required: that the backbone knows most of each split, which someone may ask a trained model not to.

    Raises:
        UserError: an id has no row in the embedding; or, with `required`, more than half of a split is unknown, or all
            of it is dropped.
    """
    whose = f"The tokenizer of {tokenizer.name_or_path or 'the backbone'}"
    unknown = tokenizer.unk_token_id
    roles = {str(value) for key, value in tokenizer.special_tokens_map.items() if key != "unk_token"}
    told_apart = unknown is not None and tokenizer.unk_token not in roles
    special = [index for index in tokenizer.all_special_ids if index != unknown]
    found = {}
    for split, datasets in splits.items():
        parts = [part for part in datasets if len(part)]
        counts = np.zeros(1 + max(rows, len(tokenizer), *tokenizer.all_special_ids), dtype=np.int64)
        for part in parts:
            _count(part, counts)
        if counts[rows:].any():
            last = int(counts.nonzero()[0][-1])
            raise UserError(
                f"{whose} has the id {last} for {tokenizer.convert_ids_to_tokens(last)!r} in {split}, and the backbone "
                f"has embeddings for {rows:,} ids only: it is another model's tokenizer; give the model with its own."
            )
        texts = counts.sum() - counts[special].sum()
        if parts and not texts and required:
            raise UserError(
                f"{whose} makes no token of any text in {split}: {type(tokenizer).__name__} does not fit its files, or "
                "its vocabulary does not fit the text; give the model with its own tokenizer."
            )
        if told_apart and texts:
            found[split] = float(counts[unknown] / texts)
    if required and told_apart and (split := max(found, key=found.__getitem__, default="")) and found[split] > TOO_MANY:
        raise UserError(
            f"{whose} knows too little of {split}: {_format_percent(found[split])} of its tokens are "
            f"{tokenizer.unk_token}; use a backbone that was pretrained on such text."
        )
    return found


def describe_unknown_tokens(shares: Mapping[str, float], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a note if many tokens of some split are unknown."""
    many = [f"{_format_percent(share)} of {split}" for split, share in shares.items() if share > MANY]
    if not many:
        return []
    return [f"The backbone does not know part of the text: {tokenizer.unk_token} is {', '.join(many)}, in tokens."]


def _count(tokens: Dataset, counts: np.ndarray) -> None:
    """Add the number of occurrences of each id to `counts`."""
    for name in COLUMNS:
        if name in tokens.column_names and pa.types.is_list(tokens.data.schema.field(name).type):
            for chunk in tokens.data.column(name).chunks:
                counts += np.bincount(chunk.flatten().to_numpy(zero_copy_only=False), minlength=len(counts))


def _format_percent(share: float) -> str:
    return f"{share:.1%}"
