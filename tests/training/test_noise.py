"""Processes that share a batch draw the dropout that one process would, whatever the shapes in a family's layers."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import PreTrainedModel

from peftbench.backbones.sites import list_configs
from peftbench.modification.attach import attach
from peftbench.training.noise import WholeNoise
from peftbench.training.shares import OF, ROW, balance_rows
from peftbench.utils.team import ALONE
from tests.families import FAMILIES, LAYOUTS, MORE_FAMILIES, PRESETS, ROWS, batch, shake

ALL = {**FAMILIES, **MORE_FAMILIES, **LAYOUTS, **ROWS}
LENGTHS = (9, 8, 7, 6, 5, 4, 4)
RATE = 0.3


def dropping(family: str, preset: str) -> PreTrainedModel:
    """A model to be trained, with all the dropout that its config and its modifications can have."""
    rates = [key for key, rate in ALL[family]().config.to_dict().items() if _is_dropout(key, rate)]
    torch.manual_seed(0)
    model = ALL[family](**dict.fromkeys(rates, RATE))
    modifications = deepcopy(PRESETS[preset])
    for modification in modifications.values():
        modification.dropout = RATE
    attach(model, modifications)
    shake(model)
    for config in list_configs(model):
        config.use_cache = False
    return model.train()


def _is_dropout(key: str, rate: object) -> bool:
    return ("dropout" in key or key.endswith("pdrop")) and isinstance(rate, float | int) and not isinstance(rate, bool)


@pytest.mark.parametrize("size", [2, 4])  # of 4, some have one row
@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("opt", "mam"),  # its FFNs read all examples' tokens as one dimension
        ("gpt2", "prompt"),  # which passes through the layers as one row
        ("deberta_v2", "lora"),  # relative positions are one row for all examples
        ("bart", "prompt"),  # tokens become more
        ("mistral", "lora"),  # padding behind the window sees no token
        *(pytest.param(family, "lora", marks=pytest.mark.slow) for family in ALL),
    ],
)
def test_each_process_drops_what_one_would(family: str, preset: str, size: int) -> None:
    model, whole = dropping(family, preset), batch(family, LENGTHS)
    torch.manual_seed(5)
    expected = model(**whole).logits.detach()
    after = torch.get_rng_state()
    assert not torch.allclose(model(**whole).logits, expected, atol=1e-2), "nothing is dropped"
    noise = WholeNoise(1, ALONE, model)
    for rows in balance_rows(LENGTHS, size):
        own = {name: column[rows] for name, column in whole.items()}
        torch.manual_seed(5)
        with noise.drawing({**own, ROW: rows, OF: [len(LENGTHS)] * len(rows)}):
            logits = model(**own).logits.detach()
        torch.testing.assert_close(logits, expected[rows], rtol=1e-3, atol=1e-3)
        assert torch.equal(torch.get_rng_state(), after), "the next numbers differ"
