"""Two processes, and four, train, predict and fail as one does."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, TrainerCallback

from peftbench.config.schema import Batching, Device, Trainer
from peftbench.evaluation.predict import compute_mean_loss, predict
from peftbench.training.devices import _describe_death, _find_dead, form_team
from peftbench.training.shares import CHECK, COUNTED, OF, ROW, WHOLE, balance_rows, share_batches
from peftbench.utils.errors import UserError
from peftbench.utils.team import ALONE, Team, fill_buckets
from tests.fitting import EXAMPLES, Targets, fitted, model_of, one_step, trained
from tests.teamwork import run_together
from tests.training.test_micro_batch import starved
from tests.training.test_replay import Taped

FAMILIES, METHODS = ("bart", "roberta", "llama"), ("mam", "lora")
BATCHES: dict[str, dict[str, Any]] = {
    "one batch": {},
    "uneven": {"batch_size": 5, "accumulation": 2},  # 5 and 3 rows, and label smoothing
    "one example": {"batch_size": 1, "accumulation": 8},  # one process has none
    "parts": {"batch_size": 4, "accumulation": 2, "micro_batch": "1"},
    "without padding": {"padding_free": True},
    "bucketed": {"batching": Batching.bucketed, "batch_size": 3, "accumulation": 3},
}


class Gradients(TrainerCallback):
    """The gradients with which the optimiser makes its last step."""

    def on_pre_optimizer_step(self, *args: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def case_gradients(team: Team, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Of families, methods and ways to make batches, for the whole of `Targets`."""
    found = {}
    points = [*product(FAMILIES, METHODS, ["one batch"]), *(("bart", "mam", way) for way in BATCHES)]
    points += [("roberta", "lora", "one example"), ("roberta", "lora", "parts"), ("llama", "lora", "without padding")]
    for family, method, way in points:
        gradients = Gradients()
        settings = one_step(**BATCHES[way], label_smoothing=0.1 if way in ("uneven", "one example") else 0.0)
        fitted(model_of(family, method), Targets(family), settings, folder, team=team, callbacks=[gradients])
        found[f"{family} {method} {way}"] = gradients.found
    return found


def case_twenty_steps(team: Team, folder: Path) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """The losses of twenty steps with dropout, and what was trained."""
    found = {}
    rates = {"bart": ("dropout", "attention_dropout", "activation_dropout"), "llama": ("attention_dropout",)}
    rates["roberta"] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    for family, method in product(FAMILIES, METHODS):
        model, logged = model_of(family, method, **dict.fromkeys(rates[family], 0.2)), []
        torch.manual_seed(3)
        settings = one_step(max_steps=20, batch_size=3, learning_rate=1e-3, epsilon=1e-6)
        fitted(model, Targets(family), settings, folder, team=team, log=logged.append)
        found[f"{family} {method}"] = ([line["loss"] for line in logged if "loss" in line], trained(model))
    return found


def run_out(module: PreTrainedModel, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Memory is too little for three examples, with two beams each or not."""
    ids = given.get("input_ids", given.get("decoder_input_ids"))
    if ids is not None and len(ids) in (3, 6):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def case_predictions(team: Team, folder: Path) -> dict[str, np.ndarray]:
    """Logits, generated ids and a loss; one process runs out of memory at first."""
    found = {}
    for family, method in product(FAMILIES, METHODS):
        model, data = model_of(family, method).eval(), Targets(family)
        generation = None
        if family != "roberta":
            ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2}
            generation = GenerationConfig(num_beams=2, max_new_tokens=6, **ends)
            loss = compute_mean_loss(model, data.selection, data.collator, 3, team=team)
            found[f"{family} {method} loss"] = np.array(loss)
        if team.rank == 1:
            model.register_forward_pre_hook(run_out, with_kwargs=True)
        given = data.selection.remove_columns("labels")
        found[f"{family} {method}"] = predict(model, given, data.collator, 3, generation=generation, team=team)
    return found


def case_memory(team: Team, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Memory runs out in one process."""
    model = model_of("bart", "mam")
    if team.rank == team.size - 1:
        starved(model, lambda: 1)
    settings = one_step(max_steps=3, batch_size=8, micro_batch="auto")
    return fitted(model, Targets("bart"), settings, folder, team=team).micro_batch, trained(model)


def case_recorded(team: Team, folder: Path) -> dict[str, tuple[dict[str, Tensor], int]]:
    """Trainings whose steps are replayed as CUDA graphs are: what they trained, and how many steps were replayed."""
    found = {}
    for family, method, padding_free in (("bart", "mam", False), ("bart", "mam", True), ("llama", "lora", True)):
        model, replayed = model_of(family, method), 0
        settings = one_step(max_steps=16, batch_size=4, learning_rate=1e-2, padding_free=padding_free)
        settings = replace(settings, graphs=team.size > 1)
        with pytest.MonkeyPatch.context() as patch:
            recorder = Taped(model, patch)
            fitted(model, Targets(family), settings, folder, team=team, recorder=recorder)
            replayed = recorder.replayed
        found[f"{family} {method} {padding_free}"] = (trained(model), replayed)
    return found


def case_fault(team: Team, folder: Path) -> None:
    """One process refuses, while the other one waits for it."""
    with team.together():
        if team.rank == 1:
            raise UserError("rank 1 refuses")
        team.decide(lambda: "never told")


def case_interrupt(team: Team, folder: Path) -> str:
    """Ctrl-C in the leader, while the other is at an error of its own: all end by the first."""
    try:
        with team.together():
            raise KeyboardInterrupt if team.leads else ValueError("own")
    except BaseException as error:
        return type(error).__name__
    return "nothing"


def case_left_out(team: Team, folder: Path) -> dict[str, Tensor]:
    """A layer that only one process reaches is updated in both."""
    model, data = model_of("bart", "lora"), Targets("bart")
    if team.rank == 1:
        model.config.encoder_layerdrop = 1.0
        model.model.encoder.layerdrop = 1.0
    gradients = Gradients()
    fitted(model, data, one_step(), folder, team=team, callbacks=[gradients])
    return gradients.found


def case_other_batches(team: Team, folder: Path) -> None:
    """Processes with different data are no team."""
    data = Targets("bart")
    if team.rank == 1:
        data.train = data.train.select(range(EXAMPLES - 1, -1, -1))
    with team.together():
        fitted(model_of("bart", "lora"), data, one_step(batch_size=2), folder, team=team)


def case_best(team: Team, folder: Path) -> dict[str, Tensor]:
    """`keep=best`: all processes take the state that the leader's scores choose."""
    from peftbench.config.schema import Keep

    model, scores = model_of("bart", "lora"), iter([1.0, 3.0, 2.0])

    def evaluate() -> dict[str, float]:
        return {"accuracy": team.decide(lambda: next(scores))}

    settings = one_step(max_steps=3, keep=Keep.best, evaluate_every=1, learning_rate=0.1, epsilon=1e-4)
    fitted(model, Targets("bart"), settings, folder, team=team, evaluate=evaluate, metric="accuracy")
    return trained(model)


def case_buckets(team: Team, folder: Path) -> list[Tensor]:
    """Sums of tensors of two dtypes, together and by themselves, in place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftbench.utils.team.BUCKET", 7)
        shapes = [(2, 3), (), (1,), (9,), (2, 2), (3,)]
        dtypes = [torch.float32, torch.float32, torch.float64, torch.float32, torch.float64, torch.float32]
        tensors = [
            torch.full(shape, 10.0**index * (1 + team.rank), dtype=dtype)
            for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        tensors[4] = tensors[4].t()  # as a gradient that is not contiguous
        team.add_up(tensors)
    return tensors


def case_few_examples(team: Team, folder: Path) -> dict[str, tuple[list[float], dict[str, Tensor], np.ndarray]]:
    """Losses, with dropout and label smoothing, where some or all batches have fewer examples than processes; what was
    trained; and predictions in fewer batches than processes."""
    found = {}
    for family, method in (("bart", "mam"), ("roberta", "lora"), ("opt", "mam")):
        for batch_size, accumulation in ((2, 1), (3, 3), (6, 2)):
            model = model_of(
                family, method, **({"hidden_dropout_prob": 0.2} if family == "roberta" else {"dropout": 0.2})
            )
            data, logged = Targets(family), list[dict[str, Any]]()
            torch.manual_seed(3)
            settings = one_step(max_steps=6, batch_size=batch_size, accumulation=accumulation, label_smoothing=0.1)
            settings = replace(settings, learning_rate=1e-3, epsilon=1e-6)
            fitted(model, data, settings, folder, team=team, log=logged.append)
            predicted = predict(model, data.selection.remove_columns("labels"), data.collator, 3, team=team)
            losses = [line["loss"] for line in logged if "loss" in line]
            found[f"{family} {batch_size} x {accumulation}"] = (losses, trained(model), predicted)
    return found


QUICK = ["buckets", "recorded", "predictions", "memory", "fault", "interrupt", "left_out", "other_batches", "best"]
LONG = ["gradients", "twenty_steps"]


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    return run_together(__name__, [*LONG, *QUICK])


@pytest.mark.slow
def test_gradients_are_those_of_one_process(together: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = case_gradients(ALONE, tmp_path)
    for found in together:
        for name, gradients in expected.items():
            assert found["gradients"][name].keys() == gradients.keys() and gradients
            for key, gradient in gradients.items():
                torch.testing.assert_close(found["gradients"][name][key], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_twenty_steps_have_the_same_losses(together: list[dict[str, Any]], tmp_path: Path) -> None:
    for name, (losses, tensors) in case_twenty_steps(ALONE, tmp_path).items():
        assert len(losses) == 20 and max(losses) - min(losses) > 0.1
        for found in together:
            theirs = found["twenty_steps"][name]
            assert theirs[0] == pytest.approx(losses, abs=1e-5), name
            for key, tensor in tensors.items():
                torch.testing.assert_close(theirs[1][key], tensor, rtol=1e-3, atol=1e-4, msg=name)
        first, second = (found["twenty_steps"][name][1] for found in together)
        assert all(torch.equal(first[key], second[key]) for key in first), "the processes drift apart"


@pytest.mark.slow
def test_four_processes_train_and_predict_as_one(tmp_path: Path) -> None:
    together = run_together(__name__, ["few_examples"], size=4)
    for name, (losses, tensors, predicted) in case_few_examples(ALONE, tmp_path).items():
        assert len(losses) == 6
        for found in together:
            theirs = found["few_examples"][name]
            assert theirs[0] == pytest.approx(losses, abs=1e-5), name
            for key, tensor in tensors.items():
                torch.testing.assert_close(theirs[1][key], tensor, rtol=1e-3, atol=1e-4, msg=name)
                assert torch.equal(theirs[1][key], together[0]["few_examples"][name][1][key]), "they drift apart"
            np.testing.assert_allclose(theirs[2], predicted, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_recorded_steps_are_shared_too(together: list[dict[str, Any]], tmp_path: Path) -> None:
    for name, (expected, _) in case_recorded(ALONE, tmp_path).items():
        for found in together:
            tensors, replayed = found["recorded"][name]
            assert replayed >= 4, name
            for key, tensor in expected.items():
                torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_predictions_are_the_same(together: list[dict[str, Any]], tmp_path: Path) -> None:
    for name, expected in case_predictions(ALONE, tmp_path).items():
        for found in together:
            np.testing.assert_allclose(found["predictions"][name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_splits_batches_in_all(
    together: list[dict[str, Any]], tmp_path: Path
) -> None:
    _, expected = case_memory(ALONE, tmp_path)
    for found in together:
        notes, tensors = found["memory"]
        assert notes["parts"] == 4 and notes["halved_at"]
        for key, tensor in expected.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_in_all(together: list[dict[str, Any]]) -> None:
    for found in together:
        assert isinstance(found["fault"], UserError) and found["fault"].faults == ["rank 1 refuses"]
        assert found["interrupt"] == "KeyboardInterrupt"
        assert "different batches" in str(found["other_batches"])


@pytest.mark.slow
def test_a_layer_that_one_process_leaves_out_is_updated_in_all(together: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = (found["left_out"] for found in together)
    expected = case_left_out(ALONE, tmp_path).keys()
    assert first.keys() == second.keys() == expected
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_tensors_are_added_up_in_place(together: list[dict[str, Any]]) -> None:
    for found in together:
        sums = [sum(range(1, len(together) + 1)) * 10.0**index for index in range(6)]
        assert [tuple(tensor.shape) for tensor in found["buckets"]] == [(2, 3), (), (1,), (9,), (2, 2), (3,)]
        assert all((tensor == value).all() for tensor, value in zip(found["buckets"], sums, strict=True))


def test_buckets_hold_what_belongs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftbench.utils.team.BUCKET", 7)
    tensors = [torch.zeros(n) for n in (6, 1, 9, 3)] + [torch.zeros(4, dtype=torch.float64)]
    assert [[each.numel() for each in bucket] for bucket in fill_buckets(tensors)] == [[6, 1], [9], [3], [4]]


@pytest.mark.slow
def test_all_processes_keep_the_best_state(together: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = case_best(ALONE, tmp_path)
    for found in together:
        for key, tensor in expected.items():
            torch.testing.assert_close(found["best"][key], tensor, rtol=1e-3, atol=1e-3)  # a step is 0.1


@pytest.mark.slow
def test_the_others_have_ended_before_their_group_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL leaves a group only together: a leader that left first waited for ever for those that waited for it."""
    left: list[list[int]] = []
    leave = dist.destroy_process_group

    def note_and_leave() -> None:
        left.append([child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())])
        leave()

    monkeypatch.setattr(dist, "destroy_process_group", note_and_leave)
    with form_team(Trainer(devices="2", device=Device.cpu)) as team:
        assert team.size == 2
    assert left == [[]] and not dist.is_initialized()


def test_rows_are_dealt_by_their_tokens() -> None:
    for lengths, size in (([9, 1, 1, 9, 2, 2, 8, 8], 2), ([5, 5, 5, 5, 5], 4), ([3], 2), (list(range(1, 17)), 4)):
        rows = balance_rows(lengths, size)
        assert sorted(row for each in rows for row in each) == list(range(len(lengths)))
        assert all(each == sorted(each) and len(each) <= -(-len(lengths) // size) for each in rows)
        if len(lengths) % size == 0:
            tokens = [sum(lengths[row] for row in each) for each in rows]
            assert max(tokens) - min(tokens) <= max(lengths) / 4


def test_a_share_knows_the_whole_batch() -> None:
    class Last(Team):
        rank, size = 2, 3

    data = Targets("bart")
    collate = share_batches(data.collator, Last(), next_token=False)
    examples = [data.train[row] for row in range(EXAMPLES)]
    whole, share = data.collator(examples), collate(examples)
    assert share[ROW] and share[OF] == [EXAMPLES] * len(share[ROW])
    for name, column in whole.items():
        assert torch.equal(share[name], column[share[ROW]])
    assert share[WHOLE].tolist() == [int((whole["labels"] != -100).sum())] * len(share[ROW])
    assert share[COUNTED].all() and len(set(share[CHECK])) == 1
    few = collate(examples[:2])  # none is left for the third process
    assert len(few["labels"]) == 1 and (few["labels"] == -100).all() and not few[COUNTED].any()


def test_a_process_without_examples_adds_nothing(tmp_path: Path) -> None:
    """It computes one with the weight 0. transformers' label smoothing divides by the number of items."""

    class Idle(Team):
        rank, size = 1, 2

    gradients, losses = Gradients(), list[dict[str, Any]]()
    settings = one_step(batch_size=1, accumulation=2, label_smoothing=0.1)
    fitted(
        model_of("roberta", "lora"),
        Targets("roberta"),
        settings,
        tmp_path,
        team=Idle(),
        callbacks=[gradients],
        log=losses.append,
    )
    assert [line["loss"] for line in losses if "loss" in line] == [0.0]
    assert gradients.found and not any(gradient.any() for gradient in gradients.found.values())


def test_of_processes_that_have_ended_the_one_that_died_is_named() -> None:
    """Those that waited for it have left in good order meanwhile."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target) for target in (_leave, _die, _leave)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = _find_dead(processes, patience=0.0)
    assert found is processes[1]
    assert _describe_death(processes, found).startswith("process 3 of the 4 of this run was ended by SIGKILL")


def _leave() -> None:
    os._exit(0)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_process_has_no_columns_more() -> None:
    data = Targets("roberta")
    assert share_batches(data.collator, ALONE, next_token=True) == data.collator
