"""Training without padding: `trainer.padding_free`.

From a stack's embeddings to its end, the tokens of a batch are in one row, (1, T, d) instead of (B, S, d), so that no
layer computes anything for padding. All operations of a layer are token by token, except its attentions, which
`modification.packed_attention` restricts to each example. Everything before and after the stacks sees the batch in its
usual form. An encoder's output stays packed for the cross-attentions of its decoder.

A decoder alone is told the position of each token (`position_ids`), so that its row begins before the embeddings. The
other families count positions there from the shape of the batch, and their row begins after the embeddings.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from peftbench.backbones.sites import adds_router_loss, find_sites, list_configs, set_configs
from peftbench.modification.attach import takes_our_attention
from peftbench.modification.head_attention import Prefix
from peftbench.modification.packed_attention import PACKED_NAME, PACKING, Packing
from peftbench.modification.prompt import PROMPT, DecoderPrompt
from peftbench.tasks.batch import NO_TOKEN, Collator, get_labels
from peftbench.utils.errors import UserError

SOURCES, TARGETS = "source_lengths", "target_lengths"  # for each example of a batch, in tokens; lists, not tensors
LABELLED = "labelled"  # the tokens of a decoder alone that predict a label, by their places in the flattened batch


def add_lengths(
    collator: Collator, widths: tuple[int, int] | None = None, pad: int = 0, *, texts: bool = True, joined: bool = False
) -> Collator:
    """Return the collator that adds lists of lengths to its tensors: the CPU knows them without asking the GPU.

    Args:
        widths: widths to which sources and targets are padded, so that all batches have one shape; None: the widths as
            they come.
        pad: the id of the padding token.
        texts: the labels are texts; otherwise they are one for each example, or for each token of its source.
        joined: source and target are one text. Then the targets' lengths are the numbers of tokens with a label, which
            the tokens before them predict.
    """

    def collate(examples: list[dict[str, Any]]) -> Mapping[str, Any]:
        batch = dict(collator(examples))
        batch[SOURCES] = batch["attention_mask"].sum(1).tolist()
        if texts and get_labels(batch).dim() > 1:
            labelled = batch["labels"].ne(NO_TOKEN)
            last = (labelled * torch.arange(1, labelled.shape[1] + 1)).amax(1)
            batch[TARGETS] = (labelled[:, 1:].sum(1) if joined else last).tolist()
        if widths is not None:
            sources, targets = widths if texts and not joined else (widths[0], widths[0])
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


def find_refusal(model: PreTrainedModel, longest: int) -> str | None:
    """Return the part of a model that cannot be trained without padding, or None if all can.

    Args:
        longest: tokens of the longest example.
    """
    sites = find_sites(model)
    if any(getattr(config, "attn_logit_softcapping", None) is not None for config in list_configs(model)):
        return f"{model.config.model_type}, whose attentions cap their scores"
    if any(name.endswith(f".{PROMPT}") or isinstance(module, DecoderPrompt) for name, module in model.named_modules()):
        return "prompts, which are put before each example of a batch"
    if not takes_our_attention(model):
        return f"{model.config.model_type}, whose attention function cannot be replaced"
    if not _takes_positions(model) and (not sites.embedding or sites.family.embedding_at != "input"):
        return f"{model.config.model_type}, whose layers count positions"
    if adds_router_loss(model):
        return "the auxiliary loss of routers (output_router_logits=true), which reads the mask of a padded batch"
    windows = [window for config in list_configs(model) if (window := getattr(config, "sliding_window", None))]
    prefixes = any(isinstance(module, Prefix) for module in model.modules())
    if prefixes and windows and min(windows) < longest:
        return f"prefixes, of which a sliding window of {min(windows)} tokens hides a part"
    return None


def _takes_positions(model: PreTrainedModel) -> bool:
    """Return whether the model is a decoder alone that takes the position of each token.

    OPT's language model calls the decoder inside of its base model, past the hook on the latter.
    """
    stacks = find_sites(model).family.stacks
    alone = set(stacks) == {"decoder"} and "." not in stacks["decoder"]
    return alone and "position_ids" in inspect.signature(model.base_model.forward).parameters


class PaddingFree:
    """Packs the batches of `model` inside `active`.

    Args:
        sources: tokens of the longest input; in a decoder alone, with its completion.
        targets: tokens of the longest target; 0 if the examples have none.
        steps: the rows of encoder and decoder are filled up to multiples of these numbers of tokens. In a decoder
            alone, they are for its row and for its tokens with a label.

    Raises:
        UserError: for a family whose layers count positions (T5), and for prompts; see `find_refusal`.
    """

    def __init__(self, model: PreTrainedModel, sources: int, targets: int, steps: tuple[int, int] = (1, 1)) -> None:
        if (why := find_refusal(model, sources)) is not None:
            raise UserError(
                f"trainer.padding_free=true is not supported for {why}; use trainer.batching=bucketed, which has "
                "little padding."
            )
        self.model = model
        self.sites = find_sites(model)
        self.flattens = _takes_positions(model)
        if self.flattens:
            self.parameters = list(inspect.signature(model.base_model.forward).parameters)
            self.packings = {"decoder": Packing(sources)}
            self.columns = [("decoder", "input_ids", SOURCES)]
        else:
            self.packings = {"encoder": Packing(sources), "decoder": Packing(max(1, targets))}
            self.columns = [("encoder", "input_ids", SOURCES), ("decoder", "labels", TARGETS)]
            if targets == 0:  # a classifier with a decoder reads the source again there
                self.packings["decoder"] = self.packings["encoder"]
        self.steps = dict(zip(self.packings, steps, strict=False))
        self.labelled_step = steps[1]
        self.labelled: Tensor | None = None
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
        for stack, column, _ in self.columns:
            if _list_names(stack)[0] in batch:
                example, offsets, index = (batch.pop(name) for name in _list_names(stack))
                self.packings[stack].take((example, offsets, index), tuple(batch[column].shape))
        self.labelled = batch.pop(LABELLED, None)
        return batch

    def rows(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the batch with tensors on its device in place of the lengths."""
        batch = dict(batch)
        for stack, column, lengths in self.columns:
            if lengths in batch:
                counts, padded = batch.pop(lengths), batch[column]
                made = self.packings[stack].tensors(
                    counts, padded.shape[1], padded.device, self._fillers(stack, sum(counts))
                )
                batch.update(zip(_list_names(stack), made, strict=True))
        if TARGETS in batch:
            batch[LABELLED] = self._find_labelled(batch["labels"], sum(batch.pop(TARGETS)))
        return batch

    def _find_labelled(self, labels: Tensor, count: int) -> Tensor:
        """Return the `count` places in the flattened (B, S) whose next token has a label, without waiting for the GPU.

        They are filled up, to a multiple of a step, with places that have none and so add nothing to the loss.
        """
        ahead = F.pad(labels[:, 1:], (0, 1), value=NO_TOKEN).flatten()
        count = min(count + -count % self.labelled_step, len(ahead))
        return (ahead == NO_TOKEN).to(torch.uint8).argsort(stable=True)[:count]

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
        fillers are `NO_TOKEN`. In a decoder alone, these are the tokens that predict a label."""
        if self.labelled is not None:
            return padded.flatten(0, 1).index_select(0, self.labelled).unsqueeze(0)
        return self.packings["decoder"].pack(padded, 0.0 if padded.is_floating_point() else NO_TOKEN)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, a forward pass packs the batch that was loaded last."""
        handles = []
        base = self.model.base_model
        if self.flattens:
            handles.append(base.register_forward_pre_hook(self._flatten, with_kwargs=True))
        else:
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

    def _flatten(
        self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Give a decoder the batch's tokens as one text, with the position of each in its example (forward pre-hook).

        Its mask is all ones: without any, transformers would look for examples in the positions, for which it waits
        for the GPU.
        """
        given = {**dict(zip(self.parameters, args, strict=False)), **given}
        packing = self.packings["decoder"]
        ids = packing.pack(given["input_ids"])
        positions = packing.row.positions.unsqueeze(0)
        return (), {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}

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
