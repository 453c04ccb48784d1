"""The composition functions against their formulas, written out position by position."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftbench.modification.attach import attach
from peftbench.modification.composition import Add, Gated, GatedAdd, Multiply, Scaled
from peftbench.modification.edit import Edit
from tests.families import PRESETS, batch, build, dropout, modification, shake


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


H, DELTA, X = numbers(2, 3, 5, seed=1), numbers(2, 3, 5, seed=2), numbers(2, 3, 4, seed=3)
W, B = numbers(4, seed=4), 0.7


def gated(kind: type[Gated]) -> Gated:
    gate = kind(4)
    with torch.no_grad():
        gate.weight[0, :, 0] = W
        gate.bias.fill_(B)
    return gate


def gate_at(b: int, t: int) -> float:
    """σ(w·x + b) of one position."""
    z = sum(float(W[i]) * float(X[b, t, i]) for i in range(4)) + B
    return 1 / (1 + math.exp(-z))


FORMULAS = {
    "add": (Add(), lambda h, d, g: h + d),
    "scaled": (Scaled(3.0), lambda h, d, g: h + 3 * d),
    "gated": (gated(Gated), lambda h, d, g: (1 - g) * h + g * d),
    "gated_add": (gated(GatedAdd), lambda h, d, g: h + g * d),
    "multiply": (Multiply(), lambda h, d, g: h * (1 + d)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    module, formula = FORMULAS[name]
    made = module(H, DELTA, X).detach()
    for b in range(2):
        for t in range(3):
            for i in range(5):
                expected = formula(float(H[b, t, i]), float(DELTA[b, t, i]), gate_at(b, t))
                assert math.isclose(float(made[b, t, i]), expected, rel_tol=1e-5, abs_tol=1e-6)


def test_one_gate_for_each_head() -> None:
    """With several groups each head has its own w and b."""
    gate = GatedAdd(4, groups=2)
    with torch.no_grad():
        gate.weight.copy_(numbers(2, 4, 1, seed=5))
        gate.bias.copy_(numbers(2, 1, 1, seed=6))
    h, delta, x = numbers(1, 2, 3, 5, seed=1), numbers(1, 2, 3, 5, seed=2), numbers(1, 2, 3, 4, seed=3)
    made = gate(h, delta, x)
    for head in range(2):
        alone = torch.sigmoid(x[:, head] @ gate.weight[head] + gate.bias[head])
        assert torch.allclose(made[:, head], h[:, head] + alone * delta[:, head], atol=1e-6)


def test_gates_begin_where_they_say() -> None:
    """gated: λ = 0.018, nearly the backbone; gated_add: λ = 1/2."""
    for kind, start in ((Gated, 0.018), (GatedAdd, 0.5)):
        assert kind(4).gate(X)[0, 0].item() == pytest.approx(start, abs=1e-3)


def test_unipelt_is_adapter_and_lora_with_gates_of_their_inputs() -> None:
    """One FFN and one query of BART, run by hand (Mao et al. 2022, section 3): the adapter's gate reads h, LoRA's x."""
    model = build("bart", **dropout("bart"))
    attach(model, PRESETS["unipelt"])
    shake(model)
    seen: dict[str, Tensor] = {}
    layer = model.model.encoder.layers[0]

    def keep(name: str) -> object:
        return lambda module, args, output: seen.update({name: output, f"{name} input": args[0]})

    for name, place in (("query", layer.self_attn.q_proj), ("ffn", layer.fc2.sublayer_dropout)):
        place.register_forward_hook(keep(name))
    with torch.no_grad():
        model(**batch("bart"))
        lora, x = layer.self_attn.q_proj.lora, seen["query input"]
        assert isinstance(lora, Edit)
        gate = torch.sigmoid(x @ lora.composition.weight[0, :, 0] + lora.composition.bias[0, 0])
        delta = x @ lora.function.down[0].T @ lora.function.up[0].T
        plain = torch.nn.functional.linear(x, layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias)
        assert torch.allclose(seen["query"], plain + gate[..., None] * delta, atol=1e-5)

        adapter, h = layer.fc2.sublayer_dropout.modification, seen["ffn input"]
        gate = torch.sigmoid(h @ adapter.composition.weight[0, :, 0] + adapter.composition.bias[0, 0])
        z = torch.relu(h @ adapter.function.down[0].T + adapter.function.down_bias[0, 0])
        delta = z @ adapter.function.up[0].T + adapter.function.up_bias[0, 0]
        assert torch.allclose(seen["ffn"], h + gate[..., None] * delta, atol=1e-5)
        assert float(delta.abs().max()) > 0.1


@pytest.mark.parametrize("family", ["bart", "mbart", "t5", "llama"])
def test_a_constant_beside_the_values_is_one_beside_the_heads(family: str) -> None:
    """Attention's weights sum to 1: l added to every value is l added to every head's output."""
    vector = numbers(24, seed=7)
    heads = {"num_key_value_heads": 4} if family == "llama" else {}  # as many keys and values as queries
    made = []
    for representation in ("value", "heads_joint"):
        model = build(family, **heads)
        attach(model, {"": modification("constant", representation, "sequential", "add")})
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Edit):
                    module.function.vector.copy_(vector[: module.function.out_width])
            made.append(model.eval()(**batch(family)).logits)
    assert torch.allclose(made[0], made[1], atol=1e-4)
    assert not torch.allclose(made[0], build(family, **heads)(**batch(family)).logits, atol=1e-2)
