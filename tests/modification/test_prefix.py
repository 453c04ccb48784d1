"""Prefixes of decoders alone against the peft library, bit for bit, with copied weights.

peft puts its prefix into the KV cache and so moves every token by l positions; ours leaves them where they are. With
either model told the other's positions the two are the same, on GPT-2 with its table of positions and on Llama with
its rotary ones, where both leave the prefix's keys unrotated, as trained. peft passes no positions on, so that its
cache is given to the backbone by hand where it is told ours.

Nothing else of peft's prefixes can be compared: it has none in an encoder or a cross-attention, and under a sliding
window (Mistral) its prefix leaves the window as the text grows, where ours stays.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from peftbench.evaluation.kv_cache import name_cache_argument
from peftbench.modification.attach import attach
from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.state import list_bottlenecks
from tests.families import batch, build, dropout, modification

LENGTH = 5
RATES = {family: dropout(family, 0.1, 0.2) for family in ("gpt2", "llama")}


def pair(family: str) -> tuple[PreTrainedModel, PeftModel, list[tuple[Bottleneck, slice]]]:
    """Our model, peft's with the same random prefix, and where each layer's keys stand in peft's one table."""
    ours = build(family, **RATES[family])
    attach(ours, {"": modification("softmax", "heads", "parallel", "gated", LENGTH, init="bert")})
    theirs = get_peft_model(
        build(family, **RATES[family]),
        PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=LENGTH),
    )
    functions = list_bottlenecks(ours)
    table = theirs.prompt_encoder["default"].embedding.weight  # (l, layers x 2 x N_kv x d_h)
    width = table.shape[1] // len(functions)
    places = [(function, slice(width * i, width * (i + 1))) for i, function in enumerate(functions)]
    with torch.no_grad():
        table.normal_(std=0.7)
        for function, columns in places:
            key, value = by_heads(table[:, columns], function)
            function.down.copy_(key)
            function.up.copy_(value.transpose(1, 2))
    return ours, theirs, places


def by_heads(columns: Tensor, function: Bottleneck) -> Tensor:
    """(l, 2 x N_kv x d_h) of one layer -> its keys and values, (2, N_kv, l, d_h)."""
    return columns.view(LENGTH, 2, function.groups, function.in_width).permute(1, 2, 0, 3)


def positions(first: int) -> Tensor:
    return torch.arange(9).expand(2, -1) + first


def told(theirs: PeftModel, inputs: dict[str, Tensor], position_ids: Tensor) -> CausalLMOutputWithPast:
    """peft's model with the positions of its tokens given, and its prefix in the cache as peft has it."""
    mask = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), inputs["attention_mask"]], dim=1)
    prefix = theirs.get_prompt(batch_size=2)
    given = {**inputs, "attention_mask": mask, name_cache_argument(theirs.base_model): prefix}
    return theirs.base_model(**given, position_ids=position_ids)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("lengths", [(9, 6), (9, 9)], ids=["padded", "unpadded"])
@pytest.mark.parametrize("aligned", ["to_ours", "to_peft"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefix_equals_peft_in_output_and_gradients(
    family: str, aligned: str, lengths: tuple[int, int], train: bool
) -> None:
    """Difference 0.0 in fp32, the attention's dropout included."""
    ours, theirs, places = pair(family)
    inputs = batch(family, lengths)
    outputs = []
    for model in (ours, theirs):
        model.train(train)
        torch.manual_seed(11)
        if aligned == "to_ours":
            out = told(model, inputs, positions(0)) if model is theirs else model(**inputs)
        else:
            out = model(**inputs) if model is theirs else model(**inputs, position_ids=positions(LENGTH))
        out.loss.backward()
        outputs.append(out.logits.detach())
    assert torch.equal(*outputs)
    table = theirs.prompt_encoder["default"].embedding.weight.grad
    for function, columns in places:
        key, value = by_heads(table[:, columns], function)
        assert key.abs().max() > 0 and value.abs().max() > 0
        assert torch.equal(function.down.grad, key)
        assert torch.equal(function.up.grad, value.transpose(1, 2))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_positions_matter(family: str) -> None:
    """Why they have to be told: the same prefix gives other logits when the tokens begin at position l. So it does
    with rotary positions, which are relative among tokens, but not between tokens and a prefix without position."""
    ours, theirs, _ = pair(family)
    with torch.no_grad():
        difference = ours(**batch(family)).logits - theirs.eval()(**batch(family)).logits
    assert difference.abs().max() > 0.1
