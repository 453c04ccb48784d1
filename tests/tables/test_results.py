"""What `peftbench results` does with records: filters, means over seeds, pivots, marks and formats."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import pytest

from peftbench.cli import report
from peftbench.cli.results import main
from peftbench.records.record import Axes, Divergence, Failure, Record, RecordedBackbone, RecordedCounts, load_records
from peftbench.records.recording import describe_run
from peftbench.tables.columns import choose_columns, find_best_rows
from peftbench.tables.fields import FIELDS
from peftbench.tables.formats import to_latex, to_markdown
from peftbench.tables.intervals import estimate_means
from peftbench.tables.pivot import pivot_records
from peftbench.tables.report.content import build_content
from peftbench.tables.row import find_front, group_seeds, make_rows
from peftbench.tables.select import select_records
from peftbench.utils.errors import UserError
from tests.records.test_record import RUN
from tests.tables.test_claims import make_row
from tests.tables.test_table import FFN, HEADS, record, saved

SCORES = {
    ("lora", 1): 60.0,
    ("lora", 2): 64.0,
    ("lora", 3): 65.0,
    ("mam", 1): 70.0,
    ("mam", 2): 71.0,
    ("full", 1): 72.0,
}
STORED = {"lora": 1000, "mam": 3000, "full": 100_000}
LORA = Axes("", "identity", "query_value", "parallel", "scaled", 2.0, 8, {})


def run(method: str, seed: int, score: float | None = 50.0, folder: Path | None = None, **changes: Any) -> Record:
    """A run of one of three methods; the smaller the method, the longer it takes."""
    stored = STORED[method]
    axes = {"lora": [LORA], "mam": [FFN, HEADS], "full": []}[method]
    values: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "unfreeze": "all" if method == "full" else "none",
        "run": f"{method}{seed}",
        "point": f"{method} {changes.get('trainer')}",
        "counts": RecordedCounts(backbone=100_000, trained=2 * stored, stored=stored, head=10, paper=None),
        "timings": {"total_s": 200_000.0 - stored},
        "folder": folder or Path(f"outputs/doctopic/mini/{method}/{seed}"),
        **changes,
    }
    return record(score, *axes, **values)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    for (method, seed), score in SCORES.items():
        saved(run(method, seed, score, tmp_path / f"{method}-{seed}"))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def printed_rows(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(printed(capsys, *arguments, "--csv"))))


# Filters


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["method=lora"], 3),
        (["method=lora,mam", "seed=1"], 2),
        (["method!=full", "seed!=1"], 3),
        (["method=*a*"], 5),
        (["insertion_form=parallel"], 5),
        (["functional_form=softmax"], 2),  # one half of a mixture
        (["functional_form=relu + softmax"], 2),
        (["unfreeze=all"], 1),
        (["bottleneck=8"], 3),
        (["trainer.learning_rate=0.001"], 6),
        (["seed>1"], 3),
        (["stored>=1000", "stored<1e5"], 5),
        (["seed<=1", "method!=full"], 2),
        (["seed=1", "method=lora", "or", "method=full"], 2),
        (["method=lora", "or", "seed=1", "or", "stored>=3000"], 6),
    ],
)
def test_filters(filters: list[str], expected: int) -> None:
    records = [run(method, seed, trainer={"learning_rate": 1e-3}) for method, seed in SCORES]
    assert len(select_records(records, filters)) == expected


@pytest.mark.parametrize(
    ("filters", "sentences"),
    [
        (["methd=lora"], ["methd is not a column; did you mean method? Choices: method, task"]),
        (["method=lroa"], ["method=lroa is unknown; did you mean lora? Choices: full, lora, mam."]),
        (["method=lroa", "sed=1"], ["did you mean lora?", "sed is not a column; did you mean seed?"]),
        (["trainer.lr=1"], ["trainer.lr is not a column"]),
        (["score>high"], ["score>high: > needs a number after it."]),
        (["method=lroa", "or", "sed=1"], ["did you mean lora?", "sed is not a column; did you mean seed?"]),
        (["method=full", "seed=2", "or", "seed=1"], ["No run passes method=full seed=2, between"]),
        (["or", "seed=1"], ["or seed=1: `or` is between two sets of filters"]),
    ],
)
def test_a_filter_that_matches_nothing_says_what_there_is(filters: list[str], sentences: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        select_records([run(method, seed) for method, seed in SCORES], filters)
    assert len(refused.value.faults) == len(sentences)
    assert all(sentence in fault for sentence, fault in zip(sentences, refused.value.faults, strict=True))


def test_a_value_that_some_runs_have_none_of_can_be_asked_for() -> None:
    records = [run("lora", 1, budget="1%"), run("lora", 2)]
    with pytest.raises(UserError) as refused:
        select_records(records, ["budget=null"])
    assert refused.value.faults == ["budget=null is unknown. Choices: 1%. budget= selects the runs that have none."]
    assert select_records(records, ["budget="]) == records[1:]


def test_filters_that_leave_nothing_are_named(outputs: Path) -> None:
    with pytest.raises(UserError, match="No run passes method=full seed=2"):
        main([str(outputs), "method=full", "seed=2"])


def test_a_row_of_the_paper_can_be_asked_for(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = run("mam", 4, 90.0, outputs / "typed", overrides=["row=mam_30_512", "budget=2%"], budget="2%")
    saved(typed)
    (row,) = printed_rows(capsys, outputs, "row=mam_30_512", "or", "budget=2%", "--show", "row,score")
    assert row == {"row": "mam_30_512", "score": "90.0"}


# Seeds


def test_a_row_of_several_seeds(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_lora = [score for (method, _), score in SCORES.items() if method == "lora"]
    for statistic, centre in (("mean", fmean), ("median", median)):
        rows = {row["method"]: row for row in printed_rows(capsys, outputs, f"--{statistic}")}
        assert list(rows) == ["full", "mam", "lora"]
        assert float(rows["lora"]["score"]) == pytest.approx(centre(of_lora))
        assert float(rows["lora"]["score_std"]) == pytest.approx(stdev(of_lora))
        assert (rows["lora"]["n"], rows["full"]["n"], rows["full"]["score_std"]) == ("3", "1", "")
        assert float(rows["mam"]["delta"]) == pytest.approx(70.5 - 72)
    assert "63.00 ± 2.65" in printed(capsys, outputs, "--mean")
    assert "64.00 ± 2.65" in printed(capsys, outputs, "--median")


def test_only_runs_that_came_through_are_counted() -> None:
    runs = [run("lora", 1, 60.0), run("lora", 2, math.nan), run("lora", 3, None, status="failed")]
    (row,) = group_seeds(runs, "mean")
    assert row.score == 60.0 and len(row.scored) == 1 and row.spread(lambda r: r.score) is None
    status = next(column for column in choose_columns([row]) if column.key == "status")
    assert status.cell(row) == "2 done, 1 failed"
    runs[2].error = Failure("OutOfMemoryError", "CUDA")  # which would break a narrow column; single runs name it
    assert status.cell(row) == "2 done, 1 failed"


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_numbers_that_are_none_are_shown_and_are_in_no_mean(
    odd: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In records as earlier versions wrote them, with words for numbers that JSON does not have."""
    runs = [run("lora", seed, 60.0 + seed, tmp_path / str(seed)) for seed in (1, 2, 3)]
    for one, value in zip(runs, (10.0, 20.0, odd), strict=True):
        one.tokens_per_s = value
    for one in (*runs, run("mam", 1, odd, tmp_path / "diverged")):
        one.folder.mkdir()
        (one.folder / "record.json").write_text(json.dumps(one.to_json()))
    keys = "method,seed,score,tokens_per_s"
    rows = json.loads(printed(capsys, tmp_path, "--show", keys, "--json"), parse_constant=pytest.fail)
    assert [row["tokens_per_s"] for row in rows] == [None, 20, 10, None]
    whole = json.loads(printed(capsys, tmp_path, "--json"), parse_constant=pytest.fail)
    assert [record["score"] for record in whole] == [61, 62, 63, None]
    for form in ("--csv", "--markdown", "--latex"):
        assert str(odd) in printed(capsys, tmp_path, form, "--show", keys)
    for form in ("--csv", "--mean"):  # what has no score is a run that diverged
        assert str(odd) not in printed(capsys, tmp_path, form, "--show", "method,score,status")
    assert "15" in printed(capsys, tmp_path, "--rows", "method", "--value", "tokens_per_s")


@pytest.mark.parametrize("words", [["--mean"], ["--rows", "method"], ["--mean", "--latex"], ["--median", "--json"]])
def test_a_mean_says_which_runs_diverged(words: list[str], outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is over the seeds that went well, which says too much of the setting."""
    saved(run("lora", 4, None, outputs / "diverged", status="diverged", diverged=Divergence("loss", 3)))
    assert main([str(outputs), *words]) == 0
    told = capsys.readouterr()
    assert told.err == "1 diverged and is in no mean: lora4 (lora, seed 4).\n"
    if words == ["--mean"]:
        (row,) = (row for row in group_seeds(load_records(outputs)[0], "mean") if row.first.method == "lora")
        assert row.score == fmean(score for (method, _), score in SCORES.items() if method == "lora")
        status = next(column for column in choose_columns([row]) if column.key == "status")
        assert status.cell(row) == "3 done, 1 diverged"


def test_what_diverged_is_never_best_nor_on_a_front() -> None:
    """Not as an earlier version wrote it either, which gave it a score."""
    runs = [run("lora", 1, 60.0), run("mam", 1, 70.0), run("full", 1, 65.0)]
    runs.append(run("lora", 2, 99.0, status="diverged"))
    rows = make_rows(runs)
    assert rows[3] not in find_front(rows, lambda record: record.counts.stored if record.counts else None)
    for column in choose_columns(rows):
        assert 3 not in find_best_rows(column, rows)
        assert column.key != "score" or column.cell(rows[3]) == ""


def test_a_run_that_was_trained_twice_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = [f"2026-11-2{day}T00:00:00.000+00:00" for day in (3, 1, 2, 4)]
    scores = [61.0, 90.0, 64.0, None]
    runs = [run("lora", seed, score) for seed, score in zip((1, 1, 2, 1), scores, strict=True)]
    runs = [
        replace(one, created=at, folder=tmp_path / at[:10], status="done" if one.score else "running")
        for one, at in zip(runs, began, strict=True)
    ]
    (row,) = group_seeds(runs, "mean")
    assert [(one.seed, one.score) for one in row.records] == [(1, 61.0), (2, 64.0)]  # the last one that has a score
    for one in runs[:3]:
        one.folder.mkdir()
        one.save()
    for words in (["--mean"], ["--rows", "method"]):
        assert main([str(tmp_path), *words]) == 0
        told = capsys.readouterr()
        assert "62.50 ± 2.12" in told.out
        assert told.err == "1 run was trained more than once; a mean uses the latest.\n"


def test_what_differs_in_more_than_the_seed_has_rows_of_its_own() -> None:
    runs = [run("lora", seed, trainer={"learning_rate": rate}) for seed, rate in product((1, 2), (1e-3, 1e-4))]
    assert [len(row.records) for row in group_seeds(runs, "mean")] == [2, 2]
    older = [replace(one, point=None) for one in runs]  # records from before there was `point`
    assert [len(row.records) for row in group_seeds(older, "mean")] == [2, 2]


def test_the_point_of_a_run_is_its_identity_without_the_seed(tmp_path: Path) -> None:
    one, two, other = (
        describe_run(replace(RUN, **changes), tmp_path, []) for changes in ({"seed": 1}, {"seed": 2}, {"bottleneck": 5})
    )
    assert one.run != two.run and one.point == two.point != other.point


# Marks


def test_the_pareto_front_by_hand() -> None:
    scores, stored = [60, 70, 65, 70, 80, 60], [10, 20, 20, 30, 40, 10]
    rows = make_rows(
        run("lora", seed, score, counts=RecordedCounts(1000, cost, cost, 0, None))
        for seed, (score, cost) in enumerate(zip(scores, stored, strict=True))
    )
    expected = [
        row
        for row, s, c in zip(rows, scores, stored, strict=True)
        if not any(t >= s and d <= c and (t, d) != (s, c) for t, d in zip(scores, stored, strict=True))
    ]
    found = find_front(rows, lambda r: r.counts and r.counts.stored)
    assert [row.first.seed for row in expected] == [0, 1, 4, 5]
    assert sorted(row.first.seed for row in found) == [0, 1, 4, 5]


def test_best_values_are_marked_and_failed_runs_are_never_best() -> None:
    rows = make_rows([run("full", 1, 72.0), run("lora", 1, 60.0), run("mam", 1, None, timings={"total_s": 1.0})])
    by_key = {column.key: find_best_rows(column, rows) for column in choose_columns(rows)}
    assert (by_key["score"], by_key["stored"], by_key["time"]) == ({0}, {1}, {0})
    assert by_key["percent"] == by_key["method"] == set()
    equal = make_rows([run("lora", 1, 60.0), run("lora", 2, 60.0)])
    assert all(
        find_best_rows(column, equal) == set() for column in choose_columns(equal) if column.key in ("score", "stored")
    )


def test_marks_in_a_table(outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    lines = {line.split()[0]: line for line in printed(capsys, outputs, "--mean").splitlines()[2:] if line.strip()}
    assert "72.00*" in lines["full"] and "-1.50" in lines["mam"] and "+0.00" in lines["full"]
    assert all("◆" in lines[method] for method in ("full", "mam", "lora"))
    by_time = printed(capsys, outputs, "--mean", "--pareto", "time")
    assert by_time.count("◆") == 2  # full is best, and here quickest; the other is the legend
    assert "* best of its column; ◆ on the Pareto front of score against time\n" in by_time


# Order and choice of columns


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sort", "stored"], ["lora", "mam", "full"]),
        (["--sort", "stored", "--reverse"], ["full", "mam", "lora"]),
        (["--sort", "method"], ["full", "lora", "mam"]),
        (["--sort", "time"], ["full", "mam", "lora"]),
        (["--sort", "f1"], ["full", "mam", "lora"]),  # all equal: best score first
    ],
)
def test_order(outputs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]) -> None:
    assert [row["method"] for row in printed_rows(capsys, outputs, "--mean", *arguments)] == expected


def test_chosen_columns(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = "method,score,accuracy,majority,n,model.content,front"
    rows = printed_rows(capsys, outputs, "method=lora,mam", "--mean", "--show", keys)
    assert list(rows[0]) == ["method", "score", "score_std", "accuracy", "accuracy_std", *keys.split(",")[3:]]
    assert rows[0]["model.content"] == "0123456789ab" and float(rows[0]["majority"]) == 20
    with pytest.raises(UserError, match="scor is not a column; did you mean score"):
        main([str(outputs), "--show", "scor"])


# Formats


def test_markdown_and_latex(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, outputs, "--mean", "--show", "method,axes,stored,score", "--markdown")
    assert "accuracy on 1,000 test examples\n\n| method | four axes | stored | accuracy ↑ |" in text
    assert "| --- | --- | ---: | ---: |" in text and "| full | all parameters | 100,000 | **72.00** |" in text
    assert "relu · ffn · parallel · scaled 4 + softmax · heads · parallel · gated | 3,000 | 70.50 ± 0.71 |" in text
    text = printed(capsys, outputs, "--mean", "--show", "method,percent,score", "--latex")
    assert r"\toprule" in text and r"\bottomrule" in text and r"\begin{tabular}{lrr}" in text
    assert r"method & \% of model & accuracy $\uparrow$ \\" in text
    assert r"full & 100.00 & \textbf{72.00} \\" in text and r"70.50 $\pm$ 0.71" in text


def test_a_score_below_a_baseline_is_marked_in_all_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, method in enumerate(("lora", "mam")):
        saved(run(method, seed, (40.0, 60.0)[seed], tmp_path / method, baselines={"copy": 50.0}))
    for words in ([], ["--markdown"], ["--latex"], ["--rows", "method", "--columns", "model"]):
        text = printed(capsys, tmp_path, *words)
        assert ("40.00 $\\nabla$" if "--latex" in words else "40.00 ▽") in text
        assert "▽ below a baseline" in text and "60.00 ▽" not in text
    values = json.loads(printed(capsys, tmp_path, "--show", "method,score", "--json"))
    assert {row["method"]: row["score"] for row in values} == {"lora": 40.0, "mam": 60.0}


def test_letters_that_latex_takes_for_commands() -> None:
    odd = replace(run("lora", 1), method="a_b & 100% #1 {x} ~ ^ \\ \udcff")
    rows = make_rows([odd, run("lora", 2)])
    text = to_latex([choose_columns(rows)[0]], rows)
    assert r"a\_b \& 100\% \#1 \{x\} \~{} \^{} \textbackslash" in text
    assert "$-$0.75 & 2026-11-25 a-1" in to_latex(
        [
            replace(choose_columns(rows)[0], cell=lambda row: "-0.75"),
            replace(choose_columns(rows)[0], cell=lambda row: "2026-11-25 a-1"),
        ],
        rows,
    )  # a minus, not a hyphen
    assert r"| a\|b |" in to_markdown([choose_columns(rows)[0]], make_rows([replace(odd, method="a|b")]))


def test_rows_as_json(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(printed(capsys, outputs, "--mean", "--json"))
    assert [row["score"] for row in rows] == pytest.approx([72, 70.5, 63])
    assert rows[1]["axes"] == "relu · ffn · parallel · scaled 4 + softmax · heads · parallel · gated"
    assert len(json.loads(printed(capsys, outputs, "--json"))) == 6  # whole records


@pytest.mark.parametrize("words", [["--mean", "--show", "method,score"], ["--rows", "method"]])
def test_intervals_in_place_of_deviations(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of LoRA it is known what each example contributed, of MAM it is not."""
    make_row(tmp_path, [80, 82, 81.5], "lora", 2)
    make_row(tmp_path, [70, 71], "mam", 2, keep_examples=False)
    make_row(tmp_path, [90], "full", 2)
    rows = group_seeds(load_records(tmp_path)[0], "mean")
    known = {row.first.method: estimate_means([row], FIELDS["score"], True).get(id(row)) for row in rows}
    printed_of = {row["method"]: row for row in printed_rows(capsys, tmp_path, *words, "--interval")}
    for method, interval in known.items():
        ends = [printed_of[method][f"score_{end}"] for end in ("low", "high")]
        assert ends == (["", ""] if interval is None else [str(interval.low), str(interval.high)])
        assert "score_std" not in printed_of[method]
    text = " ".join(printed(capsys, tmp_path, *words, "--interval", "--markdown").split())
    for method, interval in known.items():
        if interval is not None:
            assert f"{float(printed_of[method]['score']):.2f} ± {interval.half:.2f}" in text
    assert "half the 95% interval of the mean: a bootstrap over 3 seeds and the examples or Student's t over 2" in text
    assert "±" not in printed(capsys, tmp_path, *words, "method=full", "--interval")


def test_a_pivot_of_intervals_has_the_seeds_in_the_title_where_all_have_as_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_row(tmp_path, [80, 82, 81.5], "lora", 2)
    make_row(tmp_path, [70, 71, 73], "mam", 2)
    assert "(3)" not in printed(capsys, tmp_path, "--rows", "method", "--interval")
    make_row(tmp_path, [90, 91], "full", 2)
    text = printed(capsys, tmp_path, "--rows", "method", "--interval")
    assert "(3)" in text and "(2)" in text


# Pivots


def test_a_pivot_by_hand(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed_rows(capsys, outputs, "--rows", "method", "--columns", "seed")
    assert {row["method"]: (row["1"], row["2"], row["3"]) for row in rows} == {
        "full": ("72.0", "", ""),
        "lora": ("60.0", "64.0", "65.0"),
        "mam": ("70.0", "71.0", ""),
    }
    rows = printed_rows(capsys, outputs, "--rows", "functional_form", "--value", "time")
    assert [(row["functional_form"], float(row["time"])) for row in rows] == [
        ("", 100_000),
        ("identity", 199_000),
        ("relu + softmax", 197_000),
    ]
    text = printed(capsys, outputs, "--rows", "method")
    assert "63.00 ± 2.65 (3)" in text and "72.00*" in text
    assert "score of 6 runs: task=doctopic, model=mini, metric=accuracy, split=test, examples=1000" in " ".join(
        text.split()
    )


def test_sizes_of_the_same_share_are_one_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stored, (method, seed) in zip((60_930, 60_931), (("lora", 1), ("mam", 2)), strict=True):
        counts = RecordedCounts(backbone=1_000_000, trained=stored, stored=stored, head=0, paper=None)
        saved(run(method, seed, 50.0 + seed, tmp_path / method, counts=counts))
    rows = printed_rows(capsys, tmp_path, "--rows", "method", "--columns", "percent")
    assert rows == [{"method": "lora", "6.09": "51.0"}, {"method": "mam", "6.09": "52.0"}]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"split": "validation"}, "split"),
        ({"examples": 500}, "examples"),
        ({"model": RecordedBackbone("bart_large", "facebook/bart-large", None, None)}, "model"),
        ({"task": "docsum"}, "task"),
        ({"debug": "smoke"}, "debug"),
        ({"data": {"splits": {"train": {"split": "train", "examples": 7}}}}, "train_examples"),
    ],
)
def test_what_may_not_be_compared_is_not_put_into_one_column(
    outputs: Path, changes: dict[str, Any], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(run("full", 9, 73.0, outputs / "odd", **changes))
    with pytest.raises(UserError) as refused:
        main([str(outputs), "--rows", "method,seed"])
    (sentence,) = refused.value.faults
    assert f"they differ in {key}: " in sentence and "(6 runs)" in sentence and "(1 run)" in sentence
    assert f"allow it with --mix {key}." in sentence
    for told in (["--rows", "method,seed", "--mix", key], ["--rows", "method,seed", "--columns", key]):
        assert "73.00" in printed(capsys, outputs, *told)
    # The tables without a pivot keep such runs apart by themselves, or show the difference.
    assert printed(capsys, outputs).count("\n") > 7


def test_fidelity_is_compared_where_a_record_has_it() -> None:
    runs = [run("lora", 1), run("lora", 2)]
    assert len(pivot_records(runs, ["method"], [])[2]) == 1
    runs[1].fidelity = "released_code"
    with pytest.raises(UserError, match="they differ in fidelity"):
        pivot_records(runs, ["method"], [])


def test_a_cell_is_no_mean_over_different_settings(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(run("lora", 1, 10.0, outputs / "other", run="other", trainer={"learning_rate": 0.5}))
    told = r"The cell of lora on doctopic would hold .* the seed \(learning_rate: , 0.5\).*--mix learning_rate"
    with pytest.raises(UserError, match=told):
        main([str(outputs), "--rows", "method"])
    assert "49.75" in printed(capsys, outputs, "--rows", "method", "--mix", "learning_rate")
    saved(run("lora", 2, 10.0, outputs / "another", run="another", trainer={"learning_rate": 0.5, "graphs": False}))
    with pytest.raises(UserError, match=r"the seed \(learning_rate: [^;]*\).*--mix learning_rate\.$"):
        main([str(outputs), "--rows", "method"])  # recorded steps are as good as others
    (outputs / "another" / "record.json").unlink()
    assert "10.00" in printed(capsys, outputs, "--rows", "method", "--columns", "learning_rate")


def test_a_pivot_marks_scores_of_texts_that_were_cut_off(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "†" not in printed(capsys, outputs, "--rows", "method")
    cut = run("lora", 4, 64.0, outputs / "lora-4")
    cut.cut_off = {"report": 0.06}
    saved(cut)
    text = " ".join(printed(capsys, outputs, "--rows", "method").split())
    assert "† more than 5% of the texts were cut off" in text and text.count("†") == 2
    assert "(4) †" in text and "72.00 †" not in text
    assert "†" not in printed(capsys, outputs, "--rows", "method", "--value", "time")
    shown = {column["key"]: column["shown"] for column in build_content([cut])["columns"]}
    assert shown["cut_off"]


def test_a_wide_pivot_goes_on_below(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(10, 40):
        saved(run("lora", seed, 50.0 + seed, outputs / f"lora-{seed}"))
    lines = printed(capsys, outputs, "--rows", "method", "--columns", "seed").splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("method") for line in lines) > 1
    assert sum(f"{50.0 + seed:.2f}" in " ".join(lines) for seed in range(10, 40)) == 30


def test_the_parts_of_a_wide_pivot_have_the_rows_with_a_value_and_shares_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, share in enumerate(("12.3%", "2.4%", "6.1%", None)):
        name = f"a_method_of_quite_a_long_name_{index}"
        made = replace(run("lora", 1, 50.0, tmp_path / name, budget=share), method=name)
        saved(made)
    keys = "method,functional_form,insertion_form"
    parts = printed(capsys, tmp_path, "--rows", keys, "--columns", "budget").split("\n\n")
    heads = [next(line for line in part.splitlines() if line.startswith("method")).split() for part in parts]
    assert [[word for word in head if word[-1] == "%" or word == "none"] for head in heads] == [
        ["2.4%", "6.1%", "12.3%"],
        ["none"],
    ]
    assert [part.count("a_method") for part in parts] == [3, 1]


def test_means_tell_apart_what_differs_in_more_than_the_seed_at_any_width(
    outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(run("lora", 1, 66.0, outputs / "other", trainer={"learning_rate": 5e-4}, point="other"))
    for width in ("80", "160"):
        monkeypatch.setenv("COLUMNS", width)
        text = printed(capsys, outputs, "--mean")
        assert "learning" in text and "0.0005" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "methd"], "methd is not a column; did you mean method"),
        (["--rows", "method", "--show", "score"], "--show needs a row for each run"),
        (["--mix", "split"], "--mix needs --rows or --columns"),
        (["--value", "score"], "--value needs --rows or --columns"),
        (["--rows", "method", "--pareto", "time"], "--pareto marks a front among rows of runs; leave it out"),
        (["--json", "--pareto", "time"], "--pareto marks rows of a table; --json has no front: leave it out"),
        (["--mean", "--pareto", "memory"], "--pareto memory: none of these runs has its peak memory, which is"),
        (["--rows", "method", "--paper"], "--paper shows scores beside rows of runs; leave it out"),
        (["--reverse"], "--reverse needs --sort"),
        (["--rows", "method", "--reverse"], "--reverse needs --sort"),
        (["--rows", "method", "--value", "functional_form"], "--value functional_form is not a number"),
        (["status=failed", "--rows", "method"], "status=failed is unknown. Choices: done."),
    ],
)
def test_refusals(outputs: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        main([str(outputs), *arguments])


def test_whole_records_are_sorted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of several tables are one list in JSON and CSV."""
    for seed, (method, score) in enumerate((("lora", 3.0), ("mam", 1.0), ("lora", 2.0))):
        saved(run(method, seed, score, tmp_path / str(seed)))
    for flags, expected in (([], [3.0, 1.0, 2.0]), (["--sort", "score"], [1.0, 2.0, 3.0])):
        assert [one["score"] for one in json.loads(printed(capsys, tmp_path, "--json", *flags))] == expected
    text = printed(capsys, tmp_path, "--csv", "--sort", "score", "--reverse")
    assert [float(row["score"]) for row in csv.DictReader(io.StringIO(text))] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("arguments", [[], ["--mean"], ["--rows", "method"]])
def test_twice_the_records_are_twice_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """Calls are counted, since time would be the machine's; scripts/benchmark_records.py takes a thousand's time."""
    work = []
    for wanted in (30, 60, 120):
        for seed in range(wanted):
            saved(run("mam", seed, 50.0 + seed / 1000, tmp_path / str(seed)))
        work.append(calls(lambda: main([str(tmp_path), *arguments])))
    assert work[0] > 30
    # The second step adds twice as many records as the first. Were each compared with each, it would be four times.
    assert work[2] - work[1] == pytest.approx(2 * (work[1] - work[0]), rel=0.005)


def test_a_page_of_twice_the_records_is_twice_the_work(tmp_path: Path) -> None:
    work = []
    for wanted in (10, 20, 40):
        for seed in range(wanted):
            saved(run("mam", seed, 50.0 + seed / 1000, tmp_path / str(seed)))
        work.append(calls(lambda: report.main([str(tmp_path), "--out", str(tmp_path / "runs.html")])))
    assert work[2] - work[1] == pytest.approx(2 * (work[1] - work[0]), rel=0.02)


def calls(function: Callable[[], object]) -> int:
    """How many functions a second call of `function` calls; the first one fills what is kept."""
    function()
    counted = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return counted


def test_runs_that_were_scored_on_other_rows_have_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of one's own go by one task's name; a record from before this was kept stands with the only others."""
    contents = {("lora", 1): "a" * 64, ("mam", 1): "a" * 64, ("full", 1): None}
    for other in ({}, {("mam", 2): "b" * 64}):
        for (method, seed), content in {**contents, **other}.items():
            data = {"scored_on": content} if content else {}
            saved(run(method, seed, SCORES[method, seed], tmp_path / f"{method}-{seed}", data=data))
        text = printed(capsys, tmp_path)
        headings = [line.rpartition("(")[2] for line in text.splitlines() if line.endswith(")")]
        assert headings == (["data unknown)", "data aaaaaaaa)", "data bbbbbbbb)"] if other else [])
        assert text.count("method") == (3 if other else 1)
    with pytest.raises(UserError, match=r"differ in data: aaaaaaaa \(2 runs\), bbbbbbbb \(1 run\)"):
        main([str(tmp_path), "--rows", "method"])
    assert main([str(tmp_path), "--rows", "method", "--mix", "data", "data=aaaaaaaa"]) == 0
