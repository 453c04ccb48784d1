"""Every point of the four axes that runs, built on tiny random models of all families: it takes two training steps.

Δh is computed from vectors of some width, whatever the family: the form and the composition never see where those lie.
The family decides the places, their widths and what f reads there. So not every point is taken by every family:

- by default each point by one family, the families in turn;
- with `-m slow` each family takes every composition at every place, with the forms in turn; a family that is laid out
  as another one (`ALIKE`, or nearly so: `NEAR`) takes every place once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from peftbench.config.axes import is_allowed
from peftbench.config.axes import list_points as all_points
from peftbench.modification.attach import attach
from tests.families import ALIKE, FAMILIES, MORE_FAMILIES, NEAR, PLACES, PRESETS, batch, build, points, shake

POINTS = dict(points("constant", "identity", "relu", "softmax", init="bert"))
ALL_FAMILIES = (*FAMILIES, *MORE_FAMILIES)


def axes(point: str) -> tuple[str, str, str, str]:
    """Form, representation, insertion, composition."""
    form, representation, insertion, composition = point.split("-")
    return form, representation, insertion, composition


def place(point: str) -> tuple[str, ...]:
    """The representation and the insertion form: all that a family has a say in."""
    return axes(point)[1:3]


def grouped(of: Iterable[str], key: Callable[[str], Any]) -> list[tuple[Any, list[str]]]:
    return [(value, list(found)) for value, found in itertools.groupby(sorted(of, key=key), key)]


def taken_with_slow(turn: int, family: str) -> Iterator[str]:
    """One point for each place, and for each composition there unless the family is like another one."""
    for index, (_, points_of_place) in enumerate(grouped(POINTS, place)):
        if family in ALIKE | NEAR:
            yield points_of_place[(turn + index) % len(points_of_place)]
            continue
        for number, (_, same) in enumerate(grouped(points_of_place, lambda point: axes(point)[3])):
            yield same[(turn + index // 2 + number) % len(same)]  # a representation's two places take the same turn


DEFAULT = {
    (ALL_FAMILIES[-index % len(ALL_FAMILIES)], point) for index, point in enumerate(POINTS) if "embedding" not in point
} | {(family, point) for family in ALL_FAMILIES for point in POINTS if "embedding" in point}
SLOW = {(family, point) for turn, family in enumerate(ALL_FAMILIES) for point in taken_with_slow(turn, family)}
BUILT = {  # whether the default run takes the pair
    (family, point): (family, point) in DEFAULT
    for family in ALL_FAMILIES
    for point in POINTS
    if (family, point) in DEFAULT | SLOW
}


def test_these_are_the_points_that_run() -> None:
    """Counted by hand: of 3 forms, 15 representations without the embedding, 2 insertions and 5 compositions those with
    gated and sequential mean nothing, nor layer with parallel or multiply. A constant is sequential only, and adds
    nothing to keys. The embedding has one point, the prompt."""
    assert set(POINTS) == {"-".join(point) for point in all_points() if is_allowed(point)}
    assert len(POINTS) == 3 * (15 * 2 * 5 - 15 - 5 - 1) + (15 * 4 - 1 - 3 * 2) + 1


def test_each_point_and_each_family_has_its_turn() -> None:
    default = [pair for pair, taken in BUILT.items() if taken]
    assert {point for _, point in default} == set(POINTS)
    assert {family for family, _ in default} == set(ALL_FAMILIES)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_each_family_takes_every_place(family: str) -> None:
    """And there every composition, and each of these with every form, unless it is laid out as another family."""
    taken = [point for point in POINTS if (family, point) in BUILT]
    assert set(map(place, taken)) == set(map(place, POINTS))
    if family not in ALIKE | NEAR:
        for some in ((1, 2, 3), (0, 2), (0, 3)):
            found, wanted = ({tuple(axes(point)[i] for i in some) for point in these} for these in (taken, POINTS))
            assert found == wanted, some


def test_families_that_are_alike_meet_every_place_of_the_presets() -> None:
    def places(presets: Iterable[str]) -> set[tuple[str, str, str]]:
        chosen = [(m, m.modified_representation) for preset in presets for m in PRESETS[preset].values()]
        return {(r.name.name, r.head_input.name, m.insertion_form.name.name) for m, r in chosen}

    assert places(PLACES) == places(PRESETS)


@pytest.mark.parametrize(
    ("family", "point"),
    [
        pytest.param(*pair, id="-".join(pair), marks=() if default else pytest.mark.slow)
        for pair, default in BUILT.items()
    ],
)
def test_every_point_trains(family: str, point: str) -> None:
    """It has an effect; every trained tensor has a gradient at each step and moves, and nothing else does."""
    model, inputs = build(family), batch(family)
    with torch.no_grad():
        bare = model(**inputs).logits
        attach(model, {"": POINTS[point]})
        shake(model.base_model)  # and not the task head, which would have an effect by itself
        assert not torch.allclose(model(**inputs).logits, bare, atol=1e-4)
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
