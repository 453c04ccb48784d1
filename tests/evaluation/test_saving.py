"""What a model with an adapter may be written by: nothing that would drop it without a word."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from peftbench import load_run
from peftbench.cli.main import main
from peftbench.config.schema import Unfreeze
from peftbench.evaluation.finished import keep_from_saving
from peftbench.modification.attach import attach
from peftbench.modification.state import fold, list_trained
from peftbench.records.record import load_records
from peftbench.utils.errors import UserError
from tests.families import FAMILIES, MORE_FAMILIES, PRESETS, batch, build, shake

MERGEABLE = ("lora", "lora_ffn", "ia3")


def adapted(family: str, preset: str) -> PreTrainedModel:
    """As `load_run` gives it: folded, in evaluation mode, its weights random."""
    model = build(family)
    attach(model, PRESETS[preset])
    shake(model)
    fold(model)
    keep_from_saving(model, Path("outputs/run"))
    return model.eval()


def logits(model: PreTrainedModel, family: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch(family)).logits
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_is_not_dropped_without_a_word(preset: str, tmp_path: Path) -> None:
    model = adapted("bart", preset)
    for method in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(UserError, match=r"would write the model without its adapter") as caught:
            method(tmp_path / "out", safe_serialization=True)
        (sentence,) = caught.value.faults
        assert ("peftbench merge outputs/run --out FOLDER" in sentence) == (preset in MERGEABLE)
        assert "outputs/run/adapter/adapter.safetensors" in sentence
    assert not (tmp_path / "out").exists()


# Each preset on BART. What copies a module does not look at its family: on RoBERTa and Llama a preset for each kind of
# hook and buffer is enough.
COPIED = [("bart", preset) for preset in PRESETS]
COPIED += [(family, preset) for family in ("roberta", "llama") for preset in ("mam", "lora", "adapter", "ia3")]


@pytest.mark.parametrize(("family", "preset"), COPIED)
def test_what_copies_the_model_keeps_its_adapter(family: str, preset: str) -> None:
    """deepcopy, pickle, torch.save of the model, and state_dict into another model with the same modifications."""
    model = adapted(family, preset)
    expected = logits(model, family)
    assert not torch.equal(expected, logits(build(family), family))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = adapted(family, preset)
    shake(other, seed=9)
    other.load_state_dict(model.state_dict())
    copies = (
        deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        other,
    )
    for copy in copies:
        assert torch.equal(logits(copy, family), expected)
        with pytest.raises(UserError, match="without its adapter"):
            copy.save_pretrained("/nowhere")
    assert list_trained(model).keys() <= model.state_dict().keys()


@pytest.mark.parametrize("unfreeze", ["all", "bias", "norm"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_without_modules_of_its_own_a_run_is_saved_as_it_was_trained(
    family: str, unfreeze: str, tmp_path: Path
) -> None:
    model = build(family)
    try:
        attach(model, {}, Unfreeze[unfreeze])
    except UserError as error:
        assert "has no bias to train" in str(error)
        return
    shake(model)
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert torch.equal(logits(again, family), logits(model, family))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mam", "lora", "bitfit"])
def test_a_run_that_was_loaded(method: str, tmp_path: Path) -> None:
    words = [
        "model=mini",
        "debug=smoke",
        "trainer.max_steps=2",
        f"method={method}",
        f"output_dir={tmp_path / 'outputs'}",
    ]
    assert main(["train", *words]) == 0
    (record,) = load_records(tmp_path / "outputs")[0]
    model, _ = load_run(record.folder)
    if method == "bitfit":
        model.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved")
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
        return
    with pytest.raises(UserError, match=rf"without its adapter.*{record.folder}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    if method == "lora":  # what the sentence says to do
        assert main(["merge", str(record.folder), "--out", str(tmp_path / "saved")]) == 0
        again = type(model).from_pretrained(tmp_path / "saved").eval()
        ids = torch.tensor([[0, 17, 250, 31, 2]])
        with torch.no_grad():
            assert (again(ids).logits - model(ids).logits).abs().max() < 1e-4
