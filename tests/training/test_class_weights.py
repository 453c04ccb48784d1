"""Class weights: the loss and its gradient against torch's CrossEntropyLoss(weight), however batches are split."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from peftbench.modification.attach import attach
from peftbench.training.class_weights import WeightedLoss, describe_class_weights, scale_class_weights
from peftbench.utils.errors import UserError
from peftbench.utils.team import ALONE, Team
from tests.families import PRESETS, build, dropout
from tests.fitting import EPSILON, Targets, fitted, model_of, one_step, trained
from tests.teamwork import run_together

NAMES = ["bad", "fair", "good"]
WEIGHTS = [4.0, 1.0, 0.5]
SPLITS = {"the batch": {}, "one by one": {"micro_batch": "1"}, "two batches": {"batch_size": 4, "accumulation": 2}}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs(smoothing: float) -> None:
    """Of a batch, torch's sum over the number of examples; of all training examples, torch's weighted mean."""
    torch.manual_seed(1)
    logits, labels = torch.randn(12, 3), torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2, 1, 0, 2])
    weights = scale_class_weights(WEIGHTS, labels.tolist(), NAMES)
    assert sum(weights[label] for label in labels) == pytest.approx(len(labels))
    loss = WeightedLoss(weights, smoothing, logits.device)
    for part in (slice(0, 5), slice(5, 12)):
        summed = nn.CrossEntropyLoss(torch.tensor(weights), reduction="sum", label_smoothing=smoothing)
        expected = summed(logits[part], labels[part]) / len(labels[part])
        torch.testing.assert_close(loss(SimpleNamespace(logits=logits[part]), labels[part]), expected)
    whole = nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(loss(SimpleNamespace(logits=logits), labels), whole)


@pytest.mark.parametrize("split", SPLITS)
def test_the_gradient_of_a_step_is_that_of_torchs_loss(split: str, tmp_path: Path) -> None:
    data = Targets("roberta")
    data.task = SimpleNamespace(labels=NAMES)  # type: ignore[attr-defined]
    assert 1 < len(set(data.rows["labels"].tolist())) <= 3

    def model() -> nn.Module:
        made = build("roberta", **dropout("roberta"))
        torch.manual_seed(5)
        attach(made, PRESETS["parallel_adapter"])
        return made.train()

    by_hand = model()
    logits = by_hand(**data.rows).logits
    nn.CrossEntropyLoss(torch.tensor(WEIGHTS))(logits, data.rows["labels"]).backward()
    found = model()
    fitted(found, data, one_step(class_weights=WEIGHTS, **SPLITS[split]), tmp_path)  # type: ignore[arg-type]
    unweighted = model()
    fitted(unweighted, data, one_step(), tmp_path)  # type: ignore[arg-type]
    apart = 0.0
    for name, p in by_hand.named_parameters():
        if p.requires_grad and p.grad is not None:
            expected = (p - p.grad / (p.grad.abs() + EPSILON)).detach()
            torch.testing.assert_close(trained(found)[name], expected, rtol=1e-4, atol=1e-6, msg=name)  # type: ignore[arg-type]
            apart = max(apart, float((trained(unweighted)[name] - expected).abs().max()))  # type: ignore[arg-type]
    assert apart > 1e-3


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    codes = [0] * 6 + [1] * 3 + [2]
    assert scale_class_weights("balanced", codes, NAMES) == pytest.approx([10 / (3 * n) for n in (6, 3, 1)])
    assert scale_class_weights("balanced", [0, 0, 2, 2, 2, 2], NAMES) == [1.5, 0.0, 0.75]  # a label without examples
    told = "Class weights, with mean 1 over the training examples: bad 1.5, fair 0, good 0.75."
    assert describe_class_weights([1.5, 0.0, 0.75], NAMES) == told
    with pytest.raises(UserError, match="class_weights has 2 numbers, and the labels are bad, fair, good"):
        scale_class_weights([1, 2], codes, NAMES)


def case_weighted(team: Team, folder: Path) -> dict[str, Tensor]:
    """What is trained by a step of uneven batches: 5 and 3 examples."""
    data = Targets("roberta")
    data.task = SimpleNamespace(labels=NAMES)  # type: ignore[attr-defined]
    model = model_of("roberta", "lora")
    settings = one_step(class_weights=WEIGHTS, batch_size=5, accumulation=2)
    fitted(model, data, settings, folder, team=team)
    return trained(model)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    expected = case_weighted(ALONE, tmp_path)
    for found in run_together(__name__, ["weighted"]):
        for name, tensor in expected.items():
            torch.testing.assert_close(found["weighted"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
