"""Fast paths change nothing for a model with the head of a task: checks that the kinds of tasks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.training.padding_free import PaddingFree, add_lengths
from tests.fitting import Rows, fitted, gradients_of, one_step, trained
from tests.training.test_replay import Recorder

# Settings of the trainer, and examples in a batch.
FAST_PATHS: list[tuple[dict[str, bool], int]] = [
    ({"graphs": True}, 4),
    ({"padding_free": True}, 4),
    ({"graphs": True, "padding_free": True}, 8),
]


def assert_packing_keeps_the_gradients(
    model: PreTrainedModel, batch: dict[str, Tensor], compute_loss: Callable[[PreTrainedModel, Any], Tensor]
) -> None:
    """Without padding, the loss of a batch and the gradients of a model are those of the padded batch."""
    wanted = compute_loss(model, batch)
    expected = gradients_of(model, wanted)
    packed = PaddingFree(model, 9, 0)
    with packed.active():
        loss = compute_loss(model, packed.load(add_lengths(lambda _: batch, texts=False)([])))
        found = gradients_of(model, loss)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys() and len(found) > 4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def assert_fast_paths_train_the_same(
    make_model: Callable[[], PreTrainedModel], data: Rows, settings: dict[str, bool], size: int, folder: Path
) -> None:
    """Also with steps that are replayed, for which all batches have the width of the longest."""
    found = []
    for chosen in ({"graphs": False, "padding_free": False}, settings):
        model = make_model()
        recorder = Recorder() if chosen.get("graphs") else None
        steps = one_step(max_steps=4, batch_size=size, **chosen)
        taken = fitted(model, data, steps, folder, recorder=recorder).fast_paths
        assert set(taken) == {name for name, value in chosen.items() if value}
        assert recorder is None or recorder.replayed > 0
        found.append(trained(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
