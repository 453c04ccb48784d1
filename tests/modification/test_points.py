"""Every point of the four axes that runs, on every family: built on a tiny random model, it takes two training steps.

By default each point is taken by one family, the families in turn; all of them by all with `-m slow`.
"""

from __future__ import annotations

import pytest
import torch

from peftbench.config.axes import points as all_points
from peftbench.config.axes import runs
from peftbench.modification.attach import attach
from tests.families import DECODERS, FAMILIES, MORE_FAMILIES, batch, build, points, shake

POINTS = dict(points("constant", "identity", "relu", "softmax", init="bert"))
ALL_FAMILIES = (*FAMILIES, *MORE_FAMILIES)
BUILT = {  # whether the default run takes the pair
    (family, point): (turn + index) % len(ALL_FAMILIES) == 0 or "embedding" in point
    for turn, family in enumerate(ALL_FAMILIES)
    for index, point in enumerate(POINTS)
    if not ("embedding" in point and family in DECODERS)  # refused: test_families.py
}


def test_these_are_the_points_that_run() -> None:
    """Counted by hand: of 3 forms, 14 representations without the embedding, 2 insertions and 5 compositions those with
    gated and sequential mean nothing, nor layer with parallel or multiply. A constant is sequential only, and adds
    nothing to keys. The embedding has one point, the prompt."""
    assert set(POINTS) == {"-".join(point) for point in all_points() if runs(point)}
    assert len(POINTS) == 3 * (14 * 2 * 5 - 14 - 5 - 1) + (14 * 4 - 1 - 2 * 2) + 1


def test_each_point_and_each_family_has_its_turn() -> None:
    default = [pair for pair, taken in BUILT.items() if taken]
    assert {point for _, point in default} == set(POINTS)
    assert {family for family, _ in default} == set(ALL_FAMILIES)


@pytest.mark.parametrize(
    ("family", "point"),
    [
        pytest.param(*pair, id="-".join(pair), marks=() if default else pytest.mark.slow)
        for pair, default in BUILT.items()
    ],
)
def test_every_point_trains(family: str, point: str) -> None:
    """It has an effect; every trained tensor has a gradient at each step and moves, and nothing else does."""
    model = build(family)
    attach(model, {"": POINTS[point]})
    shake(model)
    bare = build(family)
    bare.load_state_dict(model.state_dict(), strict=False)
    inputs = batch(family)
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, bare(**inputs).logits, atol=1e-4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        model(**inputs).loss.backward()
        assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
        optimiser.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained.keys()
