"""Prefixes of decoders alone that start as text which the backbone wrote; elsewhere they start as in the paper."""

from __future__ import annotations

import pytest
import torch

from peftbench.config.schema import Modification
from peftbench.modification.attach import attach
from peftbench.modification.prefix_start import find_near_starts, record_activations, start_prefixes
from peftbench.modification.state import list_bottlenecks
from tests.families import CONTINUING, PRESETS, build, modification

LENGTH = 5
NEAR = modification("softmax", "heads", "parallel", "gated", LENGTH)
WITH_MLP = modification("softmax", "heads", "parallel", "gated", LENGTH, prefix_mlp=16)


@pytest.mark.parametrize("m", [NEAR, WITH_MLP], ids=["plain", "mlp"])
@pytest.mark.parametrize("family", CONTINUING)
def test_prefix_starts_as_the_keys_and_values_of_the_text(family: str, m: Modification) -> None:
    """In every layer, of all heads, in the form that the attention reads: a second run of the text gives the same."""
    model = build(family)
    starts = find_near_starts(model, {"": m})
    activations = record_activations(model, set(starts.values()), seed=0)
    attach(model, {"": m})
    start_prefixes(model, starts, activations)
    functions = list_bottlenecks(model)
    assert len(functions) == model.config.num_hidden_layers
    for function, (keys, values) in zip(functions, activations[LENGTH], strict=True):
        down, up = function.weights()
        torch.testing.assert_close(down, keys[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(up.transpose(-1, -2), values[0], rtol=1e-4, atol=1e-5)


def test_output_is_that_of_the_backbone_after_the_text() -> None:
    """With rotary positions and no window: tokens after the text see just the keys and values that it leaves."""
    model, bare = build("llama").eval(), build("llama").eval()
    starts = find_near_starts(model, {"": NEAR})
    activations = record_activations(model, {LENGTH}, seed=3)
    attach(model, {"": NEAR})
    start_prefixes(model, starts, activations)
    ids = torch.arange(7, 16).unsqueeze(0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = bare.generate(
            torch.tensor([[bare.config.bos_token_id]]), do_sample=True, top_k=50, min_new_tokens=4, max_new_tokens=4
        )
    wanted = bare(input_ids=torch.cat([text, ids], dim=1)).logits[:, LENGTH:]
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_only_decoders_alone_start_so_and_init_bert_does_not() -> None:
    bert = modification("softmax", "heads", "parallel", "gated", LENGTH, init="bert")
    assert find_near_starts(build("bart"), {"": NEAR}) == {}
    assert find_near_starts(build("roberta"), {"": NEAR}) == {}
    assert find_near_starts(build("llama"), {"": bert}) == {}
    assert find_near_starts(build("llama"), PRESETS["lora"]) == {}
    assert find_near_starts(build("llama"), {"mix.attention.": NEAR}) == {"attention": LENGTH}


def test_text_depends_on_the_seed_and_leaves_the_random_state() -> None:
    model = build("llama")
    before = torch.get_rng_state()
    first, again, other = (record_activations(model, {LENGTH}, seed)[LENGTH][0][0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_classifier_starts_as_random_tokens() -> None:
    model = build("llama_classifier")
    (keys, values) = record_activations(model, {LENGTH}, seed=0)[LENGTH][0]
    assert keys.shape == values.shape and keys.shape[2] == LENGTH
