"""What a batch of examples is, for all that make or read one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from peftbench.backbones.sites import find_family

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Makes a padded batch of tensors of examples, each a dict of columns.
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

NO_TOKEN = -100  # a label, or a predicted id, that is not a token: torch's cross-entropy leaves it out


def get_labels(batch: Mapping[str, Any]) -> Any:
    """Return the tensor of a batch's labels, or of question answering the first tokens of the answers: (B, ...)."""
    return batch["labels"] if "labels" in batch else batch["start_positions"]


def is_decoder_alone(model: PreTrainedModel) -> bool:
    """Return whether a model's tokens see only those before them, and there is no encoder whose tokens see all."""
    return set(find_family(model.config.model_type).stacks) == {"decoder"}


def predicts_next(model: PreTrainedModel) -> bool:
    """Return whether a model predicts the label of each token at the one before it, as a decoder alone that writes."""
    return not model.config.is_encoder_decoder and model.get_output_embeddings() is not None


def make_decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return the input of an encoder-decoder's decoder for `labels` (B, S): the same tokens, one position later.

    M2M100 has no method for that: its forward pass shifts labels as BART's does.
    """
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        made: Tensor = prepare(labels=labels)
        return made
    shifted = labels.roll(1, dims=-1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted.masked_fill(shifted == NO_TOKEN, model.config.pad_token_id)
