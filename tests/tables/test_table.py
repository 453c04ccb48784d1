"""The tables of runs can be read at any width, rank what may be ranked, and leave nothing out in silence."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peftbench.cli.results import main
from peftbench.config.fidelity import Deviation
from peftbench.records.record import Axes, Failure, Record, RecordedBackbone, RecordedCounts, Score
from peftbench.tables.columns import choose_columns
from peftbench.tables.fields import FIELDS, get_test_file
from peftbench.tables.formats import records_to_csv, records_to_json
from peftbench.tables.row import find_front, group_seeds, make_rows
from peftbench.tables.scores import show_scores
from peftbench.tables.terminal import show_records, show_single_row, show_table, wrap_text
from peftbench.utils.errors import UserError

HEADS = Axes("", "softmax", "heads", "parallel", "gated", 1.0, 30, {})
FFN = Axes("mix.ffn.", "relu", "ffn", "parallel", "scaled", 4.0, 512, {})


def record(score: float | None, *axes: Axes, split: str = "test", examples: int = 1000, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "run": "0123abcd",
        "status": "running" if score is None else "done",
        "created": "2025-01-01T00:00:00.000+00:00",
        "method": "mam",
        "task": "doctopic",
        "model": RecordedBackbone("mini", None, None, "0123456789ab"),
        "axes": list(axes),
        "unfreeze": "none",
        "metric": "accuracy",
        "seed": 42,
        "folder": Path("outputs/doctopic/mini/mam/0123abcd"),
        "score": score,
        "timings": {"total_s": 92.4},
    }
    if score is not None:
        values["counts"] = RecordedCounts(backbone=4_812_345, trained=1_241_234, stored=41_234, head=1000, paper=None)
        values["scores"] = {"report": Score(split, examples, {"accuracy": score, "f1": 1.0})}
        values["baselines"] = {"majority": 20.0, "head": 52.1}
    return Record(**{**values, **changes})


def saved(made: Record) -> None:
    """Write the record to its folder."""
    made.folder.mkdir(parents=True, exist_ok=True)
    made.save()


def shown(records: list[Record], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    show_records(records, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def last_table(record: Record, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    show_single_row(record, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def positions(text: str, *parts: str) -> list[int]:
    assert [part for part in parts if part not in text] == []
    return [text.index(part) for part in parts]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("relu · ffn · parallel · scaled 4", 40, ["relu · ffn · parallel · scaled 4"]),
        ("relu · ffn · parallel · scaled 4", 30, ["relu · ffn · parallel ·", "scaled 4"]),
        ("softmax · heads · parallel · gated", 27, ["softmax · heads ·", "parallel · gated"]),
        ("scaled_parallel_adapter", 16, ["scaled_parallel_", "adapter"]),
        ("failed: OutOfMemoryError", 18, ["failed:", "OutOfMemoryError"]),
        ("failed: OutOfMemoryError", 13, ["failed:", "OutOfMemory", "Error"]),
        ("table5, bart_large", 10, ["table5,", "bart_large"]),
        ("learning_rate 0.001: 60.00, 0.003: 65.00", 30, ["learning_rate 0.001: 60.00,", "0.003: 65.00"]),
        ("123456789", 4, ["123456789"]),
        ("", 4, [""]),
    ],
)
def test_a_cell_wraps_where_it_can_be_read(text: str, width: int, lines: list[str]) -> None:
    assert wrap_text(text, width).split("\n") == lines


@pytest.mark.parametrize("width", [80, 200])
def test_eight_runs_best_first(width: int) -> None:
    scores = [61.5, 70.25, 33.0, 69.0, 64.0, 12.5, 50.0, 68.0]
    text = shown([record(score, HEADS, method=f"method{score:.0f}") for score in scores], width)
    places = positions(text, *(f"{score:.2f}" for score in sorted(scores, reverse=True)))
    assert places == sorted(places)
    assert text.count("doctopic") == 1


@pytest.mark.parametrize("width", [1, 30, 48, 54, 60])
def test_on_a_narrow_terminal_words_give_way_to_numbers(width: int) -> None:
    """Where there is no room for the numbers alone, lines are longer: the terminal breaks them, not we the numbers."""
    runs = [record(63.17, FFN, method="scaled_parallel_adapter", seed=seed) for seed in (1, 2)]
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    rows = group_seeds([replace(run, run=str(run.seed)) for run in runs], "mean")
    show_table(choose_columns(rows), rows, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= max(width, 48)
    positions(text, "bottle-", "scaled_", "parallel_", "adapter", "relu", "63.17 ± 0.00", " 2")


@pytest.mark.parametrize("width", [80, 200])
def test_a_row_says_what_was_run(width: int) -> None:
    text = shown([record(63.17, HEADS, FFN, debug="smoke"), record(62.0, FFN, seed=43)], width)
    positions(
        text, "mam smoke", "softmax · heads", "relu · ffn", "scaled 4", "30", "512", "0.86", "accuracy ↑", "63.17"
    )
    assert "4,812,345 parameters" in text
    assert "accuracy on 1,000 test examples" in " ".join(text.split())


def test_a_wide_console_shows_every_column_and_a_line_for_each_modification() -> None:
    text = shown([record(63.17, HEADS, FFN)], 200)
    first, second = text.splitlines()[-2:]
    for cell in ("heads · parallel · gated", " 30 ", "1,241,234", "41,234", "63.17", "20.00", "52.10", "1:32", "42"):
        assert cell in first
    assert second.split() == ["relu", "·", "ffn", "·", "parallel", "·", "scaled", "4", "512"]


@pytest.mark.parametrize("width", [80, 200])
def test_what_follows_the_released_code_says_so(width: int) -> None:
    deviations = [Deviation("frozen_task_head", "It is."), Deviation("attention_adapter_norm", "It has one.")]
    text = shown([record(63.17, FFN, deviations=deviations), record(62.0, FFN)], width)
    positions(text, "as in the code", "frozen task head", "attention adapter", "63.17", "62.00", "0.86")
    assert "as in the code" not in shown([record(62.0, FFN)], width)
    (row,) = csv.DictReader(io.StringIO(records_to_csv([record(63.17, FFN, deviations=deviations)])))
    assert row["deviations"] == "frozen_task_head attention_adapter_norm"


@pytest.mark.parametrize("width", [80, 200])
def test_a_part_of_a_split_is_not_ranked_with_the_whole_of_one(width: int) -> None:
    whole, part = record(60.0, FFN, examples=1600), record(61.0, FFN, examples=1600)
    part.scores["report"].of = 9815
    text = " ".join(shown([whole, part], width).split())
    positions(text, "accuracy on 1,600 test examples", "accuracy on 1,600 of 9,815 test examples")


def test_settings_tell_runs_apart_that_look_alike() -> None:
    """Not those that all share, nor what changes no score, nor those of runs that another column tells apart."""
    rates = [
        record(50.0, FFN, trainer={"learning_rate": rate, "device": device})
        for rate, device in ((1e-3, "cpu"), (2e-3, "cuda"))
    ]
    text = shown(rates, 160)
    assert "learning" in text and "0.001" in text and "0.002" in text and "device" not in text
    failed = record(None, FFN, method="lora", status="failed", error=Failure("RuntimeError", ""))
    assert "learning" in shown([*(replace(run, method="parallel_adapter") for run in rates), failed], 80)
    others = [record(50.0, FFN, seed=seed, trainer={"learning_rate": seed / 1000}) for seed in (1, 2)]
    assert "learning" not in shown(others, 160)


def test_options_and_what_was_typed_tell_runs_apart_that_look_alike() -> None:
    """Places within the network are options of an axis; how a task is read stands in no record but as it was typed."""
    layers = [replace(HEADS, prefix="mix.heads.", options={"modified_representation.layers": [at]}) for at in (0, -1)]
    text = shown([record(50.0, FFN, one) for one in layers], 160)
    assert "heads" in text and "layers" in text and "-1" in text
    assert "layers" not in shown([record(50.0, FFN, layers[0]), record(60.0, FFN, layers[0])], 160)

    typed = [
        record(50.0, FFN, point=size, overrides=[f"task.max_source_length={size}", f"model.path={size}", "seed=1"])
        for size in ("48", "96")
    ]
    text = shown(typed, 160)
    assert "max" in text and "source" in text and "48" in text and "96" in text and "path" not in text
    assert "source" not in shown([replace(run, point="the same") for run in typed], 160)  # 48 may be the default


def test_full_fine_tuning_on_other_data_is_no_reference() -> None:
    """Runs with another selection split, or fewer training examples, are told apart and have their own reference."""

    def made(score: float, method: str, split: str, rate: float, examples: int = 900) -> Record:
        splits = {"train": {"split": "train", "examples": examples}, "selection": {"split": split, "examples": 100}}
        changes = {
            "overrides": [f"task.selection_split={split}"],
            "data": {"splits": splits},
            "point": f"{method}{split}",
        }
        changes["unfreeze"], axes = ("all", ()) if method == "full" else ("none", (FFN,))
        return record(score, *axes, method=method, trainer={"learning_rate": rate}, **changes)

    runs = [
        *(made(40.0, "full", "validation", 1e-4), made(52.0, "mam", "validation", 1e-3)),
        *(made(48.0, "full", "held_out", 2e-5), made(51.0, "mam", "held_out", 5e-4)),
        made(50.0, "mam", "held_out", 5e-4, examples=500),
    ]
    columns = {column.key: column for column in choose_columns(make_rows(runs))}
    deltas = [columns["delta"].cell(row) for row in make_rows(runs)]
    assert deltas == ["+0.00", "+12.00", "+0.00", "+3.00", ""]
    splits = [columns["task.selection_split"].cell(row) for row in make_rows(runs)]
    assert splits == ["validation"] * 2 + ["held_out"] * 3


def test_a_narrow_console_keeps_the_seeds_that_tell_runs_apart() -> None:
    assert "seed" not in shown([record(1.0, HEADS), record(2.0, HEADS)], 80)
    assert "seed" in shown([record(1.0, HEADS, seed=1), record(2.0, HEADS, seed=2)], 80)
    failed = record(
        None, HEADS, method="a_method_of_a_long_name", status="failed", error=Failure("OutOfMemoryError", "")
    )
    text = shown([record(1.0, HEADS, seed=1), record(2.0, HEADS, seed=2), failed], 80)
    positions(text, "seed", "failed:", "OutOfMemory", "Error", "a_method_of_a_")


@pytest.mark.parametrize(
    "other",
    [
        {"split": "validation"},
        {"examples": 500},
        {"task": "docsum"},
        {"model": RecordedBackbone("bart_large", "facebook/bart-large", None, None)},
        {"model": RecordedBackbone("mini", None, None, "ba9876543210")},
        {"model": RecordedBackbone("mini", "somebody/else", None, None)},
        {"metric": "f1"},
    ],
)
def test_what_cannot_be_compared_is_in_another_table(other: dict[str, Any]) -> None:
    assert shown([record(50.0), record(60.0, **other), record(55.0)], 200).count(" with ") == 2


@pytest.mark.parametrize("width", [80, 200])
def test_unfinished_runs_stand_below_with_their_error(width: int) -> None:
    runs = [
        record(None, HEADS, method="prefix", status="failed", error=Failure("ValueError", "[torn]")),
        record(None, method="scaled_parallel_adapter", status="interrupted"),
        record(float("nan"), method="diverged"),
        record(50.0, FFN, method="lora"),
    ]
    text = shown(runs, width)
    assert text.count(" with ") == 1
    score, *others = positions(
        text, "50.00", "interrupted", "failed: ValueError" if width > 80 else "ValueError", "nan"
    )
    assert score < min(others)


def test_unfrozen_backbones_have_words_for_axes() -> None:
    text = shown([record(50.0, unfreeze="bias"), record(60.0, unfreeze="all")], 80)
    positions(text, "the biases", "all parameters")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_last_table_of_a_run_has_everything_at_any_width(width: int) -> None:
    typed = ["method=mam", "task=doctopic", "+task.data_files.test=a.csv", "trainer.learning_rate=1", "bottleneck=4"]
    text = last_table(record(63.17, HEADS, FFN, overrides=typed), width)
    for cell in ("mam", "gated", "scaled 4", "1,241,234", "41,234", "0.86", "63.17", "majority", "52.10", "1:32"):
        assert cell in text
    lines = text.splitlines()
    assert lines[-3].endswith("outputs/doctopic/mini/mam/0123abcd")
    assert lines[-2].endswith(" peftbench results")
    proposed = "peftbench train -m method=lora,adapter,prefix,mam task=doctopic +task.data_files.test=a.csv"
    assert lines[-1].endswith(f" {proposed}")


def test_another_output_folder_is_named_in_the_command() -> None:
    text = last_table(record(63.17, folder=Path("/my runs/doctopic/mini/mam/0123abcd")), 80)
    assert "peftbench results '/my runs'" in text


def test_json_and_csv_hold_every_run() -> None:
    runs = [record(50.0, HEADS, FFN), record(None, error=Failure("ValueError", 'a, "b"\nc'))]
    assert [run["axes"][0]["bottleneck"] if run["axes"] else None for run in json.loads(records_to_json(runs))] == [
        30,
        None,
    ]
    first, second = csv.DictReader(io.StringIO(records_to_csv(runs)))
    assert first["axes.functional_form"] == "softmax + relu"
    assert (first["axes.bottleneck"], first["scores.report.metrics.accuracy"]) == ("30 + 512", "50.0")
    assert (second["status"], second["error.message"], second["score"]) == ("running", 'a, "b"\nc', "")


def stored(folder: Path, run: Record) -> None:
    run.folder = folder
    folder.mkdir(parents=True)
    run.save()


def test_the_command_shows_runs_and_names_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "good", record(50.0, HEADS))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "record.json").write_text('{"schema_version": 1, "sta')
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "50.00" in out
    assert err.startswith(f"{tmp_path}/torn/record.json is left out")
    assert main([str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert main([str(tmp_path), "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_an_empty_folder_is_told_how_to_make_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make one with: peftbench train"):
        main([str(tmp_path)])


def test_a_further_split_has_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As mismatched MNLI has beside matched; by the split's name it can be asked for, sorted by and filtered by."""
    for seed, further in ((1, 61.0), (2, 62.5), (3, None)):
        made = record(70.0 - seed, FFN, seed=seed, run=f"{seed:08x}")
        if further is not None:
            made.scores["report_dev_mm"] = Score("dev_mm", 900, {"accuracy": further, "f1": 1.0})
        stored(tmp_path / str(seed), made)
    assert main([str(tmp_path), "--markdown"]) == 0
    head, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    at = head.index("dev mm ↑")
    assert head[at - 1] == "accuracy ↑"
    assert [(row[at - 1], row[at]) for row in rows] == [("**69.00**", "61.00"), ("68.00", "**62.50**"), ("67.00", "")]
    assert main([str(tmp_path), "--show", "seed,dev_mm", "--sort", "dev_mm", "--reverse", "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["2,62.5", "1,61.0", "3,"]
    assert main([str(tmp_path), "--show", "seed", "--csv", "dev_mm>62"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["2"]
    with pytest.raises(UserError, match="dev_nm is not a column; did you mean dev_mm"):
        main([str(tmp_path), "--show", "dev_nm"])


# A row of LLM-Adapters (Hu et al., 2023), LoRA on LLaMA-7B: accuracies on eight sets, whose average is printed as 74.7.
COMMONSENSE = {
    "boolq": 68.9,
    "piqa": 80.7,
    "siqa": 77.4,
    "hellaswag": 78.1,
    "winogrande": 78.8,
    "arc_easy": 77.8,
    "arc_challenge": 61.3,
    "openbookqa": 74.8,
}


def test_several_sets_have_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each set counts the same, whatever its size; a run that lacks a set which another one has, has no average."""
    for seed, lacks in ((1, None), (2, "piqa"), (3, None)):
        made = record(68.9 + seed - 1, FFN, seed=seed, run=f"{seed:08x}")
        for size, (name, score) in enumerate(COMMONSENSE.items(), 1000):
            if name not in ("boolq", lacks):
                made.scores[f"report_{name}"] = Score(name, size, {"accuracy": score, "f1": 1.0})
        made.scores["selection"] = Score("validation", 10, {"accuracy": 1.0})
        stored(tmp_path / str(seed), made)
    assert main([str(tmp_path), "--markdown"]) == 0
    head, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    at = head.index("average of 8 ↑")
    assert [row[at] for row in rows] == ["**74.97**", "", "74.72"]
    assert main([str(tmp_path), "--show", "seed,average", "--sort", "average", "--csv"]) == 0
    found = [line.split(",") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [seed for seed, _ in found] == ["1", "3", "2"] and found[2][1] == ""
    assert float(found[0][1]) == pytest.approx(74.725) and float(found[1][1]) == pytest.approx(74.975)
    assert main([str(tmp_path), "--show", "seed", "--csv", "average>74.9"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["3"]


def test_an_evaluation_of_several_sets_ends_with_their_average() -> None:
    entries: list[dict[str, Any]] = [
        {"role": role, "split": name, "examples": 9, "of": None, "metrics": {"accuracy": score}, "signatures": {}}
        for (name, score), role in zip(COMMONSENSE.items(), ["report"] + ["report_x"] * 7, strict=True)
    ]
    console = Console(width=90, file=io.StringIO())
    show_scores(entries, record(68.9), console)
    assert isinstance(console.file, io.StringIO)
    last = console.file.getvalue().splitlines()[-1]
    assert last.startswith("average accuracy of 8 splits: 74.72")


def test_a_thousand_runs_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(1000):
        stored(tmp_path / str(index), record(index / 10, HEADS, FFN, seed=index))
    assert main([str(tmp_path), "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1001


def test_two_data_sets_are_told_apart_by_their_files() -> None:
    """And a run that was stopped is listed with its own, also if it had read no row yet."""
    runs = [
        record(50.0, test_file="a/test.csv", data={"scored_on": "a" * 64}),
        record(60.0, test_file="a/held_out.csv", data={"scored_on": "b" * 64}),
        record(None, method="stopped", status="interrupted", test_file="a/held_out.csv", data={"scored_on": "b" * 64}),
        record(None, method="waiting", status="interrupted", test_file="a/test.csv"),
    ]
    first, second = shown(runs, 200).split("\n\n")
    assert "(test.csv)" in first and "waiting" in first
    assert "(held_out.csv)" in second and "stopped" in second
    named_alike = [replace(run, test_file="b/test.csv") if run.score == 60.0 else run for run in runs[:2]]
    assert set(re.findall(r"\(./test.csv\)", shown(named_alike, 200))) == {"(a/test.csv)", "(b/test.csv)"}
    changed = [replace(run, test_file="test.csv") for run in runs[:2]]  # the same file with other rows
    assert "(data aaaaaaaa)" in shown(changed, 200)
    before = replace(runs[0], test_file=None, overrides=["task.test_file=old.csv"])  # an earlier version's record
    assert get_test_file(before) == "old.csv"


def test_a_run_below_a_baseline_is_marked_and_on_no_front() -> None:
    runs = [
        record(52.0, FFN, HEADS, method="below", counts=RecordedCounts(10_000, 10, 10, 0, None)),
        record(60.0, method="above", counts=RecordedCounts(10_000, 20, 20, 0, None)),
        record(61.0, method="best", counts=RecordedCounts(10_000, 30, 30, 0, None)),
    ]
    assert [row.first.method for row in find_front(make_rows(runs), FIELDS["stored"])] == ["above", "best"]
    text = shown(runs, 70)
    assert "52.00 ▽" in text and "60.00 ▽" not in text
    legend = " ".join(text.split("\n")[-3:])
    assert "* best of its column; ▽ below a baseline; " in legend and "baselines: majority 20.00, head 52.10" in legend
    wide = shown(runs, 200)
    assert "◆ on the Pareto front of score against stored parameters" in wide and "baselines:" not in wide
    assert "This score is below a baseline (baselines: majority 20.00, head 52.10)." in last_table(runs[0], 200)
    assert "below" not in last_table(runs[1], 200)


def test_debug_runs_are_never_ranked_with_others() -> None:
    """They have a table of their own, the last one, whose title says what they are."""
    first, second = shown([record(99.0, debug="smoke"), record(50.0), record(60.0)], 200).split("\n\n")
    assert "debug" not in first and "60.00*" in first
    assert "doctopic with mini@01234567 (debug=smoke) of" in second and "99.00" in second
