"""A batch in parts trains as the whole does: against gradients by hand, also where memory runs out on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from peftbench.modification.attach import attach
from tests.families import CONTINUING, PRESETS, build, dropout
from tests.fitting import EPSILON, Targets, fitted, one_step, trained


def model_of(family: str, **rates: float) -> PreTrainedModel:
    model = build(family, **dropout(family, **rates))
    torch.manual_seed(5)
    attach(model, PRESETS["parallel_adapter"])
    return model.train()


def by_hand(family: str, data: Targets, smoothing: float, norm: float | None = None) -> dict[str, Tensor]:
    """The trained tensors after one step with the gradient of the mean over all items of all examples; with a `norm`,
    the gradient made as long as that."""
    model = model_of(family)
    logits = model(**data.rows).logits
    labels = data.rows["labels"]
    if family in CONTINUING:
        logits, labels = logits[:, :-1], labels[:, 1:]
    F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing).backward()  # type: ignore[no-untyped-call]  # torch's
    if norm is not None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert length > 2 * norm
        for gradient in gradients:
            gradient *= norm / length
    return {
        name: (p - p.grad / (p.grad.abs() + EPSILON)).detach()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


SPLITS = {
    "the batch": {},
    "parts of three": {"micro_batch": "3"},
    "one by one": {"micro_batch": "1"},
    "two batches": {"batch_size": 4, "accumulation": 2},
    "two batches in parts": {"batch_size": 4, "accumulation": 2, "micro_batch": "3"},
    "as many as fit": {"micro_batch": "auto"},
    "the batch, fused": {"fused_loss": True},
    "two batches in parts, fused": {"batch_size": 4, "accumulation": 2, "micro_batch": "3", "fused_loss": True},
}


QUICK = {("llama", 0.1)}


@pytest.mark.parametrize(
    ("family", "smoothing"),
    [
        pytest.param(family, smoothing, marks=[] if (family, smoothing) in QUICK else pytest.mark.slow)
        for family, smoothing in [("bart", 0.0), ("t5", 0.1), ("llama", 0.1), ("roberta", 0.0)]
    ],
)
def test_the_gradient_is_that_of_the_whole_batch(family: str, smoothing: float, tmp_path: Path) -> None:
    data = Targets(family)
    expected = by_hand(family, data, smoothing)
    before = trained(model_of(family))
    assert all(torch.isfinite(tensor).all() for tensor in expected.values())
    assert max(float((before[name] - tensor).abs().max()) for name, tensor in expected.items()) > 1e-3
    for name, split in SPLITS.items():
        model = model_of(family)
        fitted(model, data, one_step(label_smoothing=smoothing, **split), tmp_path)
        for key, tensor in trained(model).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6, msg=lambda text, at=name: at + text)


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    data, norm = Targets("bart"), 0.1
    expected = by_hand("bart", data, 0.0, norm)
    for split in ({}, SPLITS["two batches in parts"]):
        model = model_of("bart")
        fitted(model, data, one_step(max_grad_norm=norm, **split), tmp_path)
        for key, tensor in trained(model).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-7, msg=key)


QUICK_SPLITS = {("bart", 0.1, "one by one"), ("bart", 0.1, "two batches in parts, fused"), ("bart", 0.0, "the batch")}
# Each pair of a family and a split, of a smoothing and a split, and of a family and a smoothing; not all three: the
# family decides where targets are, the smoothing what a target counts, and both in one place (tokens or fused).
PARTS = [
    (family, smoothing, split)
    for turn, family in enumerate(("bart", "t5", "llama"))
    for index, split in enumerate(SPLITS)
    for smoothing in (0.0, 0.1)
    if (family, smoothing, split) in QUICK_SPLITS or smoothing == (0.0, 0.1)[(turn + index) % 2]
]


@pytest.mark.parametrize(
    ("family", "smoothing", "split"),
    [pytest.param(*point, marks=[] if point in QUICK_SPLITS else pytest.mark.slow) for point in PARTS],
)
def test_a_part_without_targets_has_no_share(family: str, smoothing: float, split: str, tmp_path: Path) -> None:
    """One row has targets: the gradient stays that of the whole, though most parts have none. No row has: all stays."""
    one, none = Targets(family, with_targets=1), Targets(family, with_targets=0)
    expected, before = by_hand(family, one, smoothing), trained(model_of(family))
    assert max(float((before[name] - tensor).abs().max()) for name, tensor in expected.items()) > 1e-3
    for data, wanted in ((one, expected), (none, before)):
        model, logged = model_of(family), []
        fitted(model, data, one_step(label_smoothing=smoothing, **SPLITS[split]), tmp_path, log=logged.append)
        for name, tensor in trained(model).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
        assert logged[0]["loss"] == 0.0 if data is none else 0 < logged[0]["loss"] < 100


def test_a_number_to_predict_is_never_left_out(tmp_path: Path) -> None:
    """-100 is no token in a text, and a number like others in a regression."""
    found = []
    for micro_batch in (None, "3"):
        data, model = Targets("roberta"), build("roberta", num_labels=1, **dropout("roberta"))
        numbers = [-100.0, 3.0, -100.0, 0.5, 2.0, -100.0, 1.0, -1.0]
        data.train = data.train.remove_columns("labels").add_column("labels", numbers)
        torch.manual_seed(5)
        attach(model, PRESETS["parallel_adapter"])
        fitted(model, data, one_step(micro_batch=micro_batch), tmp_path)
        found.append(trained(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def starved(model: PreTrainedModel, most: Callable[[], int]) -> list[int]:
    """Let the model run out of memory for more than `most` examples at once; returns the sizes that it is given."""
    forward, given = model.forward, []

    @wraps(forward)
    def limited(*args: Any, **kwargs: Any) -> Any:
        given.append(len(kwargs["input_ids"]))
        if given[-1] > most():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(*args, **kwargs)

    model.forward = limited  # type: ignore[method-assign]  # a stand-in for a full GPU
    return given


def test_auto_finds_what_fits(tmp_path: Path) -> None:
    """It tries the longest examples, and the training then is that of the whole batch."""
    data, settings = Targets("bart"), one_step(max_steps=3, batch_size=4)
    whole = model_of("bart")
    assert fitted(whole, data, settings, tmp_path).micro_batch == {}
    model = model_of("bart")
    given = starved(model, lambda: 2)
    settings.micro_batch = "auto"
    assert fitted(model, data, settings, tmp_path).micro_batch == {"parts": 2, "halved_at": [0]}
    assert given == [4, 2, 2] + [2, 2] * 3
    for name, tensor in trained(whole).items():
        torch.testing.assert_close(trained(model)[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_try_that_fits_changes_nothing(tmp_path: Path) -> None:
    """Dropout draws the same numbers as without it."""
    found = []
    for micro_batch in (None, "auto"):
        model = model_of("bart", hidden=0.3)
        torch.manual_seed(3)
        fitted(model, Targets("bart"), one_step(max_steps=2, micro_batch=micro_batch), tmp_path)
        found.append(trained(model))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "accumulation"),
    [
        ("forward", 1),
        ("backward", 2),
        pytest.param("forward", 2, marks=pytest.mark.slow),
        pytest.param("backward", 1, marks=pytest.mark.slow),
    ],
)
def test_memory_that_runs_out_later_costs_no_step(where: str, accumulation: int, tmp_path: Path) -> None:
    """At step 3, in the midst of a backward pass too, when some tensors have their gradients and others do not."""
    data = Targets("bart")
    settings = one_step(max_steps=5, batch_size=4, accumulation=accumulation, learning_rate=0.1, epsilon=1e-4)
    whole = model_of("bart")
    fitted(whole, data, settings, tmp_path)

    model = model_of("bart")
    calls = 0
    fails_at = 1 + 3 * accumulation  # the try, then step 3's last batch

    def fail_once(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    if where == "backward":
        # the encoder's last layer: behind it the decoder's tensors have gradients already, the first layer's have not
        next(p for name, p in model.named_parameters() if p.requires_grad and "encoder.layers.1" in name).register_hook(
            fail_once
        )
    else:
        model.register_forward_pre_hook(fail_once)
    settings.micro_batch = "auto"
    assert fitted(model, data, settings, tmp_path).micro_batch == {"parts": 2, "halved_at": [3]}
    assert calls > fails_at
    for name, tensor in trained(whole).items():
        torch.testing.assert_close(trained(model)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_not_even_one_example_fits(tmp_path: Path) -> None:
    model = model_of("bart")
    given = starved(model, lambda: 0)
    with pytest.raises(torch.OutOfMemoryError):
        fitted(model, Targets("bart"), one_step(micro_batch="auto"), tmp_path)
    assert given == [8, 4, 2, 1]


def test_another_error_is_not_taken_for_it(tmp_path: Path) -> None:
    model = model_of("bart")

    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mat1"):
        fitted(model, Targets("bart"), one_step(micro_batch="auto"), tmp_path)
