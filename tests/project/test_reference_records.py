"""The records in outputs/reference are whole, are read by every command, and say what README.md prints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from peftbench.cli import compare, plot, report
from peftbench.cli import results as command
from peftbench.records.record import FILE, load_records
from peftbench.tables.row import over_seeds, tables
from peftbench.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "outputs" / "reference"
RUNS = {"grid": 40, "text": 45, "text_long": 10, "grid_sst2": 40, "curves": 9}


@pytest.mark.parametrize("part", RUNS)
def test_every_record_is_whole(part: str) -> None:
    records, left_out = load_records(REFERENCE / part)
    assert left_out == [] and len(records) == RUNS[part]
    for record in records:
        assert record.status == "done" and record.folder.name == record.run
        numbers = [value for score in record.scores.values() for value in score.metrics.values()]
        assert record.score in numbers and all(map(math.isfinite, numbers))
        assert {file.name for file in record.folder.iterdir()} == {FILE, "config.yaml", "metrics.jsonl"}
        told = [line for file in record.folder.iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
        assert not [line for line in told if any(root in line for root in ("/tmp", "/home", "/root", "/work"))]


def test_the_readme_prints_what_the_records_say() -> None:
    rows = over_seeds(load_records(REFERENCE / "grid")[0], "mean")
    assert len(tables(rows)) == 1
    found = set()
    for row in rows:
        one, other = row.scored
        assert (one.seed, other.seed) == (1, 42)
        found.add((f"{other.score:.2f}, {one.score:.2f}", f"{row.score:.2f}"))
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What it found")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert {(cells[3], cells[4]) for cells in lines[2:]} == found


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trials=true", "--show", "method,score,searched"],
        ["--paper", "--csv"],
        ["method=mam,lora", "--mean"],
        [
            "task=webnlg",
            "examples=1862",
            "--rows",
            "method,scale,modified_representation,trainer.epochs,learning_rate",
            "--columns",
            "budget",
        ],
    ],
)
def test_tables(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(REFERENCE), *words]) == 0
    assert "mam" in capsys.readouterr().out


def test_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, page = tmp_path / "scores.svg", tmp_path / "runs.html"
    assert plot.main([str(REFERENCE), "--out", str(picture)]) == 0
    assert "adapter · ffn" in picture.read_text(encoding="utf-8")
    assert report.main([str(REFERENCE), "--out", str(page)]) == 0
    assert "2f14f260" in page.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"predictions\.jsonl is missing"):  # they are not kept
        compare.main(["method=mam", "method=full", "--folder", str(REFERENCE / "grid")])
