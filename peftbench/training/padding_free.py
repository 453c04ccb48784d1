"""Training without padding: `trainer.padding_free`.

From a stack's embeddings to its end, the tokens of a batch are in one row, (1, T, d) instead of (B, S, d), so that no
layer computes anything for padding. All operations of a layer are token by token, except its attentions, which
`modification.packed_attention` restricts to each example. Everything before and after the stacks sees the batch in its
usual form. An encoder's output stays packed for the cross-attentions of its decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_sites, list_configs, set_configs
from peftbench.modification.attach import takes_our_attention
from peftbench.modification.packed_attention import PACKED_NAME, PACKING, Packing
from peftbench.modification.prompt import PROMPT
from peftbench.tasks.batch import NO_TOKEN, Collator
from peftbench.utils.errors import UserError

SOURCES, TARGETS = "source_lengths", "target_lengths"  # for each example of a batch, in tokens; lists, not tensors


def add_lengths(collator: Collator, widths: tuple[int, int] | None = None, pad: int = 0) -> Collator:
    """Return the collator that adds lists of lengths to its tensors: the CPU knows them without asking the GPU.

    Args:
        widths: widths to which sources and targets are padded, so that all batches have one shape; None: the widths as
            they come.
        pad: the id of the padding token.
    """

    def collate(examples: list[dict[str, Any]]) -> Mapping[str, Any]:
        batch = dict(collator(examples))
        batch[SOURCES] = batch["attention_mask"].sum(1).tolist()
        if batch["labels"].dim() > 1:
            width = batch["labels"].shape[1]
            last = batch["labels"].ne(NO_TOKEN) * torch.arange(1, width + 1)
            batch[TARGETS] = last.amax(1).tolist()
        if widths is not None:
            sources, targets = widths
            for name, width, value in (
                ("input_ids", sources, pad),
                ("attention_mask", sources, 0),
                ("token_type_ids", sources, 0),
                ("labels", targets, NO_TOKEN),
                ("decoder_input_ids", targets, pad),
            ):
                if name in batch and batch[name].dim() > 1:
                    batch[name] = F.pad(batch[name], (0, width - batch[name].shape[1]), value=value)
        return batch

    return collate


def choose_row_step(lengths: Sequence[int], batch_size: int) -> int:
    """Return the number of tokens to whose multiples rows are filled up, so that they come in few lengths, about six.

    It is the spread of the number of tokens in a batch of random examples, rounded up to the next power of two.
    """
    spread = float(torch.tensor(list(lengths), dtype=torch.float64).std(correction=0)) * batch_size**0.5
    return 1 << max(0, math.ceil(math.log2(spread))) if spread > 0 else 1


def find_refusal(model: PreTrainedModel) -> str | None:
    """Return the part of a model that cannot be trained without padding, or None if all can."""
    sites = find_sites(model)
    if not sites.embedding or sites.family.embedding_at != "input" or not takes_our_attention(model):
        return f"{model.config.model_type}, whose layers count positions"
    if any(getattr(config, "attn_logit_softcapping", None) is not None for config in list_configs(model)):
        return f"{model.config.model_type}, whose attentions cap their scores"
    if any(name.endswith(f".{PROMPT}") for name, _ in model.named_modules()):
        return "prompts, which are prepended to a batch after its embeddings"
    return None


class PaddingFree:
    """Packs the batches of `model` inside `active`.

    Args:
        sources, targets: tokens of the longest example; targets is 0 if the examples have none.
        steps: the rows of encoder and decoder are filled up to multiples of this number of tokens.

    Raises:
        UserError: for a family whose layers know positions (T5, decoders alone), and for prompts.
    """

    def __init__(self, model: PreTrainedModel, sources: int, targets: int, steps: tuple[int, int] = (1, 1)) -> None:
        if (why := find_refusal(model)) is not None:
            raise UserError(
                f"trainer.padding_free=true is not supported for {why}; use trainer.batching=bucketed, which has "
                "little padding."
            )
        self.model = model
        self.sites = find_sites(model)
        self.packings = {"encoder": Packing(sources), "decoder": Packing(max(1, targets))}
        if targets == 0:  # a classifier with a decoder reads the source again there
            self.packings["decoder"] = self.packings["encoder"]
        self.steps = dict(zip(self.packings, steps, strict=True))
        # Both stacks have the same number of examples, each with at least one token: a query sees at least one key.
        rooms = [(step - 1, self.packings[stack].longest - 1) for stack, step in self.steps.items()]
        self.fillers = max(math.ceil(most / max(1, each)) for most, each in rooms)
        for layer in self.sites.layers:
            for attention in layer.attentions:
                queries = self.packings[layer.stack]
                keys = self.packings["encoder"] if attention.kind == "cross" else queries
                object.__setattr__(attention.module, PACKING, (queries, keys))
        self.configs = list_configs(model)

    def load(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Take the lengths of the next batch from it, or the tensors that `rows` made of them; return the rest, which
        are the model's inputs."""
        batch = self.rows(batch) if SOURCES in batch else dict(batch)
        for stack, column in (("encoder", "input_ids"), ("decoder", "labels")):
            if _list_names(stack)[0] in batch:
                example, offsets, index = (batch.pop(name) for name in _list_names(stack))
                self.packings[stack].take((example, offsets, index), tuple(batch[column].shape))
        return batch

    def rows(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the batch with tensors on its device in place of the lengths."""
        batch = dict(batch)
        for stack, column, lengths in (("encoder", "input_ids", SOURCES), ("decoder", "labels", TARGETS)):
            if lengths in batch:
                counts, padded = batch.pop(lengths), batch[column]
                made = self.packings[stack].tensors(
                    counts, padded.shape[1], padded.device, self._fillers(stack, sum(counts))
                )
                batch.update(zip(_list_names(stack), made, strict=True))
        return batch

    def _fillers(self, stack: str, tokens: int) -> list[int]:
        """Return the lengths of the fillers of a row of that many tokens."""
        more = -(tokens + self.fillers) % self.steps[stack]
        found = []
        for _ in range(self.fillers):
            found.append(1 + min(more, self.packings[stack].longest - 1))
            more -= found[-1] - 1
        return found

    def targets(self, padded: Tensor) -> Tensor:
        """Return the target tokens of (B, S, ...) for the batch that was loaded last, as (1, T, ...); for labels, the
        fillers are `NO_TOKEN`."""
        return self.packings["decoder"].pack(padded, 0.0 if padded.is_floating_point() else NO_TOKEN)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, a forward pass packs the batch that was loaded last."""
        handles = []
        base = self.model.base_model
        for stack, module in self.sites.embedding.items():
            handles.append(module.register_forward_hook(self._pack(stack)))
        last = list(self.sites.family.stacks)[-1]
        end = base.get_submodule(self.sites.family.stacks[last].rpartition(".")[0])
        handles.append(end.register_forward_hook(self._pad(last)))
        try:
            with set_configs(self.configs, "_attn_implementation", PACKED_NAME):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _pack(self, stack: str) -> Any:
        def pack(module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            """Pack the output of a stack's embedding LayerNorm (forward hook)."""
            return self.packings[stack].pack(embedded)

        return pack

    def _pad(self, stack: str) -> Any:
        def pad(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            """Pad the output of the last stack (forward hook)."""
            output.last_hidden_state = self.packings[stack].pad(output.last_hidden_state)
            return output

        return pad


def _list_names(stack: str) -> list[str]:
    return [f"{stack}_{part}" for part in ("example", "offsets", "index")]
