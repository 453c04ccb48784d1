"""The space of the four axes: which points run, what is said of the others, and `peftbench ls`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftbench.cli.main import main
from peftbench.config import schema
from peftbench.config.axes import (
    CHOICES,
    Point,
    build_modification,
    find_nearest,
    find_refusals,
    is_allowed,
    list_points,
    read_axes,
)
from peftbench.config.notation import describe_choice


def distance(a: Point, b: Point) -> int:
    return sum(old != new for old, new in zip(a, b, strict=True))


def test_choices_are_those_of_the_schema() -> None:
    enums = (schema.Representation, schema.Insertion, schema.Composition)
    assert [set(CHOICES[axis]) for axis in Point._fields[1:]] == [
        {choice.name for choice in enum} - {"none"} for enum in enums
    ]
    assert set(CHOICES["functional_form"]) | set(schema.ACTIVATIONS) == set(schema.FUNCTIONAL_FORMS) - {"none"}
    assert len(list(list_points())) == 4 * 16 * 2 * 5


def test_rules_see_no_difference_between_activations() -> None:
    """So that relu can stand for all."""
    for point in list_points():
        if point.functional_form == "relu":
            assert {is_allowed(point._replace(functional_form=name)) for name in schema.ACTIVATIONS} == {
                is_allowed(point)
            }


def test_what_runs_is_not_refused_and_what_does_not_is() -> None:
    for point in list_points("gelu"):
        assert read_axes(build_modification(point)) == point
        assert (list(find_refusals("", build_modification(point))) == []) is is_allowed(point)


def test_every_refusal_names_the_nearest_point_that_runs() -> None:
    """No point that runs is nearer, and typing what the sentence says leads to it."""
    running = [point for point in list_points("gelu") if is_allowed(point)]
    for point in list_points("gelu"):
        found = find_nearest(point)
        assert is_allowed(found)
        assert distance(point, found) == min(distance(point, other) for other in running)
        if is_allowed(point):
            assert found == point
            continue
        for sentence in find_refusals("mix.second.", build_modification(point)):
            overrides = sentence.partition("The nearest point that runs: ")[2].removesuffix(".").split()
            changes = dict(override.removeprefix("mix.second.").split("=") for override in overrides)
            assert changes and point._replace(**changes) == found, sentence


def test_the_nearest_point_keeps_form_and_representation_where_it_can() -> None:
    assert find_nearest(Point("relu", "ffn", "sequential", "gated")) == Point("relu", "ffn", "parallel", "gated")
    assert find_nearest(Point("relu", "layer", "parallel", "add")) == Point("relu", "layer", "sequential", "add")
    assert find_nearest(Point("constant", "key", "sequential", "add")) == Point(
        "constant", "key", "sequential", "multiply"
    )


def test_a_faulty_option_has_no_nearest_point() -> None:
    m = build_modification(Point("relu", "ffn", "parallel", "add"))
    m.bottleneck = -3
    assert list(find_refusals("", m)) == ["bottleneck=-3: the bottleneck must be a whole number of at least 1."]


def test_ls_axes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["ls", "axes"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    lines = [line.split() for line in printed.splitlines()]
    assert ["layer", "irsc", "irsc", "·", "·", "irsc"] in lines
    assert ["embedding", "·", "·", "·", "s", "·"] in lines
    assert all(describe_choice(axis, choice) for axis, choices in CHOICES.items() for choice in choices)
    assert main(["ls", "axes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [Point(**{key: entry[key] for key in Point._fields}) for entry in listed if entry["runs"]] == [
        point for point in list_points() if is_allowed(point)
    ]


def test_ls_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    everything = capsys.readouterr().out
    for folder in (
        path for path in Path(schema.find_conf_dir()).iterdir() if path.is_dir() and list(path.glob("*.yaml"))
    ):
        assert main(["ls", folder.name]) == 0
        printed = capsys.readouterr().out
        assert folder.name in everything
        assert all(option.stem in printed for option in folder.glob("*.yaml"))
    assert main(["ls", "experiment"]) == 0
    assert "paper/table5" in capsys.readouterr().out
    assert main(["ls", "metod"]) == 2
    assert "did you mean method?" in capsys.readouterr().err
