"""Steps that are recorded and replayed give what steps one by one give: gradients, losses, and a whole training."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from peftbench.config.schema import Compile, Device, Keep
from peftbench.modification.packed_attention import Packing
from peftbench.training import replay
from peftbench.training.padding_free import PaddingFree, choose_row_step
from peftbench.training.replay import Replayed
from peftbench.utils.errors import UserError
from tests.families import WRITING
from tests.fitting import Targets, fitted, model_of, one_step, trained
from tests.training.test_padding_free import LENGTHS, lengthened, loss_and_gradients, uneven


class Recorder:
    """In the place of CUDA: a recording computes nothing, a replay calls the function."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.released = self.memory = 0

    def release(self) -> None:
        self.released += 1

    def compute(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        outcome = torch.zeros(())

        def again() -> None:
            self.replayed += 1
            outcome.copy_(function())

        return again, outcome


class Tape(TorchDispatchMode):
    """Every kernel that is called inside, with the tensors that it reads and writes."""

    def __init__(self) -> None:
        self.kernels: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        # What BART draws for LayerDrop, on the CPU wherever it runs; before transformers 5.24 also where it has none.
        self.drawn: list[Any] = []
        super().__init__()

    def __torch_dispatch__(self, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        on_cpu = bool(read) and all(any(leaf is each for each in self.drawn) for leaf in read)
        if kernel is torch.ops.aten._local_scalar_dense.default and not on_cpu:
            raise UserError("it waits for the GPU")
        outcome = kernel(*args, **(kwargs or {}))
        if on_cpu or (kernel is torch.ops.aten.rand.default and args[0] == []):
            self.drawn.append(outcome)
        self.kernels.append((kernel, args, kwargs or {}, outcome))
        return outcome

    @torch.no_grad()
    def play(self) -> None:
        """The same kernels on the same memory, into which their outcomes go; no Python beside them runs again."""
        for kernel, args, kwargs, outcome in self.kernels:
            new = kernel(*args, **kwargs)
            for old, made in zip(tree_leaves(outcome), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != made.data_ptr():  # no view, and not changed in place
                    old.copy_(made)


class Taped(Recorder):
    """In the place of CUDA for the training of `model`: replays what a graph would."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.model, self.monkeypatch = model, monkeypatch

    def record(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with self.monkeypatch.context() as patch, Tape() as tape:
            patch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True, raising=False)
            loss = function()
        for parameter in self.model.parameters():  # CUDA computes nothing while it records
            if parameter.grad is not None:
                parameter.grad.zero_()

        def again() -> None:
            self.replayed += 1
            tape.play()

        return again, loss


def linear() -> tuple[nn.Linear, Callable[[dict[str, Tensor]], Tensor]]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = module(batch.pop("x")).square().sum() / batch.pop("count")
        loss.backward()
        return loss.detach()

    return module, step


def test_gradients_and_losses() -> None:
    """Batches of two shapes in turn, two for each optimiser step; what was given is not changed by what comes after."""
    batches = [{"x": torch.randn(rows, 3), "count": torch.tensor(float(rows))} for rows in 6 * [4, 2, 2]]
    found: list[list[Tensor]] = []
    recorder = Recorder()
    for replays in (False, True):
        module, step = linear()
        add = Replayed(step, module.parameters(), recorder) if replays else lambda batch, step=step: step(dict(batch))
        outcome: list[Tensor] = []
        for number, batch in enumerate(batches):
            outcome.append(add(batch))
            if number % 2:
                outcome += [p.grad.clone() for p in module.parameters() if p.grad is not None]
                module.zero_grad()
        found.append(outcome)
    assert len(found[0]) == len(found[1]) == 18 + 9 * 2
    for plain, replayed in zip(*found, strict=True):
        assert torch.equal(plain, replayed)
    assert (recorder.recorded, recorder.replayed) == (2, 16)  # of each shape the first batch is computed


def test_further_shapes_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 1)
    module, step = linear()
    recorder = Recorder()
    replayed = Replayed(step, module.parameters(), recorder)
    for rows in (1, 1, 2, 2, 2, 1):
        replayed({"x": torch.ones(rows, 3), "count": torch.tensor(1.0)})
    assert (recorder.recorded, recorder.replayed) == (1, 2)


@pytest.mark.parametrize("error", [UserError("it waits for the GPU"), torch.OutOfMemoryError("it waits for memory")])
def test_what_cannot_be_recorded_is_computed_where_that_is_wanted(error: Exception) -> None:
    class Failing(Recorder):
        def record(self, function: Callable[[], Tensor]) -> Any:
            raise error

    module, step = linear()
    batch = {"x": torch.ones(1, 3), "count": torch.tensor(1.0)}
    with pytest.raises(type(error), match="waits"):
        for replayed in 2 * [Replayed(step, module.parameters(), Failing())]:
            replayed(batch)
    module.zero_grad()
    replayed = Replayed(step, module.parameters(), Failing(), required=False)
    losses = [replayed(batch) for _ in range(3)]
    assert replayed.recorder is None and torch.equal(losses[0], losses[2])
    assert replayed.failure is not None and "waits" in replayed.failure
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    for _ in range(3):
        step(dict(batch))
    assert all(
        torch.equal(mine, p.grad) for mine, p in zip(found, module.parameters(), strict=True) if p.grad is not None
    )


def test_the_kept_state_does_not_keep_the_graph_of_the_parameters(tmp_path: Path) -> None:
    """A node of theirs that a look leaves alive has the stream of that look, in which no later step can be recorded."""
    nodes: list[bool] = []

    class Marking(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                marks = get_gradient_edge(parameter).node.metadata
                nodes.append("seen" in marks)  # at an earlier step
                marks["seen"] = True

    settings = one_step(max_steps=4, keep=Keep.best, evaluate_every=1, batch_size=4, graphs=True)
    scores = iter(range(9))
    fitted(
        model_of("roberta", "lora"),
        Targets("roberta"),
        settings,
        tmp_path,
        evaluate=lambda: {"accuracy": float(next(scores))},
        metric="accuracy",
        callbacks=[Marking()],
        recorder=Recorder(),
    )
    assert nodes and not any(nodes)


def test_what_was_released_is_recorded_anew() -> None:
    module, step = linear()
    recorder = Recorder()
    replayed = Replayed(step, module.parameters(), recorder)
    batch = {"x": torch.ones(1, 3), "count": torch.tensor(1.0)}
    losses = [replayed(batch) for _ in range(3)]
    replayed.release()
    losses += [replayed(batch) for _ in range(2)]
    assert (recorder.recorded, recorder.replayed, recorder.released) == (2, 4, 1)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.gpu
def test_released_memory_is_for_all() -> None:
    parameter = nn.Parameter(torch.ones((), device="cuda"))

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = (parameter * batch["x"].repeat(2**20)).square().mean()
        loss.backward()
        return loss.detach()

    replayed = Replayed(step, [parameter])
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        losses = [float(replayed({"x": torch.full((32,), 3.0, device="cuda")})) for _ in range(3)]
        assert losses == 3 * [9.0]
        assert torch.cuda.memory_reserved() > before + 2**27
        replayed.release()
        assert torch.cuda.memory_reserved() < before + 2**26


def test_rows_come_in_few_lengths() -> None:
    """Multiples of a power of two near the spread of a batch's tokens; equal lengths need none."""
    lengths = [3, 9] * 50
    assert choose_row_step(lengths, 16) == 16  # of one: 3; of 16 examples: 12
    assert choose_row_step([7] * 10, 16) == 1


@pytest.mark.parametrize("steps", [(16, 8), (1, 32), (64, 1)])
@pytest.mark.parametrize(("family", "preset"), [("bart", "mam"), ("bart", "lora"), ("roberta", "mam")])
def test_what_fills_a_row_changes_nothing(family: str, preset: str, steps: tuple[int, int]) -> None:
    model = model_of(family, preset)
    targets = 5 if family in WRITING else 0
    shapes = set()
    for lengths in (LENGTHS, (9, 9, 9), (1, 2, 1)):
        inputs = uneven(family, lengths)
        wanted, expected = loss_and_gradients(model, inputs)
        packed = PaddingFree(model, max(LENGTHS), targets, steps)
        rows = packed.rows(lengthened(inputs))
        assert len(rows["encoder_example"]) % steps[0] == 0
        if family in WRITING:
            assert len(rows["decoder_example"]) % steps[1] == 0
            assert len(rows["decoder_offsets"]) == len(rows["encoder_offsets"])
        shapes.add(len(rows["encoder_offsets"]))
        with packed.active():
            loss, gradients = loss_and_gradients(model, packed.load(rows))
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert len(shapes) == 1


def test_a_row_that_is_filled_up() -> None:
    packing = Packing(4)
    packing.take(packing.tensors((2, 3), 3, torch.device("cpu"), (1, 2)), (2, 3))
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert packing.pack(labels, -100).tolist() == [[1, 2, 4, 5, 6, -100, -100, -100]]
    assert packing.row.offsets.tolist() == [0, 2, 5, 6, 8]
    assert packing.pad(torch.arange(1.0, 9.0)[None, :, None])[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param(family, settings, marks=[] if family == "bart" and settings else pytest.mark.slow)
        for family in ("bart", "roberta", "gpt2", "t5")
        for settings in ({}, {"fused_loss": True, "padding_free": True})
        if not settings or family not in ("gpt2", "t5")
    ],
)
def test_fit(family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some passes over eight examples end where they end without graphs: a step that is replayed needs nothing that
    Python does beside its kernels."""
    ends = []
    for graphs in (False, True):
        model = model_of(family, "mam")
        recorder = Taped(model, monkeypatch)
        given = one_step(max_steps=24 if settings else 8, batch_size=4, learning_rate=1e-2, graphs=graphs, **settings)
        fitted(model, Targets(family), given, tmp_path, recorder=recorder)
        ends.append(trained(model))
    before = trained(model_of(family, "mam"))
    for name, end in ends[0].items():
        torch.testing.assert_close(ends[1][name], end, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.equal(ends[0][name], tensor) for name, tensor in before.items())
    assert recorder.replayed >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [Compile.none, Compile.layers])
@pytest.mark.parametrize(
    ("family", "preset", "settings"),
    [
        ("bart", "mam", {"fused_loss": True, "padding_free": True}),
        ("bart", "lora_ffn", {"fused_loss": True, "padding_free": True}),
        ("bart", "full", {}),
        ("roberta", "mam", {"padding_free": True}),
        ("roberta", "prefix", {}),
        ("gpt2", "lora", {"fused_loss": True}),
        ("llama", "mam", {}),
        ("t5", "mam", {}),
    ],
)
def test_fit_on_the_gpu(family: str, preset: str, settings: dict[str, Any], compiled: Compile, tmp_path: Path) -> None:
    """Under bfloat16 autocast, as runs have it: with and without graphs to its rounding, and not where it began."""
    torch._dynamo.reset()
    ends = []
    for graphs in (False, True):
        torch.manual_seed(3)
        model = model_of(family, "mam" if preset == "full" else preset).cuda()
        if preset == "full":
            model.requires_grad_(True)
        begun = trained(model)
        given = one_step(max_steps=24, batch_size=4, learning_rate=1e-2, device=Device.cuda, compile=compiled)
        settings_of = replace(given, graphs=graphs, **settings)
        fitted(model, Targets(family), settings_of, tmp_path, autocast_dtype=torch.bfloat16)
        ends.append({name: tensor - begun[name] for name, tensor in trained(model).items()})
    moved = torch.cat([tensor.flatten() for tensor in ends[0].values()])
    difference = torch.cat([(ends[1][name] - tensor).flatten() for name, tensor in ends[0].items()])
    assert difference.norm() < 0.05 * moved.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "preset"), [("bart", "mam"), ("llama", "lora"), ("roberta", "full")])
def test_float16_with_loss_scaling(family: str, preset: str, tmp_path: Path) -> None:
    """The losses are those of float32, recorded or not.

    The first steps are skipped while the scale, which begins at 2^16, is too large for float16; all later ones are
    therefore that many updates behind.
    """
    losses: dict[str, list[float]] = {}
    ways = {"float32": (None, False), "float16": (torch.float16, False), "recorded": (torch.float16, True)}
    for way, (dtype, fast) in ways.items():
        torch.manual_seed(3)
        model = model_of(family, "mam" if preset == "full" else preset).cuda()
        if preset == "full":
            model.requires_grad_(True)
        settings = one_step(
            max_steps=48, batch_size=8, learning_rate=1e-2, device=Device.cuda, graphs=fast, fused_loss=fast
        )
        seen = losses[way] = []
        done = fitted(
            model,
            Targets(family),
            settings,
            tmp_path,
            autocast_dtype=dtype,
            log=lambda values, seen=seen: seen.append(values["loss"]) if "loss" in values else None,
        )
        assert done.diverged is None and ("graphs" in done.fast_paths) is fast
        assert all(tensor.isfinite().all() for tensor in trained(model).values())
    late = {way: statistics.mean(seen[-8:]) for way, seen in losses.items()}
    learned = statistics.mean(losses["float32"][:8]) - late["float32"]
    assert learned > 0.1
    for way in ("float16", "recorded"):
        assert abs(losses[way][0] - losses["float32"][0]) < 0.01 * losses["float32"][0]
        assert abs(late[way] - late["float32"]) < 0.25 * learned
    torch.testing.assert_close(losses["recorded"], losses["float16"], rtol=0.02, atol=0)


@pytest.mark.gpu
def test_dropout_differs_from_replay_to_replay() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.ones(1000, device="cuda"))

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = nn.functional.dropout(parameter * batch["x"], 0.5).sum()
        loss.backward()
        return loss.detach()

    replayed = Replayed(step, [parameter])
    losses = {round(float(replayed({"x": torch.ones(1000, device="cuda")}))) for _ in range(12)}
    assert len(losses) > 6


@pytest.mark.gpu
def test_all_shapes_share_the_memory_of_the_largest() -> None:
    """What is computed between two replays too; and neither spoils the other."""
    parameter = nn.Parameter(torch.full((), 0.5, device="cuda"))

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = ((parameter * batch["x"].repeat(2**20)).square() + 1).mean()
        loss.backward()
        return loss.detach()

    replayed = Replayed(step, [parameter])
    reserved, losses = [], []
    for width in (64, 32, 48, 16):
        batch = {"x": torch.full((width,), float(width), device="cuda")}
        for _ in range(3):
            parameter.grad = None
            losses.append((replayed(batch), (width / 2) ** 2 + 1))
            assert parameter.grad is not None
            torch.testing.assert_close(float(parameter.grad), float(width**2), rtol=1e-5, atol=0)
        reserved.append(torch.cuda.memory_reserved())
    for loss, expected in losses:
        torch.testing.assert_close(float(loss), expected, rtol=1e-5, atol=0)
    assert reserved[-1] < 1.2 * reserved[0]


@pytest.mark.gpu
def test_what_waits_for_the_gpu_cannot_be_recorded() -> None:
    parameter = nn.Parameter(torch.ones(3, device="cuda"))

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = (parameter * float(batch["x"].sum())).sum()
        loss.backward()
        return loss.detach()

    replayed = Replayed(step, [parameter])
    replayed({"x": torch.ones(3, device="cuda")})
    with pytest.raises(UserError, match=r"use trainer\.graphs=false"):
        replayed({"x": torch.ones(3, device="cuda")})
    assert float(step({"x": torch.ones(3, device="cuda")})) == 9.0  # the GPU goes on
    assert float(torch.rand(9, device="cuda").sum()) > 0


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_drops_out_as_ever() -> None:
    """Also where a graph of another shape had been recorded before, which is replayed no more."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.rand(1000, device="cuda"))  # sums tell what was dropped

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = nn.functional.dropout(parameter * batch["x"].sum(), 0.5).mean()
        if len(batch["x"]) > 1:
            loss = loss * float(batch["x"].mean())
        loss.backward()
        return loss.detach()

    replayed = Replayed(step, [parameter], required=False)
    losses = {float(replayed({"x": torch.ones(rows, device="cuda")})) for rows in (1, 1, 1, 2, 2, 2, 1, 1)}
    assert replayed.recorder is None and len(losses) == 8


def test_graphs_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.graphs=true: CUDA graphs need a GPU"):
        fitted(model_of("bart", "mam"), Targets("bart"), one_step(graphs=True), tmp_path)
