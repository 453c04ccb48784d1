"""`peftbench export`: the folder that it writes, what it says of it, and its upload."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peftbench import load_run
from peftbench.backbones.hub import explain_missing_hub
from peftbench.cli.main import main
from peftbench.config.schema import EMBEDDED
from peftbench.exchange import export
from peftbench.records.record import load_records
from peftbench.utils.errors import UserError
from tests.hub import hub

pytestmark = pytest.mark.slow
MINI = EMBEDDED / "mini"
TEXTS = ["Return the mean of an array.", "Open a file."]


def train(outputs: Path, *words: str) -> Path:
    """The folder of a short run, on the docstrings of Python."""
    smoke = ("debug=smoke", "trainer.max_steps=3", "trainer.learning_rate=0.1", f"output_dir={outputs}")
    assert main(["train", *smoke, *words]) == 0
    return load_records(outputs)[0][-1].folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("outputs"), "method=lora")


def test_the_folder_is_what_peft_reads(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its head, and with the record's figures in its card."""
    out = tmp_path / "peft"
    assert main(["export", str(run), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{out}: LORA of rank 24 at q_proj, v_proj" in told
    assert "its logits differ from the run's by at most 0;" in told
    assert sorted(file.name for file in out.iterdir()) == [export.CARD, export.CONFIG, export.TENSORS]

    ours, _ = load_run(run)
    batch = AutoTokenizer.from_pretrained(MINI)(TEXTS, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    base = AutoModelForSequenceClassification.from_pretrained(MINI, num_labels=5, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(out)).eval()
    with torch.no_grad():
        assert torch.equal(theirs(**batch).logits, ours(**batch).logits)

    card, record = (out / export.CARD).read_text(), json.loads((run / "record.json").read_text())
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft" and "base_model" not in head
    assert f"| accuracy | {record['score']:.2f} |" in card
    assert f"{record['counts']['stored']:,}" in card
    assert str(Path.cwd()) not in card and str(MINI) not in card

    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "give a folder that is new or empty" in capsys.readouterr().err


def test_another_model_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is not kept if peft computes something else with it, as with another scale."""
    write = export.dump_json
    monkeypatch.setattr(export, "dump_json", lambda config, indent: write({**config, "lora_alpha": 1.0}, indent))
    assert main(["export", str(run), "--out", str(tmp_path / "peft")]) == 2
    assert "so that this is another model there; nothing is kept" in capsys.readouterr().err
    assert not list((tmp_path / "peft").iterdir())


def test_a_run_without_a_form_in_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mam = train(tmp_path / "outputs", "method=mam")
    capsys.readouterr()
    assert main(["export", str(mam), "--out", str(tmp_path / "peft")]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("peftbench: method=mam has no form in peft: mix.attention: its prefix vectors have no")
    assert not (tmp_path / "peft").exists()


def test_upload_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three files and nothing else; without a log-in or a hub one sentence, and the folder stays."""
    folder, published = tmp_path / "peft", tmp_path / "published"
    folder.mkdir()
    published.mkdir()
    files = {export.CARD: b"---\nlibrary_name: peft\n---\n", export.CONFIG: b"{}", export.TENSORS: bytes(range(256))}
    for name, content in {**files, "notes.txt": b"mine"}.items():
        (folder / name).write_bytes(content)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with hub(published) as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        explain_missing_hub.cache_clear()
        assert export.push_folder(folder, "me/adapter") == f"{url}/me/adapter"
        uploaded = {file.name: file.read_bytes() for file in (published / "models/me/adapter").iterdir()}
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UserError, match=r"^--push me/adapter: the hub refuses \(.*401.*the folder .* is complete"):
            export.push_folder(folder, "me/adapter")
    assert uploaded == files
    explain_missing_hub.cache_clear()
    with pytest.raises(UserError, match=r"^--push me/adapter: 127.0.0.1 cannot be reached from here; the folder"):
        export.push_folder(folder, "me/adapter")
    explain_missing_hub.cache_clear()


def test_the_way_back(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same score to the last digit; and what a run can be used for, an imported one can."""
    record = json.loads((run / "record.json").read_text())
    peft, again = tmp_path / "peft", tmp_path / "outputs" / "again"
    assert main(["export", str(run), "--out", str(peft)]) == 0
    words = ["task.max_eval=16", "task.max_source_length=48", "--task", "doctopic"]
    assert main(["import", str(peft), *words, "--out", str(again)]) == 0
    told = capsys.readouterr().out
    assert "Its logits differ from peft's by at most 0." in told
    assert f"accuracy {record['score']!r}" in told
    imported = json.loads((again / "record.json").read_text())
    assert (imported["score"], imported["counts"]) == (record["score"], record["counts"])
    lines = [file.read_text() for file in (run / "predictions.jsonl", again / "predictions.jsonl")]
    assert lines[0] == lines[1]
    assert (again / "adapter" / "adapter.safetensors").read_bytes() == (
        run / "adapter" / "adapter.safetensors"
    ).read_bytes()
    assert imported["run"] != record["run"]

    assert main(["evaluate", str(again)]) == 0
    assert "as in the record" in capsys.readouterr().out
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    assert main(["predict", str(again), str(tmp_path / "lines.txt")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["merge", str(again), "--out", str(tmp_path / "merged")]) == 0
    assert main(["rescore", str(again), "macro_f1"]) == 0
    capsys.readouterr()
    assert main(["compare", str(run), str(again)]) == 0
    compared = capsys.readouterr().out
    assert "0.00" in compared and "trainer." not in compared
    assert main(["results", str(tmp_path / "outputs")]) == 0
    assert "lora" in capsys.readouterr().out
    assert main(["export", str(again), "--out", str(tmp_path / "peft2")]) == 0
    assert (tmp_path / "peft2" / export.TENSORS).read_bytes() == (peft / export.TENSORS).read_bytes()
