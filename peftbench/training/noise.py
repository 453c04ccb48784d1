"""The random numbers of a training on several devices, above all those of dropout.

`WholeNoise` has all processes draw the numbers of the whole batch, each for its own rows: the number of processes then
changes a training by rounding only. Where a kernel draws by itself, as in CUDA graphs and attention on a GPU, or where
that would cost too much, each process draws its own numbers (`OwnNoise`): another number of processes is then like
another seed of dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_sites, list_configs
from peftbench.config import schema
from peftbench.modification.prompt import DecoderPrompt, Prompt
from peftbench.training.shares import OF, ROW
from peftbench.utils.team import Team

dropout, attention = F.dropout, F.scaled_dot_product_attention


class OwnNoise:
    """Each process draws other numbers, which depend on the step, so that a training resumes with the same."""

    def __init__(self, seed: int, team: Team) -> None:
        self.seed, self.team = seed, team

    def begin_step(self, step: int) -> None:
        """Seed torch's generators for an optimiser step, unless the process is alone."""
        if self.team.size > 1:
            torch.manual_seed((self.seed << 32) + step * self.team.size + self.team.rank)

    @contextmanager
    def drawing(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Inside the block, the model computes a process's rows of a batch."""
        yield


class WholeNoise(OwnNoise):
    """Each process draws the numbers of the whole batch, as one process would, and keeps those of its rows.

    The generators of all processes have the same state. Tensors without a row for each example, such as the prompt of a
    decoder or DeBERTa's relative positions, have the same dropout everywhere.
    """

    def __init__(self, seed: int, team: Team, model: PreTrainedModel) -> None:
        super().__init__(seed, team)
        self.flattens = find_sites(model).family.flattens
        prompts = [module for module in model.modules() if isinstance(module, Prompt)]
        self.fronts = [prompt for prompt in prompts if isinstance(prompt, DecoderPrompt)]
        self.lengths = [0, *(len(prompt.vectors) for prompt in prompts)]  # by which tokens may have become more

    def begin_step(self, step: int) -> None:
        pass

    @contextmanager
    def drawing(self, batch: Mapping[str, Any]) -> Iterator[None]:
        rows, of = list(batch[ROW]), batch[OF][0]
        widths = {column.shape[1] for column in batch.values() if isinstance(column, Tensor) and column.dim() > 1}

        def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            shape = self._find_shape(input, len(rows), widths) if training and p else None
            if shape is None:
                return dropout(input, p, training, inplace)
            kept = dropout(input.new_ones((of, *shape[1:])), p)[rows].view(input.shape)
            return input.mul_(kept) if inplace else input * kept

        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            **others: Any,
        ) -> Tensor:
            if dropout_p == 0:
                return attention(query, key, value, attn_mask, 0.0, is_causal, **others)
            return _attend(query, key, value, attn_mask, is_causal, lambda x: drop(x, dropout_p), **others)

        functional: Any = F  # where modules and transformers look their functions up
        functional.dropout, functional.scaled_dot_product_attention = drop, attend
        try:
            yield
        finally:
            functional.dropout, functional.scaled_dot_product_attention = dropout, attention

    def _find_shape(self, input: Tensor, rows: int, widths: set[int]) -> tuple[int, ...] | None:
        """Return the shape of a tensor with its rows of examples first; None if it has none.

        Args:
            rows: examples of this process.
            widths: numbers of tokens of its columns.
        """
        if self.flattens and input.dim() == 2 and any(len(input) == rows * width for width in widths):
            return (rows, len(input) // rows, input.shape[1])
        if len(input) != rows or any(front.is_running for front in self.fronts):
            return None
        if rows == 1 and input.dim() == 3:  # one row of tokens, or what is the same for all rows
            known = {width + length for width in widths for length in self.lengths}
            return tuple(input.shape) if input.shape[1] in known else None
        return tuple(input.shape)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    drop: Any,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute dropout(softmax(Q K^T · scale + mask)) V, as torch's SDPA does on a CPU."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    blind = scores.isneginf().all(-1, keepdim=True)  # padding whose window has no token: 0, as torch's, and not 0 / 0
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    heads: Tensor = drop(weights) @ value
    return heads


def choose_noise(model: PreTrainedModel, settings: schema.Trainer, seed: int, team: Team) -> OwnNoise:
    """Return how the processes of a team draw numbers.

    Args:
        settings: with `auto` replaced.
    """
    attends = model.device.type == "cuda" and any(
        getattr(config, find_sites(model).family.attention_dropout, 0) for config in list_configs(model)
    )
    plain = settings.compile is schema.Compile.none and not (settings.padding_free or settings.graphs)
    if team.size > 1 and plain and settings.micro_batch is None and not attends:
        return WholeNoise(seed, team, model)
    return OwnNoise(seed, team)
