"""`model.attn_implementation` and `trainer.optimizer`: names, identity, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.training_args import OptimizerNames

from peftbench.backbones.precision import choose_autocast_dtype
from peftbench.config import schema
from peftbench.config.identity import hash_run
from peftbench.config.validity import find_faults
from peftbench.records.recording import describe_run
from peftbench.training import fit
from peftbench.utils.errors import UserError
from tests.families import PRESETS, build, run_on
from tests.fitting import Targets, fitted, model_of, one_step, trained


def run_in(folder: Path, preset: str = "lora", **keys: Any) -> schema.Run:
    run = run_on("bart", folder, PRESETS[preset])
    model = replace(run.model, sizes="x", attn_implementation=keys.pop("attn_implementation", None))
    return replace(run, model=model, trainer=schema.Trainer(learning_rate=1e-3, **keys))


def test_the_names_are_transformers() -> None:
    assert set(schema.OPTIMIZERS) - {"adamw"} <= {name.value for name in OptimizerNames}


def test_an_unknown_optimiser_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    (found,) = [fault for fault in find_faults(run_in(tmp_path, optimizer="adafactr")) if "optimizer" in fault]
    assert found.startswith("trainer.optimizer=adafactr is unknown; did you mean adafactor?")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fit.require_optimizer("adamw")
    monkeypatch.setattr(fit, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"^trainer.optimizer=lion_8bit needs bitsandbytes.*peftbench\[quant\]\.$"):
        fit.require_optimizer("lion_8bit")


def test_float16_needs_a_gpu_and_a_backbone_in_float32(tmp_path: Path) -> None:
    run = run_in(tmp_path, precision=schema.Precision.fp16, device=schema.Device.cpu)
    with pytest.raises(UserError, match=r"^trainer\.precision=fp16 needs a GPU"):
        choose_autocast_dtype(run.trainer, run.model, build("bert"))
    half = replace(run, model=replace(run.model, dtype=schema.DType.bfloat16))
    assert any(fault.startswith("trainer.precision=fp16 with model.dtype=bfloat16") for fault in find_faults(half))


def test_keys_at_their_defaults_are_no_part_of_a_name_or_record(tmp_path: Path) -> None:
    plain = run_in(tmp_path)
    others = [run_in(tmp_path, optimizer="adafactor"), run_in(tmp_path, attn_implementation="eager")]
    assert len({hash_run(run) for run in (plain, *others)}) == 3
    assert "optimizer" not in describe_run(plain, tmp_path, []).trainer
    assert describe_run(others[0], tmp_path, []).trainer["optimizer"] == "adafactor"


def test_the_optimiser_is_the_one_that_is_named(tmp_path: Path) -> None:
    """A step of SGD is the learning rate times the gradient, which AdamW's is not."""
    moved = []
    for rate in (1e-3, 2e-3):
        model = model_of("bart", "lora")
        before = {name: tensor.detach().clone() for name, tensor in trained(model).items()}
        fitted(model, Targets("bart"), one_step(optimizer="sgd", learning_rate=rate), tmp_path)
        moved.append({name: tensor.detach() - before[name] for name, tensor in trained(model).items()})
    assert max(float(step.abs().max()) for step in moved[0].values()) < 1.0
    for name, step in moved[0].items():
        assert float((2 * step - moved[1][name]).abs().max()) < 1e-5
    sizes = {round(float(step.abs().max()), 7) for step in moved[0].values()}
    assert len(sizes) > 1


@pytest.mark.parametrize("preset", ["prefix", "prompt", "mam"])
def test_an_attention_function_that_ours_would_replace_is_refused(tmp_path: Path, preset: str) -> None:
    found = find_faults(run_in(tmp_path, preset, attn_implementation="eager"))
    assert any(fault.startswith("model.attn_implementation=eager with ") for fault in found)
    assert not any("attn" in fault for fault in find_faults(run_in(tmp_path, preset, attn_implementation="sdpa")))
    assert not any("attn" in fault for fault in find_faults(run_in(tmp_path, attn_implementation="eager")))
