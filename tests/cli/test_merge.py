"""`peftbench merge`: the folder that it writes, and the runs that it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from peftbench.backbones.load import load_backbone
from peftbench.cli.main import main
from peftbench.evaluation.finished import read_changed_run
from peftbench.modification.attach import attach_run
from peftbench.modification.state import load as load_adapter
from peftbench.records.saved import read_saved_record
from peftbench.utils.files import write_lines

pytestmark = pytest.mark.slow
SMOKE = ("model=mini", "debug=smoke", "trainer.max_steps=3", "trainer.learning_rate=0.1")
TEXTS = ["Rain fell on the town for a week.", "The sun came out."]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Files that both kinds of task read."""
    row = {"document": "A text about rain.", "summary": "Rain.", "sentence": "a"}
    rows = [{**row, "label": i % 2} for i in range(24)]
    for name in ("train", "validation", "test"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    return [f"task.data_dir={tmp_path}", f"output_dir={tmp_path / 'outputs'}"]


def trained(data: list[str], *overrides: str) -> Path:
    assert main(["train", *SMOKE, *data, *overrides]) == 0
    (file,) = Path(data[1].partition("=")[2]).rglob("record.json")
    return file.parent


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """In float64, so that the rounding of the merged weights is all that two models may differ by; the noise of float32
    arithmetic is another one on each processor."""
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    more = {"decoder_input_ids": batch["input_ids"]} if "Conditional" in type(model).__name__ else {}
    with torch.no_grad():
        found: torch.Tensor = model.double().eval()(**batch, **more).logits
    return found


def unmerged(run: Path) -> torch.Tensor:
    """The logits of the run's adapter beside the backbone."""
    config = read_changed_run(run, read_saved_record(run), [])
    backbone = load_backbone(config.model, config.task)
    attach_run(backbone.model, config, backbone.untrained)
    load_adapter(backbone.model, run / "adapter", backbone.untrained)
    return logits(backbone.model, backbone.tokenizer)


@pytest.mark.parametrize(
    "overrides",
    [
        ("task=xsum", "method=lora_ffn"),
        ("task=sst2", "method=lora"),
        ("task=sst2", "method=bitfit"),
    ],
    ids=["lora_ffn", "lora", "bitfit"],
)
def test_merged_folder_needs_no_peftbench(
    data: list[str], overrides: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained(data, *overrides), tmp_path / "merged"
    assert main(["merge", str(run), "--out", str(out)]) == 0
    auto = AutoModelForSeq2SeqLM if overrides[0] == "task=xsum" else AutoModelForSequenceClassification
    assert f"{out}: load it with transformers' " in capsys.readouterr().out
    loaded = auto.from_pretrained(out)
    expected = unmerged(run)
    assert (logits(loaded, AutoTokenizer.from_pretrained(out)) - expected).abs().max() < 1e-5 * expected.abs().max()
    before = auto.from_pretrained(read_changed_run(run, read_saved_record(run), []).model.path, num_labels=2)
    state = before.state_dict()
    backbone = [name for name in state if "layers" in name]
    assert any(not torch.equal(loaded.state_dict()[name].float(), state[name]) for name in backbone)
    assert main(["merge", str(run), "--out", str(out)]) == 2
    assert "give a folder that is new or empty" in capsys.readouterr().err


def test_refusals(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence, before any weights are read."""
    run, out = trained(data, "task=xsum", "method=mam"), tmp_path / "merged"
    capsys.readouterr()
    assert main(["merge", str(run), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        "peftbench: method=mam cannot be merged into the backbone's weights: mix.attention: it adds vectors "
        "for the attention to look at, which no weight can hold; its functional form is not linear.\n"
    )
    assert not out.exists()
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    assert main(["merge", str(run), "--out", str(out)]) == 2
    assert "has a run that is not done" in capsys.readouterr().err
