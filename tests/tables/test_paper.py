"""The paper's scores beside ours: only where the run is a row of the paper's, and the difference only where it may be.

The records are made by hand; the scores are those of the paper's tables, typed here again.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from peftbench.cli.report import main as report
from peftbench.cli.results import main
from peftbench.config.schema import find_conf_dir
from peftbench.records.record import Record, RecordedBackbone, Score
from peftbench.tables.paper import SETTINGS, find_printed
from tests.tables.test_results import LORA
from tests.tables.test_table import FFN, record, saved

BART = RecordedBackbone("bart_large", "facebook/bart-large", None, None)
MINI = RecordedBackbone("mini", None, None, "0123456789ab")


def xsum(score: float, *overrides: str, model: RecordedBackbone = BART, **changes: Any) -> Record:
    part = changes.pop("of", None)
    values: dict[str, Any] = {
        "task": "xsum",
        "metric": "rouge2",
        "model": model,
        "overrides": ["task=xsum", *overrides],
        "scores": {"report": Score("test", 11334, {"rouge2": score}, of=part)},
        "data": {"splits": {"train": {"split": "train", "examples": 204045}}},
        "baselines": {},
        **changes,
    }
    return record(score, FFN, **values)


@pytest.mark.parametrize(
    ("run", "score", "table", "same"),
    [
        (xsum(1.0, "row=scaled_pa_ffn_512"), 21.54, "table5", True),
        (xsum(1.0, "row=lora_ffn_102"), 21.31, "table5", True),
        (xsum(1.0, "row=lora_ffn_102", "experiment=paper/table6"), 21.29, "table6", True),
        (xsum(1.0, "row=lora_ffn_102", "+experiment=paper/table6"), 21.29, "table6", True),
        (xsum(1.0, "row=mam_30_512", "experiment=paper/figure2", "trainer.learning_rate=1e-4"), 21.90, "table6", True),
        (xsum(1.0, "row=mam_30_512", model=MINI), 21.90, "table6", False),
        (xsum(1.0, "row=mam_30_512", debug="smoke"), 21.90, "table6", False),
        (xsum(1.0, "row=mam_30_512", of=11_500), 21.90, "table6", False),
        (
            xsum(1.0, "row=mam_30_512", data={"splits": {"train": {"split": "train", "examples": 9, "of": 99}}}),
            21.90,
            "table6",
            False,
        ),
        (xsum(1.0, "method=mam", task="mnli", metric="accuracy", model=RecordedBackbone("roberta_base", *3 * [None])),
         87.4, "table2", True),
        (xsum(1.0, "row=prefix_30", task="wmt16_enro", metric="bleu_ro"), 35.2, "table4", False),
    ],
)  # fmt: skip
def test_a_row_of_the_paper(run: Record, score: float, table: str, same: bool) -> None:
    found = find_printed(run)
    assert found is not None and (found.score, found.table, found.same) == (score, table, same)


@pytest.mark.parametrize(
    "run",
    [
        xsum(1.0, "method=mam"),  # table 2 has MAM, but not on XSum
        xsum(1.0, "row=mam_30_512", "bottleneck=64"),
        xsum(1.0, "row=mam_30_512", "mix.attention.bottleneck=3"),
        xsum(1.0, "row=pa_ffn_512", "composition_function.scale=2"),
        xsum(1.0, "row=pa_ffn_512", "unfreeze=norm"),
        xsum(1.0, "row=prefix_30"),  # table 4 has it, on WMT alone
        xsum(1.0, "row=pa_ffn_512", metric="rougeL"),
        xsum(1.0, "row=pa_ffn_512", task="docsum"),
        xsum(1.0, "method=mam", "budget=1%", task="mnli", metric="accuracy"),
    ],
)
def test_no_row_of_the_paper(run: Record) -> None:
    assert find_printed(run) is None


@pytest.mark.parametrize("task", SETTINGS)
def test_the_settings_are_those_of_the_tasks_files(task: str) -> None:
    conf: Any = OmegaConf.load(find_conf_dir() / "task" / f"{task}.yaml")
    metric, backbones = SETTINGS[task]
    assert conf.task.metric == metric
    assert {"override /model": backbones[0]} in conf.defaults


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    runs = [
        xsum(21.0, "row=pa_ffn_512", seed=1, point="a"),
        xsum(22.0, "row=pa_ffn_512", seed=2, point="a"),
        xsum(20.0, "row=pa_ffn_512", "bottleneck=99", point="b"),
        xsum(5.0, "row=pa_ffn_512", model=MINI, point="c"),
    ]
    for index, run in enumerate(runs):
        run.axes = [LORA] if index == 2 else run.axes
        run.folder, run.run = tmp_path / str(index), str(index)
        saved(run)
    return tmp_path


def printed_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_it_stands_beside_ours_in_the_papers_own_setting(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_by(capsys, outputs).splitlines()
    assert sum("Δ paper" in line for line in lines) == 1  # no such columns in mini's table
    text = "\n".join(lines)
    assert re.search(r"22\.00\* +20\.98 +\+1\.02", text) and re.search(r"21\.00 +20\.98 +\+0\.02", text)
    assert re.search(r" 20\.00 +(?!20\.98)", text)
    assert re.search(r"21\.50 ± 0\.71\*? +20\.98 +\+0\.52", printed_by(capsys, outputs, "--mean"))


def test_it_stands_beside_other_backbones_where_asked_with_what_it_is_of(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed_by(capsys, outputs, "--paper", "model=mini")
    assert re.search(r"5\.00 +20\.98 +table5,\s.*\bbart_large\b", text, re.DOTALL) and "-15.98" not in text
    (row,) = json.loads(printed_by(capsys, outputs, "--paper", "model=mini", "--mean", "--json"))
    assert (row["paper"], row["difference"], row["paper_of"]) == (20.98, None, "table5, bart_large")
    assert "20.98" not in printed_by(capsys, outputs, "model=mini")


def test_all_formats_have_it(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--mean"], ["--show", "method,score,paper,difference"]):
        rows = json.loads(printed_by(capsys, outputs, *arguments, "model=bart_large", "--json"))
        assert {row["paper"] for row in rows} == {20.98, None}
        assert all(row["difference"] == pytest.approx(row["score"] - 20.98) for row in rows if row["paper"])
        table = list(csv.DictReader(io.StringIO(printed_by(capsys, outputs, *arguments, "--csv"))))
        assert {row["paper"] for row in table} == {"20.98", ""}
    assert "| 20.98 | +1.02 |" in printed_by(capsys, outputs, "--markdown")
    assert r"20.98 & +1.02" in printed_by(capsys, outputs, "--latex")
    first, *_ = csv.DictReader(io.StringIO(printed_by(capsys, outputs, "--sort", "difference", "--csv", "--mean")))
    assert first["difference"]
    assert "paper" not in printed_by(capsys, outputs, "model=mini", "--csv").splitlines()[0].split(",")


@pytest.mark.parametrize(("words", "of_mini"), [([], None), (["--paper"], 20.98)])
def test_it_stands_in_the_report_as_in_the_tables(words: list[str], of_mini: float | None, outputs: Path) -> None:
    file = outputs / "report.html"
    assert report([str(outputs), "--out", str(file), *words]) == 0
    content = json.loads(re.findall(r"<script[^>]*>(.*?)</script>", file.read_text(encoding="utf-8"), re.S)[0])
    keys = [column["key"] for column in content["columns"]]

    def cells(key: str) -> list[Any]:
        return [run["cells"][keys.index(key)] for run in content["runs"]]

    assert cells("score") == [22.0, 21.0, 20.0, 5.0]
    assert cells("paper") == [20.98, 20.98, None, of_mini]
    assert cells("difference") == [pytest.approx(1.02), pytest.approx(0.02), None, None]
    assert ("paper_of" in keys) == bool(words)
    assert not words or cells("paper_of") == [*2 * ["table5, bart_large"], None, "table5, bart_large"]
    for key, header, form in (("paper", "paper", "score"), ("difference", "Δ paper", "signed")):
        column = content["columns"][keys.index(key)]
        assert (column["header"], column["form"], column["shown"]) == (header, form, True)
        assert column["better"] is None  # no run's score, of which the best were marked


def test_that_no_run_is_a_row_of_the_papers_is_said(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["run=2"], True), ([], False)):
        main([str(outputs), "--paper", *words])
        assert ("None of these runs is a row of the paper's tables" in capsys.readouterr().err) is said


def test_a_report_without_a_row_of_the_papers_has_no_such_columns(outputs: Path) -> None:
    file = outputs / "report.html"
    assert report([str(outputs), "model=mini", "--out", str(file)]) == 0
    assert "Δ paper" not in file.read_text(encoding="utf-8")
