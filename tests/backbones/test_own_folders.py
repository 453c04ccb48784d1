"""Folders as people have them, with settings of another task, parts missing and files damaged: they work, or it is said
what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from peftbench.backbones.load import load_backbone
from peftbench.config.schema import EMBEDDED, Model, Task, TaskKind
from peftbench.tasks.tokens import Encoder
from peftbench.utils.errors import UserError


def own_folder(folder: Path, **changes: Any) -> Model:
    """A copy of the embedded backbone with other values in its config.json; None deletes a key."""
    shutil.copytree(EMBEDDED / "mini", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return Model(name="own", path=str(folder))


@pytest.mark.parametrize("left", ["multi_label_classification", "regression"])
def test_the_problem_type_of_a_folder_is_not_that_of_the_task(left: str, tmp_path: Path) -> None:
    task = Task(name="x", kind=TaskKind.classification, metric="accuracy", labels=["a", "b"])
    loaded = load_backbone(own_folder(tmp_path / "own", problem_type=left), task).model
    out = loaded(torch.tensor([[0, 5, 2]]), labels=torch.tensor([1]))
    expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([1]))
    assert torch.allclose(out.loss, expected)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "null", "its config.json is damaged"),
        ("config.json", "[" * 5000, "its config.json is damaged"),
        ("tokenizer_config.json", "null", "its tokenizer_config.json is damaged"),
        ("generation_config.json", "", "its generation_config.json is damaged"),
        ("tokenizer.json", "null", "cannot be loaded"),
        ("adapter_config.json", "{}", "has an adapter of peft beside the weights"),
    ],
)
def test_a_damaged_file_of_a_folder_is_named(file: str, text: str, said: str, tmp_path: Path) -> None:
    model = own_folder(tmp_path / "own")
    (tmp_path / "own" / file).write_text(text)
    with pytest.raises(UserError, match=said):
        load_backbone(model, Task(name="x", kind=TaskKind.text_to_text, metric="bleu"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "nope"}}, "knows no quantization_config of the method nope"),
        ({"quantization_config": "nope"}, "cannot be loaded"),
        ({"activation_function": "nope"}, "cannot be loaded|describes no model"),
        ({"d_model": "x"}, "cannot be loaded"),
    ],
)
def test_a_config_that_describes_nothing_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_backbone(
            own_folder(tmp_path / "own", **changes), Task(name="x", kind=TaskKind.text_to_text, metric="bleu")
        )


def test_a_missing_start_of_the_output_is_named(tmp_path: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=8192, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=None)
    ).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "mini" / file, tmp_path)
    with pytest.raises(UserError, match=r"decoder_start_token_id is missing in its config\.json"):
        load_backbone(Model(name="own", path=str(tmp_path)), Task(name="x", kind=TaskKind.text_to_text, metric="bleu"))


def test_a_model_gets_no_token_types_that_it_does_not_read(tmp_path: Path) -> None:
    loaded = load_backbone(own_folder(tmp_path / "own"), Task(name="x", kind=TaskKind.text_to_text, metric="bleu"))
    before = Encoder(loaded.tokenizer, loaded.model).fingerprint
    loaded.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoder = Encoder(loaded.tokenizer, loaded.model)
    assert set(encoder(["a b"], max_length=9)) == {"input_ids", "attention_mask", "source_cut"}
    assert encoder.fingerprint[:-1] == before  # what is cached for a model that reads them is not taken
