"""docs/reproduction.md shows what `peftbench claims` prints; the records behind it are small."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from peftbench.cli.claims import main as claims
from peftbench.tables.claims import read_claims
from tests.tables.test_searches import make_all

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 25_000_000


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/claims_page.py` brings it up to date."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("claims_page")
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.write_page(page)
    with pytest.raises(ValueError, match="lacks the line"):
        script.write_page(page.replace(script.END, ""))


def test_a_search_that_was_not_run_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("claims_page")
    task, model, budget = script.PLANNED[1]
    make_all(tmp_path, [80, 81], [60, 61], [70, 71])
    for file in tmp_path.rglob("record.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        record |= {"task": task, "model": {**record["model"], "name": model}, "budget": budget}
        file.write_text(json.dumps(record), encoding="utf-8")
    told = script.write_searches(tmp_path)
    assert told.count("not run yet") == 3 and f"### {task} with {model} under budget={budget}: 2 trials" in told
    assert f"- {task} with {model} under budget={budget}: not run yet." not in told
    for file in tmp_path.rglob("record.json"):
        file.write_text(file.read_text(encoding="utf-8").replace('"study": "77aa"', '"study": null'), encoding="utf-8")
    assert script.write_searches(tmp_path).count("not run yet") == 4


def test_the_page_has_each_claim_as_the_data_has_it() -> None:
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    for claim in read_claims()[0]:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {claim.says} ("))
        assert claim.source.partition(" and")[0].partition(",")[0] in line and line.endswith(f"| {claim.claimed} |")


def test_the_records_are_small() -> None:
    sizes = [file.stat().st_size for file in (ROOT / "outputs" / "reference").rglob("*") if file.is_file()]
    assert sum(sizes) < MOST_BYTES
    assert not list((ROOT / "outputs" / "reference").rglob("predictions*"))


def test_the_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert claims([str(ROOT / "outputs" / "reference"), "--each"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert any(line.startswith("Parallel beats") and line.endswith("confirmed") for line in map(str.rstrip, lines))
