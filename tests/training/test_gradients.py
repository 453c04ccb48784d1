"""The gradients of a training step do not depend on how it is run: against float64 on the CPU, on CPU and GPU.

A step is run plainly, with gradient checkpointing of both kinds, compiled, under bf16 autocast and on a bf16 backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.config import schema
from peftbench.modification.attach import attach
from peftbench.training.fit import checkpoint_gradients
from tests.families import ALIKE, FAMILIES, MORE_FAMILIES, PRESETS, batch, build, dropout, shake

ON_CPU, ON_GPU = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)
# A rounding must not switch one of the few units of a tiny model on or off: gelu where a backbone or a method has relu.
SMOOTH: dict[str, dict[str, Any]] = {family: {"feed_forward_proj": "gelu"} for family in ("t5", "t5_classifier")}
MORE = ("prefix", "prefix_no_gating", "pfeiffer", "lora", "mh_parallel_adapter_hidden")


def checkpointed(reentrant: bool) -> Callable[[PreTrainedModel], PreTrainedModel]:
    def apply(model: PreTrainedModel) -> PreTrainedModel:
        if reentrant:
            model.enable_input_require_grads()
        checkpoint_gradients(model, reentrant)
        return model

    return apply


@pytest.mark.parametrize("names", [["gradient"], ["gradient", "activation"], ["activation"]])
def test_checkpointing_is_asked_for_by_the_newest_name(names: list[str]) -> None:
    """transformers before 5.24 has the older name, and version 6 will have the newer one alone."""
    asked: list[tuple[str, dict[str, bool]]] = []

    def note(name: str) -> Callable[[dict[str, bool]], None]:
        return lambda options: asked.append((name, options))

    model = SimpleNamespace(**{f"{name}_checkpointing_enable": note(name) for name in names})
    checkpoint_gradients(model)  # type: ignore[arg-type]
    assert asked == [(names[-1], {"use_reentrant": False})]


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    """On the CPU without code generation, which would take minutes. Hooks must not break the graph; where BART's own
    LayerDrop breaks it (transformers 5.17), RoBERTa still shows that."""
    torch._dynamo.reset()
    whole = model.config.model_type == "roberta"
    model.compile(fullgraph=whole, backend="aot_eager" if model.device.type == "cpu" else "inductor")
    return model


def smooth(preset: str) -> dict[str, schema.Modification]:
    """The preset with gelu for relu."""
    modifications = copy.deepcopy(PRESETS[preset])
    for m in modifications.values():
        if m.functional_form.name == "relu":
            m.functional_form.name = "gelu"
    return modifications


@dataclass(frozen=True)
class Way:
    """A way to run a step, and how far all gradients together may be from float64's, relative to their norm."""

    tolerance: float
    prepare: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model
    backbone: torch.dtype = torch.float32
    autocast: bool = False

    def context(self, device: str) -> AbstractContextManager[object]:
        return torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext()


WAYS = {
    "plain": Way(1e-5),
    "checkpointed": Way(1e-5, checkpointed(reentrant=False)),
    "checkpointed_reentrant": Way(1e-5, checkpointed(reentrant=True)),
    "compiled": Way(1e-5, compiled),
    # bf16 keeps 8 bits: one rounding is 0.4%, a gradient passes through some dozens of them, and the sharp attention of
    # these random models can enlarge them. Seen: 0.01 to 0.04 for most, 0.12 for prefixes on Llama (transformers 5.17).
    "autocast": Way(0.15, autocast=True),
    "bf16_backbone": Way(0.15, backbone=torch.bfloat16, autocast=True),
    "autocast_compiled": Way(0.15, compiled, autocast=True),
}


def step(family: str, preset: str, way: Way, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of one step without dropout; both the backbone's and the method's weights are always the same."""
    model = build(family, **dropout(family), **SMOOTH.get(family, {}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # of task heads
    model.to(torch.bfloat16).to(way.backbone)  # the same numbers in every precision
    attach(model, smooth(preset))
    shake(model, 0.1)
    model.to(device)
    if dtype is torch.float64:
        model.double()
    model = way.prepare(model).train()
    inputs = {name: tensor.to(device) for name, tensor in batch(family).items()}
    with way.context(device):
        loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: gradient.double().cpu() for name, gradient in found.items()}


@cache
def exact_step(family: str, preset: str) -> dict[str, Tensor]:
    """In float64: the same whichever way it is compared with."""
    return step(family, preset, WAYS["plain"], "cpu", torch.float64)


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys()
    error = sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5
    return error / sum(float(gradient.square().sum()) for gradient in exact.values()) ** 0.5


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        pytest.param(family, preset, marks=pytest.mark.slow if preset in MORE else ())
        for family in (*FAMILIES, *MORE_FAMILIES)
        if family not in ALIKE  # layers alike are checkpointed and cast alike
        for preset in ("adapter", "mam", *MORE)
    ],
)
@pytest.mark.parametrize("way", [way for way in WAYS if "compiled" not in way])
@pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
def test_gradients_do_not_depend_on_how_a_step_is_run(device: str, way: str, family: str, preset: str) -> None:
    found = step(family, preset, WAYS[way], device, torch.float32)
    assert relative_error(found, exact_step(family, preset)) < WAYS[way].tolerance


@pytest.mark.parametrize("family", ["roberta", "bart"])
@pytest.mark.parametrize(
    ("device", "way", "preset"),
    [
        pytest.param("cpu", "compiled", "mam", marks=pytest.mark.slow),
        *(
            pytest.param("cuda", way, preset, marks=pytest.mark.gpu)
            for way in ("compiled", "autocast_compiled")
            for preset in ("adapter", "lora", "mam")
        ),
    ],
)
def test_gradients_of_a_compiled_model(device: str, way: str, preset: str, family: str) -> None:
    found = step(family, preset, WAYS[way], device, torch.float32)
    assert relative_error(found, exact_step(family, preset)) < WAYS[way].tolerance
