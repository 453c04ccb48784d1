"""Text to text with a decoder-only model: the source is a prompt, the target its completion (instruction tuning)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.tasks.batch import NO_TOKEN
from peftbench.tasks.framing import MASK, SOURCE, frame_sources
from peftbench.tasks.load import Loaded
from peftbench.tasks.text_to_text import TextToText
from peftbench.tasks.tokens import SOURCE_CUT
from peftbench.utils.errors import UserError

LEARNED = "learned"  # a column: whether each token of `labels` is learned; without it, all are


class Completion(TextToText):
    """A task that maps the source in `task.prompt` to the target and an end of text; only the output has a loss."""

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the backbone'} has no token that ends a text, which a "
                "decoder-only model needs to stop; name one as eos_token in its tokenizer_config.json."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
        super().__init__(loaded, tokenizer, model)

    def serve(self, model: PreTrainedModel) -> None:
        """Set `collator`, which makes batches for training and for completion."""
        self.collator = PromptCollator(self.tokenizer.pad_token_id)
        assert model.generation_config is not None
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    @cached_property
    def lengths(self) -> list[int]:
        """The length in tokens of each training example: the prompt and its completion."""
        pairs = zip(self.train["input_ids"], self.train["labels"], strict=True)
        return [len(prompt) + len(target) for prompt, target in pairs]

    def settings(self) -> list[Any]:
        """Return the settings on which `encode` depends, including the room for generated text and the end token."""
        ends = [self.tokenizer.eos_token_id, self.tokenizer.bos_token_id]
        return [*super().settings(), self.task.generation.max_length, *ends]

    def taught_ends(self) -> list[str]:
        """Return the token with which the model is taught to end a text: the tokenizer adds none."""
        return [self.tokenizer.eos_token]

    def encode(self, rows: dict[str, list[Any]], training: bool) -> dict[str, list[Any]]:
        """Return `input_ids` of the prompts, and as `labels` the ids of the targets with the end of text.

        A source is truncated if the whole prompt would be longer than `task.max_source_length`; the text around it
        never is. A truncated target has no end of text.
        """
        sources, targets = self.pairs(rows, training)
        prompt = self.prompt
        self.check_prompt()
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
        found = frame_sources(self.encoder, prompt, sources, length, goes_on=True)
        return {
            # no model can continue an empty prompt
            "input_ids": [ids or [begin] for ids in found["input_ids"]],
            SOURCE_CUT: found[SOURCE_CUT],
            **self.written(targets, [], [end]),
        }

    def check_prompt(self) -> None:
        """Raise UserError if the prompt has a mask."""
        if MASK in self.prompt:
            raise UserError(
                f"task.prompt has {MASK}, but a decoder-only model has no mask token; remove it, or set "
                "task.prompt=null."
            )

    def limits(self) -> dict[str, int]:
        """Return the maximum lengths in tokens; a prompt leaves room for the generated text, too."""
        limits = super().limits()
        return {**limits, "sources": min(limits["sources"], self.encoder.limit - self._longest()[1])}

    def _limited_by(self, what: str) -> str:
        """Return what lowers the limit: for sources also the positions that the output needs."""
        least = super()._limited_by(what)
        return f"{least} less {'{}={}'.format(*self._longest())}" if what == "sources" else least

    @property
    def prompt(self) -> str:
        """The template of the prompt; by default the target is on a line of its own."""
        return self.task.prompt or f"{SOURCE}\n"

    def _longest(self) -> tuple[str, int]:
        """Return the key and the value of the longest allowed output, in training or generation."""
        lengths = {
            "task.max_target_length": self.task.max_target_length,
            "task.generation.max_length": self.task.generation.max_length,
        }
        longest = max(lengths, key=lengths.__getitem__)
        return longest, lengths[longest]


class PromptCollator:
    """Makes batches of prompts padded on the left; with `labels`, of prompts and targets padded on the right.

    If examples have the column `LEARNED`, those of their targets' tokens have no label that are not learned.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad
        self.pad_to_multiple_of: int | None = None  # set in training; named as in the collators of transformers

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [list(example["input_ids"]) for example in examples]
        if "labels" not in examples[0]:
            return _pad(prompts, self.pad, left=True)
        whole = [prompt + list(example["labels"]) for prompt, example in zip(prompts, examples, strict=True)]
        multiple = self.pad_to_multiple_of or 1
        labels = _pad([_label(example) for example in examples], NO_TOKEN, multiple=multiple)["input_ids"]
        return {**_pad(whole, self.pad, multiple=multiple), "labels": labels}


def _label(example: dict[str, Any]) -> list[int]:
    """Return a label for each token of an example."""
    target = list(example["labels"])
    if LEARNED in example:
        pairs = zip(target, example[LEARNED], strict=True)
        target = [token if is_learned else NO_TOKEN for token, is_learned in pairs]
    return [NO_TOKEN] * len(example["input_ids"]) + target


def _pad(rows: list[list[int]], pad: int, left: bool = False, multiple: int = 1) -> dict[str, Tensor]:
    longest = -(-max(map(len, rows)) // multiple) * multiple
    ids, mask = [], []
    for row in rows:
        gap, ones = [pad] * (longest - len(row)), [1] * len(row)
        ids.append(gap + row if left else row + gap)
        mask.append([0] * len(gap) + ones if left else ones + [0] * len(gap))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
