"""docs/reproduction.md shows what `peftbench claims` prints; the records behind it are small."""

from __future__ import annotations

import importlib
import json
import statistics
from collections import Counter
from pathlib import Path

import pytest

from peftbench.cli.claims import main as claims
from peftbench.records.record import Record, load_records
from peftbench.tables.claims import judge_records, read_claims
from peftbench.tables.row import group_seeds, is_trial
from tests.tables.test_searches import make_all

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "outputs" / "reference" / "reproduction"
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


def test_the_prose_on_sst2_says_what_the_records_say() -> None:
    """Its numbers, in their order. The tables beside it are compared with the records above."""
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    prose = " ".join(page.split("SST-2 with MiniLM is the first")[1].split("RTE with MiniLM")[0].split())
    records = [one for one in load_records(FOLDER / "sst2")[0]]
    rows = group_seeds([one for one in records if not is_trial(one)], "mean")
    trials = len(records) - sum(len(row.scored) for row in rows)
    assert f"{len(rows)} rows, {len(records) - trials} runs and {trials} further trials of 3,600 steps each" in prose
    assert {one.steps for one in records} == {3600}

    (cell,) = (one for one in judge_records(records, 2000) if one.findings)
    pairs = {one.claim.name: one.comparisons for one in cell.findings}
    behind = {
        name: [-estimate.difference for one, estimate in pairs["heads"] if one.pair[0] == name]
        for name in ("prefix", "mh_pa")
    }
    assert f"prefix tuning is {min(behind['prefix']):.1f} to {max(behind['prefix']):.1f} points behind" in prose
    assert f"between {max(behind['mh_pa']):.1f} points behind and {-min(behind['mh_pa']):.1f} ahead" in prose
    widths = [one.high - one.low for name in ("insertion", "ffn", "scaling") for _, one in pairs[name]]
    assert f"the interval of one pair is about {statistics.median(widths) / 2:.1f} points to either side" in prose

    full = max(row.score for row in rows if row.first.method == "full")
    scores = [row.score for row in rows if row.first.budget == "2%"]
    near = sum(score > full - 1.5 for score in scores)
    assert f"of {len(scores)} rows that store 2%, {near} are within 1.5 points of full" in prose
    assert f"full fine-tuning ({full:.2f})" in prose
    best = max((row for row in rows if row.first.budget == "2%"), key=lambda row: row.score)
    assert best.first.axes[0].scale == 1 and f"the parallel adapter with a learned scale ({best.score:.2f})" in prose

    (unstable,) = (row for row in rows if row.first.method == "prefix" and row.first.budget == "6.7%")
    collapsed = ", ".join(f"{score:.1f}" for score in sorted((one.score for one in unstable.scored), reverse=True))
    assert f"at 6.7%**: {collapsed.rpartition(', ')[0]} and {collapsed.rpartition(', ')[2]} with one rate" in prose

    places = Counter(_place_rate(row.first) for row in rows)
    assert (
        f"{places[2]} keep their preset's rate, {places[3]} take three times as much, {places[4]} the highest" in prose
    )
    assert f"{places[1]} less than the preset's, and none the lowest. The {places[4]} are" in prose and not places[0]


def test_the_readme_says_what_the_tuned_runs_say() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (cell,) = (one for one in judge_records(load_records(FOLDER / "sst2")[0], 2000) if one.findings)
    verdicts = Counter(finding.verdict for finding in cell.findings)
    runs = sum(len(row.scored) for row in cell.rows)
    assert verdicts["confirmed"] == 0 and verdicts["contradicted"] == 1 and verdicts["not tested"] == 0
    assert f"{runs} runs confirm no claim and contradict one]" in readme


def _place_rate(record: Record) -> int:
    """Return the place of the chosen learning rate among the five: 2 is the preset's."""
    assert record.search is not None
    rates = sorted(record.search.keys["trainer.learning_rate"])
    return rates.index(record.search.chosen["trainer.learning_rate"])


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
