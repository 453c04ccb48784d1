"""`peftbench advise`: its claims, recomputed by hand from the records that came with peftbench."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, variance

import pytest
from scipy.stats import t as student

from peftbench.cli.main import main
from peftbench.tables.advice import Advice, correct_by_holm, find_reference, list_next_commands
from peftbench.tables.row import Row
from tests.tables.test_table import record

REFERENCE = Path(__file__).resolve().parents[2] / "outputs" / "reference"
GRID = str(REFERENCE / "grid_sst2")


def advised(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[dict[str, object]]]:
    assert main(["advise", *words, "--json"]) == 0
    found: dict[str, list[dict[str, object]]] = json.loads(capsys.readouterr().out)
    return found


def read_points() -> dict[str, list[dict[str, float]]]:
    """The runs of the grid by their setting, read without peftbench."""
    points: dict[str, list[dict[str, float]]] = {}
    for file in Path(GRID).rglob("record.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        stored, memory = record["counts"]["stored"], record["peak_memory_bytes"] / 2**30
        numbers = {"score": record["score"], "stored": stored, "memory": memory, "time": record["timings"]["total_s"]}
        points.setdefault(record["point"], []).append(numbers)
    return points


def test_fronts_are_those_that_no_setting_beats(capsys: pytest.CaptureFixture[str]) -> None:
    means = [{key: fmean(run[key] for run in runs) for key in runs[0]} for runs in read_points().values()]
    rows = advised(capsys, GRID)["rows"]
    assert len(rows) == len(means) == 20
    for cost in ("stored", "memory", "time"):
        beaten = {
            (one["score"], one[cost])
            for one in means
            for other in means
            if other["score"] >= one["score"]
            and other[cost] <= one[cost]
            and (other["score"], other[cost]) != (one["score"], one[cost])
        }
        expected = sorted(one["score"] for one in means if (one["score"], one[cost]) not in beaten)
        said = sorted(float(str(row["score"])) for row in rows if cost in str(row["front"]))
        assert said == pytest.approx(expected), cost


def test_a_lead_is_welchs_test_over_the_seeds_with_holms_correction(capsys: pytest.CaptureFixture[str]) -> None:
    points = {(runs[0]["stored"], fmean(run["score"] for run in runs)): runs for runs in read_points().values()}
    best = [run["score"] for run in points[max(points, key=lambda key: key[1])]]
    found = advised(capsys, GRID)["contrasts"]
    raw = []
    for contrast in found:
        key = min(
            points,
            key=lambda one: abs(one[0] - float(str(contrast["stored"]))) + abs(one[1] - float(str(contrast["score"]))),
        )
        other = [run["score"] for run in points[key]]
        one, two = (variance(side) / len(side) for side in (best, other))
        t = (fmean(best) - fmean(other)) / (one + two) ** 0.5
        freedom = (one + two) ** 2 / (one**2 / (len(best) - 1) + two**2 / (len(other) - 1))
        raw.append(2 * student.sf(abs(t), freedom))
        assert contrast["difference"] == pytest.approx(fmean(best) - fmean(other))
    order = sorted(range(len(raw)), key=lambda index: raw[index])
    expected, largest = [0.0] * len(raw), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, raw[index] * (len(raw) - rank)))
        expected[index] = largest
    assert len(found) > 3
    assert [one["p"] for one in found] == pytest.approx(expected)


def test_holm_by_hand() -> None:
    assert correct_by_holm([0.04, 0.01, 0.5]) == pytest.approx([0.08, 0.03, 0.5])
    assert correct_by_holm([0.6, 0.7]) == [1.0, 1.0]


def test_limits_leave_out_what_is_above_them(capsys: pytest.CaptureFixture[str]) -> None:
    rows = advised(capsys, GRID, "budget=5%", "memory=0.35")["rows"]
    assert rows and all(float(str(row["percent"])) <= 5 and float(str(row["memory"])) <= 0.35 for row in rows)
    points = [{key: fmean(run[key] for run in runs) for key in runs[0]} for runs in read_points().values()]
    assert len(rows) == sum(p["stored"] <= 0.05 * 22_713_216 and p["memory"] <= 0.35 for p in points)


def test_one_screen_then_the_lines_to_type(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["advise", "task=sst2", "model=minilm-l6", GRID]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    commands = [line.strip() for line in lines[lines.index("Next:") + 1 :]]
    assert len(commands) == 3 and all(line.startswith("peftbench train -m ") for line in commands)
    assert "row=full" in commands[0] and commands[0].endswith("seed=2")
    assert "method=ia3," in commands[-1] and "search=lr3" in commands[-1]
    assert any("Not tried here: ia3, layernorm_tuning" in line for line in lines)


def test_more_seeds_of_what_a_search_chose_are_no_trials_of_it() -> None:
    typed = ["method=lora", "search=lr3", "search.extend=1", "seed=42", "output_dir=x"]
    chosen = record(80.0, seed=42, overrides=[*typed, "search.seed=42", "search.further=[0.1]", "search.trial=3"])
    advice = Advice([], {}, [], 0, 0, untried=[], thin=[Row((chosen,))])
    (line,) = list_next_commands(advice, None)
    assert line == "peftbench train -m method=lora search=lr3 search.extend=1 output_dir=x seed=1,2"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["task=sst3"], "No record, no claim: task=sst3 is unknown; did you mean sst2?"),
        (["task=sst2", "model=roberta_base"], "No record, no claim: model=roberta_base is unknown"),
        (["task=sst2", "budget=0.01%"], "None of 20 recorded settings is within budget=0.01%: nothing can be claimed."),
        (["memory=much"], "memory=much: it must be a number of GiB above 0, such as memory=16."),
        (["method=lora"], "key=method is unknown"),
    ],
)
def test_no_record_no_claim(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", GRID, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_records_that_came_with_peftbench_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_reference() == REFERENCE
    monkeypatch.chdir(tmp_path)
    assert main(["advise"]) == 2
    assert "The records are of several choices of task; give one: mnli, sst2, webnlg" in capsys.readouterr().err
