"""Training without padding: `trainer.padding_free`.

Between a stack's embeddings and its end the tokens of a batch stand in one row, (1, T, d) in place of (B, S, d), so
that no layer computes anything for padding. All that a layer does goes token by token but for its attentions, which
`modification.packed_attention` keeps within each example; what stands before and behind the stacks sees the batch as
it was. An encoder's output stays packed for the cross-attentions of its decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftbench.errors import UserError
from peftbench.modification.attach import takes_our_attention
from peftbench.modification.packed_attention import PACKED_NAME, PACKING, Packing
from peftbench.modification.prompt import PROMPT
from peftbench.sites import configs_of, configured, find_sites
from peftbench.training.batching import Collator
from peftbench.training.token_loss import IGNORED

SOURCES, TARGETS = "source_lengths", "target_lengths"  # of each example of a batch, in tokens; no tensors


def with_lengths(collator: Collator) -> Collator:
    """The collator with lists of lengths beside its tensors: known on the CPU, nobody has to ask the GPU for them."""

    def collate(examples: list[dict[str, Any]]) -> Mapping[str, Any]:
        batch = dict(collator(examples))
        batch[SOURCES] = batch["attention_mask"].sum(1).tolist()
        if batch["labels"].dim() > 1:
            width = batch["labels"].shape[1]
            last = batch["labels"].ne(IGNORED) * torch.arange(1, width + 1)
            batch[TARGETS] = last.amax(1).tolist()
        return batch

    return collate


class PaddingFree:
    """Packs the batches of `model` inside `active`.

    Args:
        sources, targets: tokens of the longest example; targets 0 where an example has none.

    Raises:
        UserError: for a family whose layers know positions (T5, decoders alone).
    """

    def __init__(self, model: PreTrainedModel, sources: int, targets: int) -> None:
        prompts = [name for name, _ in model.named_modules() if name.endswith(f".{PROMPT}")]
        assert not prompts, "validity.py refuses prompts, which join a batch behind its embeddings"
        self.model = model
        self.sites = find_sites(model)
        self._refuse()
        self.packings = {"encoder": Packing(sources), "decoder": Packing(max(1, targets))}
        if targets == 0:  # a classifier with a decoder reads the source there once more
            self.packings["decoder"] = self.packings["encoder"]
        for layer in self.sites.layers:
            for attention in layer.attentions:
                queries = self.packings[layer.stack]
                keys = self.packings["encoder"] if attention.kind == "cross" else queries
                object.__setattr__(attention.module, PACKING, (queries, keys))
        self.configs = configs_of(model)

    def _refuse(self) -> None:
        family, model_type = self.sites.family, self.model.config.model_type
        if not self.sites.embedding or family.embedding_at != "input" or not takes_our_attention(self.model):
            raise UserError(
                f"trainer.padding_free=true is not supported for {model_type}, whose layers count positions; use "
                "trainer.batching=bucketed, which has little padding."
            )

    def load(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Take the lengths of the next batch from it; returns what is left, the model's inputs."""
        batch = dict(batch)
        sources, targets = batch.pop(SOURCES), batch.pop(TARGETS, None)
        ids = batch["input_ids"]
        self.packings["encoder"].load(sources, ids.shape[1], ids.device)
        if targets is not None:
            self.packings["decoder"].load(targets, batch["labels"].shape[1], ids.device)
        return batch

    def targets(self, padded: Tensor) -> Tensor:
        """Of (B, S, ...) the target tokens of the batch that was loaded last, (1, T, ...)."""
        return self.packings["decoder"].pack(padded)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, a forward pass packs the batch that was loaded last."""
        handles = []
        base = self.model.base_model
        for stack, module in self.sites.embedding.items():
            handles.append(module.register_forward_hook(self._pack(stack)))
        last = list(self.sites.family.stacks)[-1]
        end = base.get_submodule(self.sites.family.stacks[last].rpartition(".")[0])
        handles.append(end.register_forward_hook(self._pad(last)))
        try:
            with configured(self.configs, "_attn_implementation", PACKED_NAME):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _pack(self, stack: str) -> Any:
        def pack(module: nn.Module, args: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            """Forward hook of a stack's embedding LayerNorm."""
            return self.packings[stack].pack(embedded)

        return pack

    def _pad(self, stack: str) -> Any:
        def pad(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            """Forward hook of the last stack."""
            output.last_hidden_state = self.packings[stack].pad(output.last_hidden_state)
            return output

        return pad
