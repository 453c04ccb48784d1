"""Text to token ids, in such a way that no text can spell a special token."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.errors import UserError


class Encoder:
    """Tokenises texts for one backbone. A `</s>` in a text is four characters like any other.

    Raises UserError for a tokenizer without a pad token, and for an encoder-decoder's that ends no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no pad token, without which texts of "
                "unequal length make no batch; name one as pad_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.limit = min(tokenizer.model_max_length, positions(model) or tokenizer.model_max_length)
        self._spelled = self._unsplit_tokens()
        if model.config.is_encoder_decoder and not self._ends_texts():
            end = f"{tokenizer.eos_token}, at which generation stops" if tokenizer.eos_token else "any token"
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} does not end a text with {end}; name the "
                "token as eos_token in its tokenizer_config.json, and have its post_processor put it after a text."
            )

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int,
        target: bool = False,
        special: bool = True,
    ) -> dict[str, list[list[int]]]:
        """`input_ids` and `attention_mask` (and what else the model reads) of each text, or pair of texts.

        At most `max_length` tokens, special ones included, and no more than the backbone can read; of a pair, the
        longer text is cut first. `target` says that the texts are what the model is to write; without `special` none
        of the tokenizer's special tokens are put around them.
        """
        texts = self._plain(texts)
        kind = {"text_target": texts} if target else {"text": texts, "text_pair": pairs and self._plain(pairs)}
        encoded = self.tokenizer(
            **kind,
            truncation=True,
            max_length=min(max_length, self.limit),
            add_special_tokens=special,
            split_special_tokens=True,
        )
        return dict(encoded)

    @cached_property
    def fingerprint(self) -> list[Any]:
        """JSON values on which the ids depend."""
        return [
            *rules(self.tokenizer),
            [getattr(self.tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
            {role: str(token) for role, token in self.tokenizer.special_tokens_map.items()},
            self.limit,
            transformers.__version__,
            tokenizers.__version__,
        ]

    def _ends_texts(self) -> bool:
        return self.tokenizer.eos_token_id in self(["a"], max_length=self.limit)["input_ids"][0][1:]

    def _plain(self, texts: Sequence[str]) -> list[str]:
        """`</s>` as `< /s>`, for the tokenizers that would take it for the special token."""
        if self._spelled is None:
            return list(texts)
        return [self._spelled.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) for text in texts]

    def _unsplit_tokens(self) -> re.Pattern[str] | None:
        """Matches the special tokens that `split_special_tokens` does not split; null where it splits all.

        A Unigram or word-level model (T5, mBART, XLM-R) has them among its ordinary pieces and finds them in text.
        """
        special: dict[int, str] = {
            index: token.content
            for index, token in self.tokenizer.added_tokens_decoder.items()
            # the unknown token stands for any text that the vocabulary lacks
            if token.special and token.content != self.tokenizer.unk_token
        }
        encoded: Any = self.tokenizer(list(special.values()), add_special_tokens=False, split_special_tokens=True)
        found = [
            token for (index, token), ids in zip(special.items(), encoded["input_ids"], strict=True) if index in ids
        ]
        return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))) if found else None


def rules(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer does by itself: its class, a hash of its vocabulary and rules, the side that it cuts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for call in ("truncation", "padding"):  # those of the last call
        found.pop(call, None)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return [type(tokenizer).__name__, digest, tokenizer.truncation_side]


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the backbone has positions for; null where there is no limit, as with relative positions.

    RoBERTa and its kin number positions from the padding index + 1 on, so that many of their embeddings stay unused.
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
