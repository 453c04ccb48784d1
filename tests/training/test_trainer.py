"""The classes that extend transformers' Trainer work by themselves, with what their constructors take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from peftbench.training.checkpoint import NOTES, TENSORS, Resumable
from peftbench.training.micro_batch import MicroBatched, MicroBatches
from peftbench.training.noise import OwnNoise
from peftbench.utils.team import ALONE
from tests.fitting import EPSILON, EXAMPLES, Targets, model_of, trained


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=EXAMPLES,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        adam_epsilon=EPSILON,
        max_grad_norm=1e9,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )


def test_micro_batched_takes_the_whole_batchs_step(arguments: TrainingArguments) -> None:
    data, found = Targets("bart"), []
    for setting in (None, "2"):
        model = model_of("bart", "lora")
        before, micro = trained(model), MicroBatches(setting, EXAMPLES, [])
        trainer = MicroBatched(
            model=model,
            args=arguments,
            data_collator=data.collator,
            train_dataset=data.train,
            micro=micro,
            team=ALONE,
            noise=OwnNoise(1, ALONE),
        )
        trainer.train()
        found.append({name: tensor - before[name] for name, tensor in trained(model).items()})
        assert micro.parts == (1 if setting is None else 4)
    whole, split = found
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)
    assert any(step.abs().max() > 1e-3 for step in whole.values())


def test_resumable_writes_only_what_is_trained_and_its_notes(arguments: TrainingArguments, tmp_path: Path) -> None:
    model, notes = model_of("bart", "lora"), {"stamp": "these data"}
    Resumable(model=model, args=arguments, notes=lambda: notes).save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / NOTES).read_text()) == notes
    tensors = load_file(tmp_path / "saved" / TENSORS)
    assert tensors.keys() == trained(model).keys() and 0 < len(tensors) < len(model.state_dict())
    other = model_of("bart", "lora")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    Resumable(model=other, args=arguments, notes=dict)._load_from_checkpoint(str(tmp_path / "saved"))
    torch.testing.assert_close(trained(other), trained(model), rtol=0, atol=0)
