"""Prompt tuning on decoders alone: against the peft library, padded on either side, generated and checkpointed."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.evaluation.kv_cache import make_caches
from peftbench.modification.attach import attach
from peftbench.modification.prompt import DecoderPrompt
from peftbench.training.fit import checkpoint_gradients
from peftbench.utils.errors import UserError
from tests.families import CONTINUING, build, modification

LENGTH = 5
PROMPT = modification("softmax", "embedding", "parallel", "gated", LENGTH)
PREFIX = modification("softmax", "heads", "parallel", "gated", 3, init="bert")


# a window drops peft's prompt as the text grows; ours stays
WHOLE = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False, "layer_types": None}}


def build_prompted(family: str, **more: object) -> PreTrainedModel:
    """A decoder with a prompt as large as its embeddings, so that it matters."""
    model = build(family, **WHOLE.get(family, {})).eval()
    attach(model, {"mix.prompt.": PROMPT, **more} if more else {"": PROMPT})
    with torch.no_grad():
        find_prompt(model).vectors.normal_(std=0.7)
    return model


def find_prompt(model: PreTrainedModel) -> DecoderPrompt:
    (prompt,) = (module for module in model.modules() if isinstance(module, DecoderPrompt))
    return prompt


def draw_ids(model: PreTrainedModel, rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(5, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", CONTINUING)
def test_prompt_equals_peft_in_output_and_gradient(family: str) -> None:
    """With rotary positions as both are; with learned ones if the tokens are told the positions that peft has."""
    ours = build_prompted(family)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=LENGTH)
    theirs = get_peft_model(build(family, **WHOLE.get(family, {})), config).eval()
    vectors, table = find_prompt(ours).vectors, theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(vectors)
    ids = draw_ids(ours)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    told = {"position_ids": torch.arange(9).expand(2, -1) + LENGTH} if family == "gpt2" else {}
    found = ours(input_ids=ids, attention_mask=mask, **told).logits
    wanted = theirs(input_ids=ids, attention_mask=mask).logits[:, LENGTH:]
    assert found.shape == (2, 9, ours.config.vocab_size)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
    found[mask.bool()].square().sum().backward()
    wanted[mask.bool()].square().sum().backward()
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad, table.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(family: str) -> None:
    model = build_prompted(family)
    ids = draw_ids(model, rows=1)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(13) >= 4).long().unsqueeze(0)
    positions = (torch.arange(13) - 4).clamp(min=0).unsqueeze(0)
    alone = model(input_ids=ids).logits
    found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", CONTINUING)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "prefix"])
def test_generation_from_caches_equals_recomputation(family: str, beams: int, beside: bool) -> None:
    """With our cache, which has the prompt once; with transformers', before whose keys it is put; and without any."""
    model = build_prompted(family, **({"mix.prefix.": PREFIX} if beside else {}))
    ids = draw_ids(model)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    with torch.no_grad():
        wanted = model.generate(ids, use_cache=False, **given)
        theirs = model.generate(ids, **given)
        with make_caches(model, beams) as new_cache:
            model.base_model.layers[0].register_forward_hook(count) if family != "gpt2" else None
            ours = model.generate(ids, **new_cache(), **given)
    assert torch.equal(theirs, wanted)
    assert torch.equal(ours, wanted)
    assert runs <= 6  # one for each new token: the prompt is not computed again


def test_checkpointed_gradient_is_the_same() -> None:
    grads = []
    for checkpointed in (False, True):
        model = build_prompted("llama", **{"mix.prefix.": PREFIX}).train()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
        if checkpointed:
            checkpoint_gradients(model)
        ids = draw_ids(model)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[0])
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_model_that_has_run_can_be_copied() -> None:
    model = build_prompted("llama")
    ids = draw_ids(model)
    wanted = model(input_ids=ids).logits
    copy = deepcopy(model)
    with torch.no_grad():
        find_prompt(model).vectors.zero_()
    assert torch.equal(copy(input_ids=ids).logits, wanted)  # the copy has a prompt of its own


def test_second_or_too_long_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="takes one prompt"):
        attach(build("llama"), {"mix.a.": PROMPT, "mix.b.": PROMPT})
    long = modification("softmax", "embedding", "parallel", "gated", 100_000)
    with pytest.raises(UserError, match="positions; use a shorter prompt"):
        attach(build("gpt2"), {"": long})
