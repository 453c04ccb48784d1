"""Text to text by a decoder alone: the source is a prompt, the target its completion (instruction tuning)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.tasks.framing import MASK, SOURCE, framed
from peftbench.tasks.load import Loaded
from peftbench.tasks.text_to_text import TextToText
from peftbench.tasks.tokens import SOURCE_CUT
from peftbench.utils.errors import UserError


class Completion(TextToText):
    """`task.prompt` around the source in, the target and an end of text out; only the latter two have a loss."""

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no token that ends a text, with "
                "which a decoder alone says that it is done; name one as eos_token in its tokenizer_config.json."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
        super().__init__(loaded, tokenizer, model)

    def serve(self, model: PreTrainedModel) -> None:
        """Batches for training and for completion."""
        self.collator = PromptCollator(self.tokenizer.pad_token_id)
        assert model.generation_config is not None
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each training example: the prompt and its completion."""
        pairs = zip(self.train["input_ids"], self.train["labels"], strict=True)
        return [len(prompt) + len(target) for prompt, target in pairs]

    def settings(self) -> list[Any]:
        """A prompt leaves room for what is generated, too, and a target ends with a token of the tokenizer's."""
        ends = [self.tokenizer.eos_token_id, self.tokenizer.bos_token_id]
        return [*super().settings(), self.task.generation.max_length, *ends]

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """`input_ids` of the prompts, and the ids of the targets with the end of text as `labels`.

        A source is cut where the prompt would be longer than `task.max_source_length`, never the prompt around it. A
        target that is cut has no end of text.
        """
        sources, targets = self.pairs(rows, training)
        prompt = self.prompt
        if MASK in prompt:
            raise UserError(
                f"task.prompt has {MASK}, and a decoder alone has no mask token; write it without, or task.prompt=null."
            )
        length = self.limits()["sources"]
        after = self.encoder.typed(prompt.split(SOURCE)[1])
        if length - len(after) < 1:
            longest, tokens = self._longest()
            raise UserError(
                f"{longest}={tokens} leaves no room for a source: the backbone has "
                f"{self.encoder.limit} positions, and task.max_source_length={self.task.max_source_length} counts the "
                "whole prompt."
            )
        end = self.tokenizer.eos_token_id
        begin = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        found = framed(self.encoder, prompt, sources, length, goes_on=True)
        return {
            # of nothing at all no model can go on
            "input_ids": [ids or [begin] for ids in found["input_ids"]],
            SOURCE_CUT: found[SOURCE_CUT],
            **self.written(targets, [], [end]),
        }

    def limits(self) -> dict[str, int]:
        """A prompt leaves room for what is generated, too."""
        limits = super().limits()
        return {**limits, "sources": min(limits["sources"], self.encoder.limit - self._longest()[1])}

    def _limited_by(self, what: str) -> str:
        """What is written needs its positions."""
        least = super()._limited_by(what)
        return f"{least} less {'{}={}'.format(*self._longest())}" if what == "sources" else least

    @property
    def prompt(self) -> str:
        """By default the target stands on a line of its own."""
        return self.task.prompt or f"{SOURCE}\n"

    def _longest(self) -> tuple[str, int]:
        """What is written, or generated, may be so long."""
        lengths = {
            "task.max_target_length": self.task.max_target_length,
            "task.generation.max_length": self.task.generation.max_length,
        }
        longest = max(lengths, key=lengths.__getitem__)
        return longest, lengths[longest]


class PromptCollator:
    """Batches of prompts, padded on the left to be completed; with `labels` prompt and target, padded on the right."""

    def __init__(self, pad: int) -> None:
        self.pad = pad
        self.pad_to_multiple_of: int | None = None  # in training; named as in transformers' collators

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [list(example["input_ids"]) for example in examples]
        if "labels" not in examples[0]:
            return _padded(prompts, self.pad, left=True)
        targets = [list(example["labels"]) for example in examples]
        whole = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        multiple = self.pad_to_multiple_of or 1
        batch = _padded(whole, self.pad, multiple=multiple)
        labels = [[-100] * len(prompt) + target for prompt, target in zip(prompts, targets, strict=True)]
        return {**batch, "labels": _padded(labels, -100, multiple=multiple)["input_ids"]}


def _padded(rows: list[list[int]], pad: int, left: bool = False, multiple: int = 1) -> dict[str, Tensor]:
    longest = -(-max(map(len, rows)) // multiple) * multiple
    ids, mask = [], []
    for row in rows:
        gap, ones = [pad] * (longest - len(row)), [1] * len(row)
        ids.append(gap + row if left else row + gap)
        mask.append([0] * len(gap) + ones if left else ones + [0] * len(gap))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
