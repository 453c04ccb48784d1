"""docs/methods.md has each preset of conf/method with the axes that it composes to, and each preset says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.config.compose import compose_run
from peftbench.config.peft_methods import read_point
from peftbench.config.schema import find_conf_dir, list_modifications

METHODS = sorted(path.stem for path in (find_conf_dir() / "method").glob("*.yaml"))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def documented() -> dict[str, list[tuple[str, ...]]]:
    """Preset: (prefix of the keys, the four axes) of each of its rows."""
    found: dict[str, list[tuple[str, ...]]] = {}
    preset = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or cells[0] == "preset":
            continue
        name, axes = cells[0].lstrip("+ ").strip("`"), tuple(cells[1:5])
        if cells[0].startswith("+"):
            found[preset].append((f"{name}.", *axes))
        else:
            preset = name
            found[preset] = [] if set(axes) == {"–"} else [("", *axes)]
    return found


def test_the_page_names_every_preset() -> None:
    assert sorted(documented()) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_page_has_the_axes_of_the_preset(method: str) -> None:
    if method == "peft":  # names no method by itself
        assert documented()[method] == []
        return
    run = compose_run([f"method={method}", "task=sst2"])
    if run.peft:
        form, representation, insertion, composition, *_ = read_point(run)
        assert documented()[method] == [("", form, representation, insertion or "–", composition or "–")]
        return
    assert documented()[method] == [
        (
            prefix,
            m.functional_form.name,
            m.modified_representation.name.name,
            m.insertion_form.name.name,
            m.composition_function.name.name,
        )
        for prefix, m in list_modifications(run).items()
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_opens_with_what_it_is(method: str) -> None:
    first, second, *_ = (find_conf_dir() / "method" / f"{method}.yaml").read_text(encoding="utf-8").splitlines()
    assert first == "# @package _global_" and second.startswith("# ")
