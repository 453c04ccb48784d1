"""Layers whose frozen weights are shared by two processes train and predict as whole ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from peftbench.cli.main import main
from peftbench.config.schema import Keep
from peftbench.evaluation.predict import compute_mean_loss, predict
from peftbench.training.sharding import is_sharded, shard_layers
from peftbench.utils.errors import UserError
from peftbench.utils.team import ALONE, Team
from tests.cli.test_train import sentiment, smoke
from tests.fitting import Targets, fitted, model_of, one_step, trained
from tests.teamwork import run_together
from tests.training.test_devices import Gradients

__all__ = ["sentiment", "smoke"]  # fixtures

POINTS = [("bart", "mam"), ("roberta", "lora"), ("llama", "mam")]


def sharded(family: str, method: str, team: Team) -> PreTrainedModel:
    model = model_of(family, method)
    if team.size > 1:
        whole = sum(p.numel() for p in model.parameters())
        shard_layers(model, team, torch.device("cpu"))
        held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        assert is_sharded(model) and held < 0.9 * whole
    return model


def case_steps(team: Team, folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor], list[float]]]:
    """The gradients of one step, and five steps in batches of which some leave a process nothing."""
    found = {}
    for family, method in POINTS:
        gradients, logged = Gradients(), list[dict[str, Any]]()
        fitted(sharded(family, method, team), Targets(family), one_step(), folder, team=team, callbacks=[gradients])
        model, data = sharded(family, method, team), Targets(family)
        settings = one_step(
            max_steps=5,
            batch_size=7,
            learning_rate=1e-3,
            epsilon=1e-6,
            gradient_checkpointing=family != "roberta",
            padding_free=family == "roberta",
            keep=Keep.best,
            evaluate_every=2,
        )

        def evaluate(model: PreTrainedModel = model, data: Targets = data) -> dict[str, float]:
            logits = predict(model, data.selection.remove_columns("labels"), data.collator, 3, team=team)
            return {"accuracy": float(np.abs(logits).sum())}

        fitted(model, data, settings, folder, team=team, log=logged.append, evaluate=evaluate, metric="accuracy")
        losses = [line["loss"] for line in logged if "loss" in line]
        found[f"{family} {method}"] = (gradients.found, trained(model), losses)
    return found


def case_predictions(team: Team, folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for family, method in POINTS:
        model, data = sharded(family, method, team).eval(), Targets(family)
        given, generation = data.selection.remove_columns("labels"), None
        found[f"{family} {method} logits"] = predict(model, given, data.collator, 3, team=team)
        if family != "roberta":
            ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2}
            generation = GenerationConfig(num_beams=2, max_new_tokens=6, **ends)
            found[f"{family} {method} text"] = predict(model, given, data.collator, 3, generation=generation, team=team)
            loss = compute_mean_loss(model, data.selection, data.collator, 3, team=team)
            found[f"{family} {method} loss"] = np.array(loss)
    return found


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    return run_together(__name__, ["steps", "predictions"])


@pytest.mark.slow
def test_sharded_layers_train_as_whole_ones(together: list[dict[str, Any]], tmp_path: Path) -> None:
    for name, (gradients, tensors, losses) in case_steps(ALONE, tmp_path).items():
        for found in together:
            theirs = found["steps"][name]
            assert theirs[0].keys() == gradients.keys() and len(losses) == 5
            for key, gradient in gradients.items():
                torch.testing.assert_close(theirs[0][key], gradient, rtol=1e-5, atol=1e-6, msg=name)
            for key, tensor in tensors.items():
                torch.testing.assert_close(theirs[1][key], tensor, rtol=1e-3, atol=1e-4, msg=name)
            assert theirs[2] == pytest.approx(losses, abs=1e-5)


@pytest.mark.slow
def test_sharded_layers_predict_as_whole_ones(together: list[dict[str, Any]], tmp_path: Path) -> None:
    for name, expected in case_predictions(ALONE, tmp_path).items():
        for found in together:
            np.testing.assert_allclose(found["predictions"][name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_cannot_be_sharded_is_refused() -> None:
    model = model_of("bart", "lora")
    model.config.encoder_layerdrop = 0.1
    with pytest.raises(UserError, match=r"encoder_layerdrop=0\.1|needs torch 2\.8"):
        shard_layers(model, ALONE, torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.sharding=full"], "trainer.sharding=full needs several devices"),
        (["trainer.sharding=full", "method=full"], "trainer.sharding=full with unfreeze=all"),
        (["trainer.sharding=full", "trainer.compile=layers"], "trainer.sharding=full with trainer.compile=layers"),
        (["trainer.sharding=full", "trainer.micro_batch=2"], "trainer.sharding=full with trainer.micro_batch=2"),
        (["trainer.sharding=full", "model.quantization=nf4"], "trainer.sharding=full with model.quantization=nf4"),
        (["trainer.devices=0"], "trainer.devices=0: it must be a whole number of at least 1, or auto"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    words: list[str], said: str, smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *smoke, "trainer.device=cpu", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "outputs").rglob("record.json"))
