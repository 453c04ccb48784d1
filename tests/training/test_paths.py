"""What `auto` means for the fast paths of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench.config.schema import Trainer
from peftbench.modification.attach import attach
from peftbench.training.padding_free import find_refusal
from peftbench.training.paths import resolve_auto
from peftbench.utils.errors import UserError
from tests.families import PRESETS, build
from tests.fitting import Targets, fitted, model_of, one_step
from tests.training.test_replay import Recorder

AUTO = {"padding_free": "auto", "graphs": "auto"}


def test_a_cpu_takes_none() -> None:
    found = resolve_auto(Trainer(**AUTO), build("bart"), half=True, records=False, longest=9)
    assert (found.padding_free, found.graphs) == (False, False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "bf16", "expected"), [("bart", True, True), ("bart", False, False), ("t5", True, False)]
)
def test_padding_free_on_a_gpu(family: str, bf16: bool, expected: bool) -> None:
    model = build(family).cuda()
    attach(model, PRESETS["lora"])
    found = resolve_auto(Trainer(**AUTO), model, half=bf16, records=True, longest=9)
    assert (found.padding_free, found.graphs) == (expected, True)


@pytest.mark.parametrize("other", [{"micro_batch": "4"}, {"accumulation": 2}, {"gradient_checkpointing": True}])
def test_graphs_are_of_whole_batches(other: dict[str, Any]) -> None:
    model = build("bart")
    assert resolve_auto(Trainer(**AUTO), model, half=False, records=True, longest=9).graphs is True
    assert resolve_auto(Trainer(**AUTO, **other), model, half=False, records=True, longest=9).graphs is False


def test_layers_that_are_left_out_at_random_cannot_be_recorded() -> None:
    """A graph would have the same ones at every step."""
    model = build("bart", encoder_layerdrop=0.1)
    assert resolve_auto(Trainer(**AUTO), model, half=False, records=True, longest=9).graphs is False
    with pytest.raises(UserError, match=r"encoder_layerdrop=0\.1 in its config\.json"):
        resolve_auto(Trainer(graphs=True), model, half=False, records=True, longest=9)


@pytest.mark.parametrize(
    ("family", "preset", "expected"),
    [
        ("bart", "mam", None),
        ("t5", "lora", "positions"),
        ("gpt2", "lora", None),
        ("bart", "prompt", "prompts"),
        ("llama", "prompt", "prompts"),
    ],
)
def test_what_cannot_be_without_padding(family: str, preset: str, expected: str | None) -> None:
    model = build(family)
    attach(model, PRESETS[preset])
    found = find_refusal(model, 9)
    assert found is None if expected is None else expected in str(found)


def test_the_paths_taken_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = one_step(max_steps=4, graphs="auto", fused_loss=True, padding_free=True)
    fit = fitted(model_of("bart", "mam"), Targets("bart"), settings, tmp_path, recorder=Recorder())
    assert fit.fast_paths == ["padding_free", "fused_loss", "graphs"]
    fit = fitted(model_of("bart", "mam"), Targets("bart"), one_step(fused_loss=False), tmp_path)
    assert fit.fast_paths == []
