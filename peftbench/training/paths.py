"""The fast paths of a training, and what `auto` means for a backbone on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from peftbench.backbones.quantisation import is_quantised
from peftbench.backbones.sites import adds_router_loss, list_configs
from peftbench.config import schema
from peftbench.config.trainer_validity import list_unrecordable
from peftbench.modification.head_attention import ATTENTION_NAME
from peftbench.tasks.base import TaskData
from peftbench.tasks.batch import Collator
from peftbench.tasks.tokens import count_positions
from peftbench.training.batching import Lengths, pad_to_multiple
from peftbench.training.compiled import CompiledLayers
from peftbench.training.padding_free import PaddingFree, add_lengths, choose_row_step, find_refusal
from peftbench.training.token_loss import TokenLoss, find_output_layer
from peftbench.utils.errors import UserError

AUTO = "auto"
WIDTH = 32  # tokens; bucketed batches are padded to multiples of it, if the backbone has enough positions


def resolve_auto(
    settings: schema.Trainer, model: PreTrainedModel, *, half: bool, records: bool, longest: int
) -> schema.Trainer:
    """Return the settings with true or false instead of `auto`: true if a path is fast and the backbone supports it.

    Args:
        half: products are computed in 16 bits.
        records: steps can be recorded, as on a GPU.
        longest: tokens of the longest example.

    Raises:
        UserError: `graphs=true`, and they cannot.
    """
    if settings.graphs is True and not records:
        raise UserError(
            "trainer.graphs=true: CUDA graphs need a GPU, and there is none here; use trainer.graphs=false."
        )
    if settings.graphs is True and (key := find_layer_drop(model)) is not None:
        raise UserError(
            f"trainer.graphs=true: this backbone leaves layers out at random ({key} in its config.json), and a CUDA "
            "graph always has the same; use trainer.graphs=false."
        )
    if is_quantised(model) and settings.compile is not schema.Compile.none:
        raise UserError(
            f"trainer.compile={settings.compile.name} is not supported for a quantised backbone; use "
            "trainer.compile=none."
        )
    padding_free, graphs = settings.padding_free, settings.graphs
    attention = model.config._attn_implementation
    whole = not is_quantised(model)
    if padding_free == AUTO:
        own = attention in ("sdpa", ATTENTION_NAME)  # the functions that this path's replaces
        quick = model.device.type == "cuda" and whole and own and half
        padding_free = quick and find_refusal(model, longest) is None
    if graphs == AUTO:
        known = attention in ("sdpa", "eager", ATTENTION_NAME)
        graphs = records and whole and known and not list_unrecordable(settings) and find_layer_drop(model) is None
    return replace(settings, padding_free=padding_free, graphs=graphs)


def find_layer_drop(model: PreTrainedModel) -> str | None:
    """Return the config key by which the backbone skips layers at random in training; None: it skips none."""
    for each in list_configs(model):
        for key, rate in each.to_dict().items():
            if key.endswith("layerdrop") and rate:
                return f"{key}={rate}"
    return None


def make_collator(data: TaskData, model: PreTrainedModel, settings: schema.Trainer, lengths: Lengths) -> Collator:
    """Return the task's collator, adapted to the paths."""
    if settings.padding_free:
        widths = lengths.longest if settings.graphs else None
        pad, texts = model.config.pad_token_id or 0, bool(lengths.targets)
        return add_lengths(data.collator, widths, pad, texts=texts, joined=lengths.joined)
    if settings.graphs or settings.batching is schema.Batching.bucketed:
        limit, longest = count_positions(model), max(*data.lengths, *lengths.longest)
        fits = limit is None or -(-longest // WIDTH) * WIDTH <= limit
        return pad_to_multiple(data.collator, WIDTH if fits else 1)
    return data.collator


@dataclass(frozen=True)
class FastPaths:
    """The paths that the forward pass of one training takes; None for one that it does not take."""

    padding_free: PaddingFree | None = None
    token_loss: TokenLoss | None = None
    layers: CompiledLayers | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, settings: schema.Trainer, lengths: Lengths) -> FastPaths:
        """Return the paths that the settings request and the model supports.

        Raises:
            UserError: `padding_free` for a backbone that does not support it; label smoothing for one whose routers
                have a loss, which transformers' label smoothing leaves out.
        """
        if settings.label_smoothing and adds_router_loss(model):
            raise UserError(
                f"trainer.label_smoothing={settings.label_smoothing} would leave out the auxiliary loss that the "
                "backbone's config.json asks for with output_router_logits=true; set trainer.label_smoothing=0, or "
                "output_router_logits to false in config.json."
            )
        compiled = settings.compile is not schema.Compile.none
        padding_free, token_loss = None, None
        if settings.padding_free:
            multiples = (1, 1)
            if settings.graphs:
                size = min(len(lengths.sources), settings.batch_size)
                multiples = (
                    choose_row_step(lengths.sources, size),
                    choose_row_step(lengths.targets or lengths.sources, size),
                )
            padding_free = PaddingFree(model, *lengths.longest, multiples)
        if settings.fused_loss and (layer := find_output_layer(model)) is not None:
            pack = None if padding_free is None else padding_free.targets
            token_loss = TokenLoss(
                model, layer, settings.label_smoothing, compiled=compiled, pack=pack, recorded=bool(settings.graphs)
            )
        return cls(padding_free, token_loss, CompiledLayers(model) if compiled else None)

    @property
    def taken(self) -> list[str]:
        """Return the keys of the paths that are taken."""
        paths = {"padding_free": self.padding_free, "fused_loss": self.token_loss, "compile": self.layers}
        return [key for key, path in paths.items() if path is not None]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, the model's passes take these paths."""
        with ExitStack() as stack:
            for path in (self.layers, self.padding_free):
                if path is not None:
                    stack.enter_context(path.active())
            yield

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a pass's inputs for a batch."""
        return dict(batch) if self.padding_free is None else self.padding_free.load(batch)
