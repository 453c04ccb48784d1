"""Prefixes of a decoder alone that start near the backbone: as the keys and values of text that it wrote itself.

The paper's prefixes start as random vectors. Their keys have scores near zero, and their values are far from any
context's. A decoder puts most of its attention on its first token and little on the others, so that 233 such keys take
most of the attention from the context (smollm2-135m on WebNLG: a loss of 7.6 in place of 2.5, and 6.1 with the MLP).
Keys and values of real text do not (2.2). Li and Liang (2021) start a prefix as the activations of real words, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_sites
from peftbench.config import schema
from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.head_attention import HEADS, Prefix
from peftbench.modification.prompt import compute_front

NEAR_START = (
    "The prefix starts as keys and values of text that the backbone wrote; init=bert starts it at random, as the paper."
)

Activations = dict[int, list[tuple[Tensor, Tensor]]]  # by length: keys and values of each layer


def find_near_starts(model: PreTrainedModel, modifications: Mapping[str, schema.Modification]) -> dict[str, int]:
    """Return, by module name, the length of each prefix that starts as text: on decoders alone, with init=lora."""
    sites = find_sites(model)
    if model.config.is_encoder_decoder or set(sites.family.stacks) != {"decoder"} or sites.family.counts_keys:
        return {}
    return {
        schema.name_module(prefix): m.bottleneck
        for prefix, m in modifications.items()
        if m.functional_form.name == "softmax"
        and m.modified_representation.name is schema.Representation.heads
        and m.composition_function.name is schema.Composition.gated
        and m.init is schema.Init.lora
        and m.bottleneck is not None
    }


@torch.no_grad()
def record_activations(model: PreTrainedModel, lengths: set[int], seed: int) -> Activations:
    """Return the keys and values of text that an unmodified model writes, for each length. Torch's random state stays.

    A model without an output layer (a classifier) writes nothing: its text is random tokens.
    """
    if not lengths:
        return {}
    was_training = model.training
    model.eval()
    try:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            ids = _write_text(model, max(lengths))
        embedded = model.get_input_embeddings()(ids)
        return {length: compute_front(model.base_model, embedded[:, :length]) for length in lengths}
    finally:
        model.train(was_training)


def _write_text(model: PreTrainedModel, length: int) -> Tensor:
    """Return ids (1, l), sampled from the model."""
    config = model.config
    if model.get_output_embeddings() is None:
        return torch.randint(config.vocab_size, (1, length), device=model.device)
    first = next((token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int)), 0)
    begin = torch.tensor([[first]], device=model.device)
    if length == 1:
        return begin
    rest = {"min_new_tokens": length - 1, "max_new_tokens": length - 1, "pad_token_id": first}
    mask = torch.ones_like(begin)
    ids: Tensor = model.generate(begin, attention_mask=mask, do_sample=True, top_k=50, num_beams=1, **rest)
    return ids


@torch.no_grad()
def start_prefixes(model: PreTrainedModel, starts: Mapping[str, int], activations: Activations) -> None:
    """Set the prefixes named in `starts` to the activations of their length; see `find_near_starts`."""
    for layer in find_sites(model).layers:
        for attention in layer.attentions:
            there = getattr(attention.module, HEADS, {})
            for name, length in starts.items():
                if name in there and isinstance(there[name], Prefix):
                    function = there[name].function
                    assert isinstance(function, Bottleneck)
                    keys, values = (each[0].float() for each in activations[length][layer.index])
                    _set_vectors(function, keys, values)


def _set_vectors(function: Bottleneck, keys: Tensor, values: Tensor) -> None:
    """Set P_k and P_v, each (N_kv, l, d_h). The prefix's MLP gets the least W_i that makes them from its hidden layer.

    The hidden layer (l, mid) has full rank, so that they are exact if l is at most mid.
    """
    if function.generator is None:
        assert function.down is not None and function.up is not None
        function.down.copy_(keys)
        function.up.copy_(values.transpose(-1, -2))
        return
    linear, hidden = function.generator.linear, function.generator.trunk().double()
    wanted = torch.cat([each.transpose(0, 1).flatten(1) for each in (keys, values)], dim=-1).double()
    mean = wanted.mean(dim=0)
    linear.bias.copy_(mean)
    linear.weight.copy_((torch.linalg.pinv(hidden) @ (wanted - mean)).T)
