"""docs/paper_counts.md: every row of the paper's tables is equal to ours or says why not; the file is up to date."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from peftbench.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("paper_counts")


@pytest.mark.slow
def test_every_row_is_equal_or_has_a_reason(script: ModuleType) -> None:
    rows = {(table.number, row.label): script.verdict(table, row) for table in script.TABLES for row in table.rows}
    assert {number for number, _ in rows} == {2, 3, 4, 5, 6, 12}
    differing = {key for key, verdict in rows.items() if not verdict.startswith("equal")}
    # The percentages that the paper took of another backbone or got wrong: all of table 4, and LoRA in table 6.
    assert differing == {key for key in rows if key[0] == 4} | {(6, "LoRA (ffn), r=102")}
    assert all(rows.values())


def test_a_wrong_percentage_needs_a_reason_and_a_right_one_has_none(script: ModuleType) -> None:
    table = script.TABLES[0]
    for row in (script.Row("LoRA", "method=lora", "0.6"), script.Row("LoRA", "method=lora", "0.5", "no reason")):
        with pytest.raises(ValueError, match=r"table 2, LoRA: ours is 0\.4755%"):
            script.verdict(table, row)


@pytest.mark.slow
def test_the_file_is_what_the_script_prints(script: ModuleType) -> None:
    assert script.document() == (ROOT / "docs" / "paper_counts.md").read_text(encoding="utf-8")


def test_the_counts_are_those_of_peftbench_params(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = "method=pa_attention_pa_ffn bottleneck=512 mix.attention.bottleneck=30"
    assert main(["params", "task=xsum", "model=mbart_large", *overrides.split(), "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    counts = script.counted("xsum", "mbart_large", overrides)
    assert [printed[name] for name in ("backbone", "trained", "stored", "paper", "head")] == [
        counts.backbone,
        counts.trained,
        counts.stored,
        counts.paper,
        counts.head,
    ]
