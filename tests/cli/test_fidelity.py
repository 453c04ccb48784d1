"""Runs with fidelity=released_code, from the command line to the record: what they list, print and keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from peftbench.cli.main import main
from peftbench.config.fidelity import SWITCHES
from peftbench.config.schema import EMBEDDED
from tests.families import build

MINI = EMBEDDED / "mini"


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A folder of labelled sentences, as `task=sst2 task.data_dir=` reads it."""
    folder = tmp_path / "sentences"
    folder.mkdir()
    rows = [f"{'a fine film' if i % 2 else 'a dull film'} number {i}\t{i % 2}" for i in range(16)]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return folder


def backbone(family: str, folder: Path) -> Path:
    """A tiny random model in a folder, with the embedded backbone's tokenizer."""
    build(family, vocab_size=8192).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder)
    return folder


def words_of(tmp_path: Path, sentences: Path, family: str, *overrides: str) -> list[str]:
    """The command line of a run of two steps."""
    model = backbone(family, tmp_path / family)
    run = ["task=sst2", f"model.path={model}", f"task.data_dir={sentences}", "debug=smoke", "trainer.max_steps=2"]
    return ["train", *run, f"output_dir={tmp_path / 'outputs'}", "bottleneck=4", *overrides]


def trained(tmp_path: Path, sentences: Path, family: str, *overrides: str) -> dict[str, Any]:
    """The record of such a run."""
    assert main(words_of(tmp_path, sentences, family, *overrides)) == 0
    (file,) = (tmp_path / "outputs").rglob("record.json")
    record: dict[str, Any] = json.loads(file.read_text())
    return {**record, "folder": file.parent}


HEAD, BEFORE, NORM, INIT, MLP, QUERY, RESIDUAL, DEAD = SWITCHES


@pytest.mark.parametrize(
    ("family", "method", "expected"),
    [
        ("bart", "mh_parallel_adapter", [HEAD, MLP, QUERY]),
        ("mbart", "pa_attention_pa_ffn", [HEAD, BEFORE, NORM, RESIDUAL]),
        ("roberta", "mam", [HEAD, DEAD]),
    ],
)
def test_the_record_lists_the_deviations_in_force(
    family: str,
    method: str,
    expected: list[str],
    tmp_path: Path,
    sentences: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the method and family and no others, each with its sentence; the table of results shows them."""
    record = trained(tmp_path, sentences, family, f"method={method}", "fidelity=released_code")
    assert record["status"] == "done" and record["fidelity"] == "released_code"
    assert record["deviations"] == [{"name": name, "sentence": SWITCHES[name].sentence} for name in expected]
    assert record["counts"]["head"] == 0
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    assert main(["results", str(tmp_path / "outputs")]) == 0
    printed = capsys.readouterr().out
    assert "as in the code" in printed
    assert [name for name in expected if name.replace("_", " ") not in printed] == []
    assert main(["results", str(tmp_path / "outputs"), "--csv"]) == 0
    assert ",".join(("", " ".join(expected), "")) in capsys.readouterr().out


def test_what_ran_is_what_the_record_says(tmp_path: Path, sentences: Path) -> None:
    """Axes, options and counts are those of the code's adapter; what of the head the folder lacks is in the file."""
    record = trained(tmp_path, sentences, "roberta", "method=parallel_adapter_attention", "fidelity=released_code")
    (axes,) = record["axes"]
    assert axes["modified_representation"] == "heads_joint" and axes["options"]["layer_norm"] == "input"
    place = 2 * 4 * 16 + 4 + 16 + 2 * 16  # weights and biases of an adapter with r = 4, d = 16, and its norm
    assert record["counts"]["trained"] == record["counts"]["stored"] == 2 * place
    file = load_file(record["folder"] / "adapter" / "adapter.safetensors")
    drawn = {name: tensor.numel() for name, tensor in file.items() if name.startswith("classifier")}
    assert drawn == {"classifier.out_proj.weight": 2 * 16, "classifier.out_proj.bias": 2}  # the folder's has 3 labels
    assert sum(tensor.numel() for tensor in file.values()) == 2 * place + 34


def test_a_run_as_the_paper_says_lists_none(
    tmp_path: Path, sentences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = trained(tmp_path, sentences, "roberta", "method=mam")
    assert (record["fidelity"], record["deviations"], record["counts"]["dead"]) == ("paper", [], 0)
    capsys.readouterr()
    assert main(["results", str(tmp_path / "outputs")]) == 0
    assert "as in the code" not in capsys.readouterr().out


def test_a_switch_of_another_family_is_refused_in_a_sentence(
    tmp_path: Path, sentences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tmp_path, sentences, "roberta", "method=mam", "fidelity.mbart_ffn_adapter_reads_residual=true")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "fidelity.mbart_ffn_adapter_reads_residual=true changes nothing on roberta" in error
    assert "Traceback" not in error


def test_params_shows_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["params", "method=mam", "task=sst2", "fidelity=released_code"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "As in the paper's released code, not its text:" in lines
    assert "dead, in addition 31,087,360" in lines
    assert main(["params", "method=mam", "task=sst2", "fidelity=released_code", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["fidelity"], found["deviations"], found["dead"]) == ("released_code", [HEAD, DEAD], 31_087_360)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["params", "-m", "method=parallel_adapter_attention", "task=xsum", "fidelity=paper,released_code"]) == 0
    printed = capsys.readouterr().out
    assert "as in the code" in printed and "attention adapter norm" in printed
    assert "14,789,664" in printed and "14,863,392" in printed
