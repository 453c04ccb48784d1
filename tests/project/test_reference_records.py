"""The records in outputs/reference are whole, every command reads them, and README.md and docs print what they say."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest

from peftbench.cli import compare, plot, report, results
from peftbench.records.choice import compute_objective
from peftbench.records.record import FILE, load_records
from peftbench.tables import examples
from peftbench.tables.row import Row, group_seeds, is_trial, split_tables
from peftbench.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "outputs" / "reference"
RUNS = {
    **{"grid": 40, "text": 45, "text_long": 10, "grid_sst2": 40, "curves": 9, "peft": 100},
    **{"reproduction": 1567, "by_category": 34},
}
OF_SCRIPT = ("reproduction", "by_category")  # made by scripts/reproduction.sh


@pytest.mark.parametrize("part", RUNS)
def test_every_record_is_whole(part: str) -> None:
    records, left_out = load_records(REFERENCE / part)
    assert left_out == [] and len(records) == RUNS[part]
    chosen_from = {trial.run for one in records if one.search and not is_trial(one) for trial in one.search.trials}
    best: dict[str | None, float] = {}  # of the trials of each study, of which the chosen one is a run in the end
    for one in records:
        if one.search is not None and one.study is not None and one.seed == one.search.seed:
            best[one.study] = max(best.get(one.study, -math.inf), compute_objective(one.compared))
    for record in records:
        of_study = record.search is not None and record.search.study is not None
        is_best = of_study and compute_objective(record.compared) == best[record.study]  # so far
        beaten = is_trial(record) and (record.run in chosen_from or (of_study and not is_best))
        pruned = record.search is not None and record.search.pruned
        # "interrupted" is also a trial that was chosen and whose report split was being scored.
        assert record.status == "done" or record.unreported or (pruned and of_study and record.status == "interrupted")
        assert record.folder.name == record.run
        numbers = [value for score in record.scores.values() for value in score.metrics.values()]
        assert record.score in numbers if record.status == "done" else "report" not in record.scores
        assert all(map(math.isfinite, numbers)) and bool(numbers) != pruned
        kept = {FILE} if part in OF_SCRIPT and beaten else {FILE, "config.yaml", "metrics.jsonl"}
        has_examples = part in ("peft", *OF_SCRIPT) and record.status == "done" and not beaten
        assert {file.name for file in record.folder.iterdir()} == kept | ({examples.FILE} if has_examples else set())
        told = [line for name in kept for line in (record.folder / name).read_text(encoding="utf-8").splitlines()]
        assert not [line for line in told if any(root in line for root in ("/tmp", "/home", "/root", "/work"))]


def test_the_readme_counts_the_runs() -> None:
    text = (REFERENCE / "README.md").read_text(encoding="utf-8")
    runs, trials = Counter[str](), Counter[str]()
    for part in RUNS:
        for record in load_records(REFERENCE / part)[0]:
            cell = f"{record.model.name}/{record.task.replace('mnli', 'nli')}" if part == "reproduction" else part
            (trials if is_trial(record) else runs)[cell] += 1
    assert f"Records of {runs.total()} runs, and of {trials.total():,} trials that were not chosen," in " ".join(
        text.split()
    )
    listed = {
        cell: (int(done), int(tried)) for cell, done, tried in re.findall(r"`(.+/.+)` \| (\d+) \| (\d+) \|", text)
    }
    assert listed == {cell: (runs[cell], trials[cell]) for cell in {*runs, *trials} if "/" in cell}


def _table(file: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of a Markdown file, without its header."""
    text = file.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rule = next(index for index, cells in enumerate(lines) if set("".join(cells)) <= {"-", ":"})
    width = len(lines[rule])
    return [cells for cells in lines[rule + 1 :] if len(cells) == width]


def _grid() -> list[Row]:
    rows = group_seeds(load_records(REFERENCE / "grid")[0], "mean")
    assert len(split_tables(rows)) == 1
    assert all([record.seed for record in row.scored] == [1, 42] for row in rows)
    return rows


def _percent(row: Row) -> float:
    assert row.first.counts is not None
    return row.first.counts.percent["stored"]


def test_the_verdicts_on_the_grid_are_those_of_its_tables() -> None:
    """The first table is compared with the records below; the intervals are of predictions that were not kept."""
    heading = "The rows of tables 3, 5, 6 and 12 on WebNLG"
    means = {cells[1]: float(cells[6]) for cells in _table(ROOT / "docs" / "results.md", heading) if len(cells) == 9}
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    compared = [line.strip("| ").split(" | ") for line in text.splitlines() if re.search(r"\| -?\d.* to ", line)]
    known = set()
    for one, other, mean, other_mean, difference, interval, _ in compared:
        names = [next(name for name in means if re.match(rf"{name}\b", label)) for label in (one, other)]
        assert [float(mean), float(other_mean)] == [means[name] for name in names]
        assert float(difference) == pytest.approx(means[names[0]] - means[names[1]], abs=0.011)
        ends = [float(end) for end in (difference, *interval.split(" to "))]
        known.update({tuple(ends), tuple(-end for end in (ends[0], ends[2], ends[1]))})
    verdicts = text.split("What this says about the paper's claims")[1]
    printed = re.findall(r"(-?\d+\.\d) \((-?\d+\.\d) to\s+(-?\d+\.\d)\)", verdicts)
    assert len(compared) == 20 and len(printed) == 7
    for numbers in printed:
        assert any(list(map(float, numbers)) == pytest.approx(ends, abs=0.051) for ends in known), numbers


def test_the_full_table_says_what_the_records_say() -> None:
    known = set()
    for row in _grid():
        one, other = row.scored
        known.add((f"{_percent(row):.2f}", f"{other.score:.2f}", f"{one.score:.2f}", f"{row.score:.2f}"))
    table = _table(ROOT / "docs" / "results.md", "The rows of tables 3, 5, 6 and 12 on WebNLG")
    printed = {(cells[0], cells[4], cells[5], cells[6]) for cells in table if len(cells) == 9}
    assert printed == known and len(known) == 20


def test_the_table_of_pefts_methods_says_what_the_records_say(capsys: pytest.CaptureFixture[str]) -> None:
    printed = {}
    for cells in _table(ROOT / "docs" / "results.md", "Ten methods of peft"):
        method, by, _, stored, percent, accuracy, rate, difference, interval = cells
        printed[method] = (by, stored, percent, accuracy, rate, difference, interval)
    rows = group_seeds([one for one in load_records(REFERENCE / "peft")[0] if not is_trial(one)], "mean")
    assert len(rows) == 20 and sum("peft" in row.first.versions for row in rows) == 10
    for row in rows:
        scores = [record.score for record in row.scored]
        tuned = row.first.search
        assert tuned is not None
        rates = sorted((trial.value, trial.settings["trainer.learning_rate"]) for trial in tuned.trials)
        best, tried = rates[-1][1], [rate for _, rate in rates]
        edge = {min(tried): " (lowest)", max(tried): " (highest)"}.get(best, "")
        assert row.first.counts is not None and [record.seed for record in row.scored] == [1, 2, 42]
        assert printed[row.first.method][:5] == (
            "peft" if "peft" in row.first.versions else "peftbench",
            f"{row.first.counts.stored:,}",
            f"{_percent(row):.2f}",
            f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}",
            f"{best:g}{edge}",
        )
    assert compare.main(["method=lora", "method=adalora", "--folder", str(REFERENCE / "peft")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy"))
    assert " ".join(printed["adalora"][5:]) in " ".join(line.split())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trials=true", "--show", "method,score,searched"],
        ["--paper", "--csv"],
        ["method=mam,lora", "--mean"],
        [
            "task=webnlg",
            "model=bart-mini",
            "examples=1862",
            "--rows",
            "method,scale,modified_representation,trainer.epochs,trainer.max_steps,trainer.evaluate_every,learning_rate",
            "--columns",
            "budget",
        ],
    ],
)
def test_tables(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(REFERENCE), *words]) == 0
    assert "mam" in capsys.readouterr().out


def test_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, page = tmp_path / "scores.svg", tmp_path / "runs.html"
    assert plot.main([str(REFERENCE), "--out", str(picture)]) == 0
    assert "adapter · ffn" in picture.read_text(encoding="utf-8")
    assert report.main([str(REFERENCE), "--out", str(page)]) == 0
    assert "2f14f260" in page.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"predictions\.jsonl is missing"):  # they are not kept
        compare.main(["method=mam", "method=full", "--folder", str(REFERENCE / "grid")])
