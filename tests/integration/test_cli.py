"""The command line as a user meets it: what it prints, what it records, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli import main

SUBPROCESS = [sys.executable, "-m", "peftbench"]


@pytest.fixture
def sentiment(tmp_path: Path) -> Path:
    """A folder of labelled sentences, as `task=sst2 task.data_dir=` reads it."""
    folder = tmp_path / "sentiment"
    folder.mkdir()
    rows = [f"{'a fine film' if i % 2 else 'a dull film'} number {i}\t{i % 2}" for i in range(40)]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def smoke(tmp_path: Path, sentiment: Path) -> list[str]:
    """Overrides of a run of a few seconds."""
    return [
        "task=sst2",
        "model=mini",
        f"task.data_dir={sentiment}",
        "debug=smoke",
        "trainer.max_steps=2",
        f"output_dir={tmp_path / 'outputs'}",
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.rglob("record.json"))]


def test_help_imports_no_torch() -> None:
    code = "import sys; from peftbench.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "peftbench train" in done.stdout


def test_refusing_imports_no_torch() -> None:
    code = (
        "import sys; from peftbench.cli import main; code = main(['train', 'method=lroa']); "
        "sys.exit('torch' in sys.modules or code != 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "did you mean lora?" in done.stderr


def test_one_run_leaves_a_whole_record(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *smoke, "method=mam"]) == 0
    (record,) = records(tmp_path / "outputs")
    folder = next((tmp_path / "outputs").rglob("record.json")).parent
    assert record["status"] == "done" and record["method"] == "mam"
    assert [axes["prefix"] for axes in record["axes"]] == ["", "mix.attention."]
    counts = record["counts"]
    assert counts["stored"] < counts["trained"]
    assert record["scores"]["report"]["examples"] == 16
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        ".lock",
        "adapter/adapter.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "predictions.jsonl",
        "record.json",
    ]
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 16
    printed = capsys.readouterr().out
    assert "relu · ffn · parallel · scaled" in printed and str(folder) in printed.replace("\n", "")


def test_a_finished_run_is_not_trained_again(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *smoke, "method=head"]
    assert main(arguments) == 0
    created = [record["created"] for record in records(tmp_path / "outputs")]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "done already" in capsys.readouterr().out
    assert [record["created"] for record in records(tmp_path / "outputs")] == created
    assert main([*arguments, "rerun=true"]) == 0
    assert [record["created"] for record in records(tmp_path / "outputs")] != created


def test_a_sweep_runs_every_combination(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["method=adapter", "insertion_form=sequential,parallel", "modified_representation=attention,ffn"]
    assert main(["train", "-m", *smoke, *sweep]) == 0
    found = records(tmp_path / "outputs")
    points = {(r["axes"][0]["insertion_form"], r["axes"][0]["modified_representation"]) for r in found}
    assert len(found) == len(points) == 4 and all(record["status"] == "done" for record in found)
    assert "4 of 4 runs are done." in capsys.readouterr().out


def test_one_failing_run_does_not_stop_a_sweep(
    smoke: list[str], tmp_path: Path, sentiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault that only the loaded model shows: the sweep goes on, its table names it, and the exit code is 1."""
    arguments = ["train", "-m", *smoke, "method=lora", "modified_representation.layers=[99],[0]"]
    assert main(arguments) == 1
    assert sorted(str(record["status"]) for record in records(tmp_path / "outputs")) == ["done", "failed"]
    captured = capsys.readouterr()
    assert "modified_representation.layers: 99 is outside" in captured.err
    assert "1 of 2 runs are done." in captured.out


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        (["method=lroa"], ["method=lroa is unknown; did you mean lora?"]),
        (["functional_form=reluu"], ["functional_form=reluu is unknown; did you mean relu?"]),
        (["bottleneck=-3"], ["bottleneck=-3: the bottleneck must be a whole number of at least 1."]),
        (["bottleneck=many"], ["bottleneck=many: a whole number is expected."]),
        (["init=brt"], ["init=brt is unknown; did you mean bert?"]),
        (["bottlenek=3"], ["bottlenek is no key of the config; did you mean bottleneck?"]),
        (["trainer.epoch=3"], ["trainer.epoch is no key of the config (in trainer); did you mean epochs?"]),
        (["task.data_dir=/nowhere"], ["task.data_dir=/nowhere is not a folder"]),
        (["model.path=/nowhere"], ["model.path=/nowhere is not a folder"]),
        (["bottleneck=8,16"], ["add -m to run each of them"]),
        (
            ["composition_function=gated", "functional_form=relu", "insertion_form=sequential"],
            ["composition_function=gated with insertion_form=sequential means nothing"],
        ),
        (["model.dtype=bfloat16", "trainer.precision=fp32"], ["runs under bfloat16 autocast"]),
        (["method=mam", "modified_representation.attentions=[self]"], ["modified_representation=ffn has none"]),
        (["method=prompt", "modified_representation.layers=[0]"], ["stands before the first stack"]),
        (["method=full", "functional_form=relu"], ["a modification needs all four axes"]),
        (
            ["method=lroa", "bottleneck=-3", "trainer.learning_rate=0"],
            ["did you mean lora?", "bottleneck=-3", "trainer.learning_rate=0"],
        ),
    ],
)
def test_bad_overrides_are_refused_in_sentences(
    overrides: list[str], sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"output_dir={tmp_path}/outputs", *overrides]) == 2
    error = capsys.readouterr().err
    assert all(sentence in error for sentence in sentences)
    assert "Traceback" not in error and len(error.splitlines()) == len(sentences)
    assert not (tmp_path / "outputs").exists()


def _torn(folder: Path) -> None:
    (folder / "train.tsv").unlink()
    (folder / "train.jsonl").write_text('{"sentence": "fine", "label": 1}\n{"sentence": "to')


def _unknown_label(folder: Path) -> None:
    (folder / "train.tsv").write_text("sentence\tlabel\nfine\t1\nodd\t7\n")


def _missing_column(folder: Path) -> None:
    (folder / "train.tsv").write_text("sentence\tgrade\nfine\t1\n")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [(_torn, "train.jsonl:2"), (_unknown_label, "train.tsv, row 2"), (_missing_column, "task.label_column")],
)
def test_bad_files_are_named_with_their_line(
    spoil: Callable[[Path], None],
    sentence: str,
    smoke: list[str],
    sentiment: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(sentiment)
    with pytest.raises(SystemExit) as exit:
        main(["train", *smoke, "method=head"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert [record["status"] for record in records(tmp_path / "outputs")] == ["failed"]


def test_a_model_folder_without_config_and_a_hub_id_without_network(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftbench.backbone.hub_missing", lambda: "the hub cannot be reached from here")
    (tmp_path / "empty").mkdir()
    for override, sentence in (
        (f"model.path={tmp_path / 'empty'}", "has no config.json"),
        ("model=roberta_base", "is not in this machine's cache and the hub cannot be reached"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["train", *smoke, override])
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_results_as_table_json_and_csv(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = tmp_path / "outputs"
    main(["train", *smoke, "method=lora"])
    torn = outputs / "torn"
    torn.mkdir()
    (torn / "record.json").write_text('{"schema_version": 1, "meth')
    capsys.readouterr()
    assert main(["results", str(outputs)]) == 0
    captured = capsys.readouterr()
    assert "lora" in captured.out and "torn/record.json is left out" in captured.err
    assert main(["results", str(outputs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["method"] == "lora"
    assert main(["results", str(outputs), "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("folder,")
    assert main(["results", str(tmp_path / "nowhere")]) == 2


def test_a_users_own_folder_adds_methods(smoke: list[str], tmp_path: Path) -> None:
    preset = tmp_path / "own" / "method" / "tiny_lora.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("# @package _global_\ndefaults:\n  - lora\nmethod: tiny_lora\nbottleneck: 1\n")
    assert main(["train", *smoke, "method=tiny_lora", "--config-dir", str(tmp_path / "own")]) == 0
    (record,) = records(tmp_path / "outputs")
    assert record["method"] == "tiny_lora" and record["axes"][0]["bottleneck"] == 1


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--info", "defaults-tree"], ["--help"]])
def test_hydras_own_flags_work(arguments: list[str]) -> None:
    done = subprocess.run([*SUBPROCESS, "train", "method=lora", *arguments], capture_output=True, text=True)
    assert done.returncode == 0
    assert "functional_form" in done.stdout


def test_tab_completion_knows_groups_and_choices() -> None:
    line = "peftbench train method=ma"
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run([*SUBPROCESS, "-sc", "query=bash"], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["method=mam"]


def test_ctrl_c_leaves_an_interrupted_record(smoke: list[str], tmp_path: Path) -> None:
    arguments = [*SUBPROCESS, "train", *smoke, "method=lora", "trainer.max_steps=100000"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "outputs").rglob("metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.5)
        if any((tmp_path / "outputs").rglob("record.json")) and time.monotonic() > deadline - 90:
            break  # it trains, though nothing has been logged yet
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert [record["status"] for record in records(tmp_path / "outputs")] == ["interrupted"]
