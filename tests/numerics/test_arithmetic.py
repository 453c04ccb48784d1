"""The operations that a method needs, beside torch's own count of what a forward and backward pass does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peftbench.arithmetic import operations
from peftbench.modification.attach import attach
from tests.families import PRESETS, build, dropout


@pytest.mark.parametrize("preset", ["lora_ffn", "scaled_parallel_adapter", "adapter"])
def test_an_encoder(preset: str) -> None:
    """Gradients pass through every layer where the embeddings have one. torch's count has the head besides."""
    model = build("roberta", **dropout("roberta"), hidden_size=64, intermediate_size=256)
    attach(model, PRESETS[preset])
    model.set_attn_implementation("eager")
    ids = torch.randint(5, 90, (2, 40))
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert 2 * operations(model, [40, 40], []) == pytest.approx(counter.get_total_flops(), rel=0.01)
