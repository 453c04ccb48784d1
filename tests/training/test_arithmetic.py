"""The operations that a method needs, beside torch's own count of what a forward and backward pass does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peftbench.modification.attach import attach
from peftbench.training.arithmetic import count_operations
from peftbench.training.batching import Lengths
from tests.families import PRESETS, build, dropout


@pytest.mark.parametrize("preset", ["lora_ffn", "scaled_parallel_adapter", "adapter"])
@pytest.mark.parametrize("family", ["roberta", "bart"])
def test_a_pass(family: str, preset: str) -> None:
    """Gradients pass through every layer where the embeddings have one. torch's count has RoBERTa's head besides."""
    widths = {"hidden_size": 64, "intermediate_size": 256}
    if family == "bart":
        widths = {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    model = build(family, **dropout(family), **widths)
    attach(model, PRESETS[preset])
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda m, args, out: out.requires_grad_())
    ids = torch.randint(5, 90, (2, 40))
    labels = torch.randint(5, 90, (2, 12)) if family == "bart" else torch.tensor([0, 1])
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=labels).loss.backward()
    targets = [12, 12] if family == "bart" else []
    lengths = Lengths([40, 40], targets, joined=False)
    assert 2 * count_operations(model, lengths) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_decoder_needs_logits_only_where_there_are_labels() -> None:
    model = build("llama")
    attach(model, PRESETS["lora_ffn"])
    few, many = (count_operations(model, Lengths([40, 40], [targets] * 2, joined=True)) for targets in (10, 30))
    assert many - few == 4 * model.lm_head.weight.numel() * 20
