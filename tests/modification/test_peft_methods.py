"""Methods of the peft library: attached, counted, saved and merged as our own, and as peft itself reads them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.config.peft_methods import METHODS, REFUSED, list_types
from peftbench.config.schema import Device, Keep, Run, Schedule, Trainer
from peftbench.counts.explanation import explain
from peftbench.counts.run_counts import count_run
from peftbench.counts.solve import solve_budget
from peftbench.modification.attach import attach_run
from peftbench.modification.counting import count
from peftbench.modification.merge import find_obstacles, merge
from peftbench.modification.peft_files import write_peft_files
from peftbench.modification.peft_method import get_settings, list_added
from peftbench.modification.state import load, save
from peftbench.records.recording import record_axes
from peftbench.training.adaptive_rank import make_penalty
from peftbench.training.checkpoint import Checkpoints
from peftbench.training.loraplus import raise_up_rate
from peftbench.utils.errors import UserError
from tests.families import batch, build, list_methods, shake
from tests.fitting import EXAMPLES, Rows, Targets, fitted, gradients_of, one_step
from tests.training.test_gradients import relative_error

peft = pytest.importorskip("peft")
PRESETS = [
    pytest.param(name, marks=[] if name in ("dora", "vera", "oft") else pytest.mark.slow)
    for name in list_methods(peft=True)
    if name != "peft"
]
SMALL = {  # what does not fit a width of 64 with the presets' sizes
    "vera": ["bottleneck=8"],
    "fourierft": ["bottleneck=20"],
    "miss": ["bottleneck=4"],
    "bone": ["bottleneck=8"],
    "shira": ["bottleneck=4"],
    "boft": [],
}
WIDE = {"hidden_size": 64, "intermediate_size": 64}
WIDE_BART = {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


def run_of(method: str, *overrides: str) -> Run:
    return compose_run([f"method={method}", "task=sst2", *SMALL.get(method, []), *overrides])


def attached(run: Run, family: str = "roberta", **more: Any) -> PreTrainedModel:
    model = build(family, **{**(WIDE_BART if "bart" in family else WIDE), **more})
    attach_run(model, run)
    return model


def logits(model: PreTrainedModel, family: str = "roberta") -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch(family)).logits
    return found


@pytest.mark.parametrize("method", PRESETS)
def test_what_is_saved_is_what_is_loaded_here_and_by_peft(method: str, tmp_path: Path) -> None:
    """With the trained head, to the bit; merged into a plain model it is the same but for rounding."""
    run = run_of(method)
    model = attached(run)
    start = logits(model)
    shake(model, scale=0.05)
    expected = logits(model)
    assert not torch.equal(start, expected)
    save(model, tmp_path)
    write_peft_files(model, tmp_path, "a/backbone")

    again = attached(run)
    load(again, tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    of_peft = peft.PeftModel.from_pretrained(build("roberta", **WIDE), tmp_path)
    torch.testing.assert_close(logits(of_peft), expected, rtol=0, atol=2e-6)

    assert find_obstacles(model) == {}
    assert merge(model) < 1e-4
    assert model.state_dict().keys() == build("roberta", **WIDE).state_dict().keys()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", PRESETS)
def test_counts_without_weights_are_those_of_the_model(method: str, tmp_path: Path) -> None:
    """And the places add up to the total; what is trained gets a gradient, what is frozen none."""
    run = run_of(method)
    build("roberta", **WIDE).config.save_pretrained(tmp_path)
    run = replace(run, size=None, model=replace(run.model, path=str(tmp_path)))
    counted = count_run(run)
    model = attached(run)
    actual = count(model)
    assert (counted.totals.trained, counted.totals.stored) == (actual.trained, actual.stored)
    assert sum(group.stored for group in counted.groups) == actual.stored
    assert actual.backbone == count(build("roberta", **WIDE)).backbone
    own = {name for name, tensor in list_added(model).items() if tensor.requires_grad}
    assert sum(model.get_parameter(name).numel() for name in own) == actual.trained
    assert own <= gradients_of(model, model(**batch("roberta")).loss).keys()


@pytest.mark.slow
def test_counts_are_those_of_the_formulas(tmp_path: Path) -> None:
    """At four matrices of 64 x 64, with r = 4: by hand."""
    build("roberta", **WIDE).config.save_pretrained(tmp_path)
    places, r, d = 4, 4, 64
    expected = {
        "lora": places * 2 * r * d,
        "dora": places * (2 * r * d + d),
        "adalora": places * (6 * (2 * d + 1)),  # 1.5 r at the start
        "loha": places * 4 * r * d,
        "hra": places * r * d,
        "vera": places * (r + d),
        "shira": places * r * 2 * d,
        "miss": places * r * d,
    }
    for method, stored in expected.items():
        run = run_of(method)
        run = replace(run, bottleneck=r, size=None, model=replace(run.model, path=str(tmp_path)))
        assert count_run(run).totals.stored == stored, method


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["5%", "3000"])
def test_a_budget_is_solved_as_for_our_own(budget: str, tmp_path: Path) -> None:
    build("roberta", **WIDE).config.save_pretrained(tmp_path)

    def solved(method: str, *overrides: str) -> int | None:
        run = compose_run([f"method={method}", "task=sst2", f"budget={budget}", *overrides])
        return solve_budget(replace(run, model=replace(run.model, path=str(tmp_path)))).bottleneck

    own = solved("lora")
    assert solved("peft", "peft.type=LORA") == own and own is not None and own > 2
    for method in ("dora", "adalora", "hra", "loha"):
        rank = solved(method)
        run = run_of(method)
        run = replace(run, size=None, model=replace(run.model, path=str(tmp_path)))
        most = count_run(replace(run, bottleneck=rank)).totals
        more = count_run(replace(run, bottleneck=(rank or 0) + (2 if method == "hra" else 1))).totals
        limit = 3000 if budget == "3000" else int(0.05 * most.backbone)
        assert most.stored <= limit < more.stored
    with pytest.raises(UserError, match="its parameters do not grow with its rank"):
        solved("randlora")


def test_lora_of_peft_is_our_lora() -> None:
    """The same weights give the same logits, at the places that the axes name, in a decoder with few key heads too."""
    for family in ("roberta", "bart_classifier"):
        own = compose_run(["method=lora", "task=sst2", "bottleneck=4", "input_dropout=0"])
        theirs = run_of("peft", "peft.type=LORA", "bottleneck=4", "composition_function=scaled")
        theirs.composition_function.scale = own.composition_function.scale
        ours, peers = attached(own, family), attached(theirs, family)
        shake(ours)
        down = [p for name, p in ours.named_parameters() if name.endswith("function.down")]
        up = [p for name, p in ours.named_parameters() if name.endswith("function.up")]
        lora_a = [p for name, p in peers.named_parameters() if ".lora_A." in name]
        lora_b = [p for name, p in peers.named_parameters() if ".lora_B." in name]
        assert len(down) == len(lora_a) > 0
        with torch.no_grad():
            for source, target in [*zip(down, lora_a, strict=True), *zip(up, lora_b, strict=True)]:
                target.copy_(source[0])
            for name, p in ours.named_parameters():
                if p.requires_grad and "function" not in name:
                    peers.get_parameter(name).copy_(p)
        torch.testing.assert_close(logits(peers, family), logits(ours, family), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", PRESETS)
def test_beside_a_bfloat16_backbone_it_is_trained_in_float32(method: str) -> None:
    model = build("roberta", **WIDE).to(torch.bfloat16)
    attach_run(model, run_of(method))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    loss = model.train()(**batch("roberta")).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


@pytest.mark.parametrize("method", ["dora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("oft", "vera"))])
def test_without_padding_the_gradients_are_the_same(method: str, tmp_path: Path) -> None:
    """And the fast paths of the forward pass are taken."""
    moved = {}
    for padding_free in (False, True):
        model = attached(run_of(method, "input_dropout=0"), "bart", dropout=0.0, attention_dropout=0.0)
        shake(model, scale=0.05)
        model.config.use_cache = False
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        done = fitted(model, Targets("bart"), one_step(padding_free=padding_free), tmp_path)
        assert ("padding_free" in done.fast_paths) is padding_free and "fused_loss" in done.fast_paths
        moved[padding_free] = {name: model.get_parameter(name).detach() - p for name, p in before.items()}
    assert relative_error(moved[True], moved[False]) < 1e-3


@pytest.mark.parametrize("method", ["dora", "rslora"])
def test_it_is_explained_with_the_axes_that_it_has(method: str) -> None:
    explained = explain(run_of(method, "bottleneck=4", "model=mini"))
    (row,) = explained.rows
    assert row.name == f"{method.upper()} of the peft library" and row.formula.startswith("h ← ")
    assert ("functional form" in row.axes) is (method == "rslora")
    assert row.axes["modified representation"][0] == "query_value"
    assert sum(size.stored for size in explained.sizes) == explained.counted.totals.stored


# ---- AdaLoRA: its penalty, and ranks that are pruned ----


def adaptive(total: int = 16) -> Run:
    return run_of("adalora", "bottleneck=2", "input_dropout=0", "peft.tinit=2", "peft.tfinal=4", "peft.deltaT=1")


def test_the_penalty_is_that_of_peft() -> None:
    run = adaptive()
    model = attached(run)
    shake(model)
    penalty = make_penalty(model)
    assert penalty is not None
    wrapped = peft.get_peft_model(build("roberta", **WIDE), get_settings(model))
    for name, tensor in list_added(model).items():
        wrapped.base_model.model.get_parameter(name).data.copy_(tensor)
    plain = model(**batch("roberta")).loss
    head = {name: p for name, p in model.named_parameters() if name.startswith("classifier")}
    for name, p in head.items():
        wrapped.base_model.model.get_parameter(name).data.copy_(p)
    expected = wrapped.eval().base_model(**batch("roberta")).loss
    torch.testing.assert_close(plain + penalty(), expected, rtol=1e-5, atol=0)
    assert make_penalty(attached(run_of("dora"))) is None


class Killed(Exception):
    pass


def pruned(folder: Path, *, resume: bool = False, stop: int | None = None) -> PreTrainedModel:
    """A model after 16 steps of AdaLoRA, or after those that came before it was killed at step `stop`."""
    model = attached(adaptive(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = Trainer(
        learning_rate=0.01,
        max_steps=16,
        batch_size=4,
        schedule=Schedule.constant,
        warmup=0.0,
        device=Device.cpu,
        keep=Keep.last,
    )
    checkpoints = Checkpoints(folder, minutes=0, stamp="")
    taken = checkpoints.take_up() if resume else None
    assert not resume or taken is not None
    torch.manual_seed(3)

    def log(values: dict[str, Any]) -> None:
        if values["step"] == stop:
            raise Killed

    fitted(
        model,
        Rows(batch("roberta", (9,) * EXAMPLES), [9] * EXAMPLES),
        settings,
        folder,
        checkpoints=checkpoints,
        resume=taken,
        log=log,
    )
    return model


@pytest.mark.slow
def test_ranks_are_pruned_to_the_target_and_a_killed_training_goes_on_alike(tmp_path: Path) -> None:
    model = pruned(tmp_path / "whole")
    values = {name: p for name, p in model.named_parameters() if ".lora_E." in name}
    assert sum(int(p.ne(0).sum()) for p in values.values()) == 2 * len(values)  # of 3 each at the start
    with pytest.raises(Killed):
        pruned(tmp_path / "killed", stop=9)
    again = pruned(tmp_path / "killed", resume=True)
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name


def test_a_schedule_without_steps_to_prune_in_is_refused(tmp_path: Path) -> None:
    model = attached(run_of("adalora", "peft.tinit=20", "bottleneck=2"))
    with pytest.raises(UserError, match=r"peft.tinit=20 and peft.tfinal=0 leave too few of the 1 optimiser steps"):
        fitted(model, Targets("roberta"), one_step(), tmp_path)


# ---- LoRA+ ----


@pytest.mark.parametrize("method", ["lora_plus", pytest.param("dora", marks=pytest.mark.slow)])
def test_w_up_has_the_larger_rate(method: str, tmp_path: Path) -> None:
    """After a step of nearly plain gradients, W_up has moved 16 times as far as without, all others as far."""
    moved = {}
    for ratio in (None, 16.0):
        model = attached(run_of(method, "input_dropout=0", "bottleneck=2"), "roberta")
        shake(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        fitted(model, Targets("roberta"), one_step(lora_plus=ratio, learning_rate=1e-3), tmp_path)
        moved[ratio] = {name: model.get_parameter(name).detach() - p for name, p in before.items()}
    ups = [name for name in moved[None] if name.endswith("function.up") or ".lora_B." in name]
    assert len(ups) == 4
    for name, step in moved[None].items():
        factor = 16 if name in ups else 1
        torch.testing.assert_close(moved[16.0][name], factor * step, rtol=0.02, atol=1e-6)


def test_groups_of_the_optimiser_keep_their_weight_decay() -> None:
    model = attached(run_of("lora_plus"))
    ups = [p for name, p in model.named_parameters() if name.endswith("function.up")]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is up for up in ups)]
    optimizer = torch.optim.AdamW([{"params": [*ups, *others], "weight_decay": 0.3}], lr=0.1)
    raise_up_rate(optimizer, model, 4)
    plain, raised = optimizer.param_groups
    assert (plain["lr"], raised["lr"], raised["weight_decay"]) == (0.1, 0.4, 0.3)
    assert len(raised["params"]) == len(ups) and len(plain["params"]) == len(others)


# ---- rows, names and refusals ----


def test_rows_have_the_axes_that_a_method_has() -> None:
    (dora,) = record_axes(run_of("dora", "bottleneck=4", "modified_representation.layers=[1]"))
    assert dora.functional_form == "dora" and dora.modified_representation == "query_value"
    assert (dora.insertion_form, dora.composition_function, dora.bottleneck) == ("", "", 4)
    assert dora.options["peft.type"] == "DORA" and dora.options["modified_representation.layers"] == [1]
    (rslora,) = record_axes(run_of("rslora", "bottleneck=16"))
    assert (rslora.functional_form, rslora.insertion_form, rslora.composition) == ("identity", "parallel", "scaled 2")
    (named,) = record_axes(run_of("peft", "peft.type=LORA", "peft.target_modules=[query,value]"))
    assert named.modified_representation == "query, value"


def test_what_peft_is_told_names_the_run() -> None:
    runs = [run_of("dora"), run_of("dora", "peft.lora_alpha=3"), run_of("dora", "bottleneck=3"), run_of("rslora")]
    assert len({hash_run(run) for run in runs}) == len(runs)
    plain = compose_run(["method=lora", "task=sst2"])
    assert hash_run(replace(plain, peft={})) == hash_run(plain) != hash_run(replace(plain, peft={"type": "LORA"}))


def test_scale_is_alpha_over_the_rank() -> None:
    model = attached(run_of("dora", "bottleneck=4", "composition_function.scale=3"))
    assert get_settings(model).lora_alpha == 12
    model = attached(run_of("dora", "bottleneck=4", "peft.lora_alpha=2"))
    assert get_settings(model).lora_alpha == 2
    assert record_axes(run_of("peft", "peft.type=LORA", "bottleneck=4", "peft.lora_alpha=2"))[0].scale == 0.5


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=peft"], "method=peft needs peft.type, such as peft.type=DORA."),
        (["method=peft", "peft.type=DORAA"], "peft.type=DORAA is unknown; did you mean DORA?"),
        (["method=lora", "peft.type=DORA"], "peft.type=DORA with a modification of its own (method=lora)"),
        (["method=full", "peft.r=2"], "peft.r is for methods of peft, and method=full is none; use method=peft."),
        (["method=dora", "mix=[prefix]"], "peft.type=DORA with mix=[attention]"),
        (["method=dora", "peft.lora_alhpa=2"], "peft.lora_alhpa is no key of peft's LORA; did you mean lora_alpha?"),
        (["method=dora", "peft.r=2"], "peft.r=2: use bottleneck=2, which is this size in all methods."),
        (["method=dora", "peft.use_dora=false"], "peft.use_dora=False is not peft.type=DORA; use peft.type=LORA."),
        (["method=dora", "peft.bias=all"], "peft.bias=all cannot be set: unfreeze=bias trains the backbone's biases."),
        (["method=hra", "bottleneck=3"], "bottleneck=3 with peft.type=HRA: it must be even, so that the run begins as"),
        (["method=oft", "bottleneck=4"], "bottleneck=4 with peft.type=OFT, which has no rank"),
        (["method=oft", "budget=1%"], "budget=1% determines bottlenecks, but method=oft has none"),
        (["method=oft", "input_dropout=0.1"], "input_dropout=0.1 with peft.type=OFT, which has no dropout on x"),
        (["method=dora", "modified_representation=ffn"], "modified_representation=ffn with peft.type=DORA: peft modi"),
        (["method=dora", "insertion_form=parallel"], "insertion_form=parallel with peft.type=DORA: the method decides"),
        (["method=dora", "prefix_mlp=8"], "prefix_mlp=8 with peft.type=DORA has no effect; leave it out."),
        (["method=peft", "peft.type=PREFIX_TUNING"], "peft.type=PREFIX_TUNING is not supported, because it puts"),
        (["method=peft", "peft.type=LORA", "peft.init_lora_weights=eva"], "peft.init_lora_weights=eva reads data"),
        (["method=adapter", "trainer.lora_plus=16"], "trainer.lora_plus=16 with method=adapter: it is for LoRA's two"),
    ],
)
def test_refusals_are_sentences(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        compose_run([*overrides, "task=sst2"])
    assert str(refused.value).startswith(sentence)


def test_without_peft_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftbench.config.peft_methods.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^peft.type=DORA needs peft, which is not installed: pip install peftbench"):
        compose_run(["method=dora", "task=sst2"])


def test_a_method_that_an_older_peft_lacks_is_said_to_need_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftbench.config.peft_methods.list_types", lambda: ["LORA"])
    with pytest.raises(
        UserError, match=rf"^peft.type=HIRA needs a newer peft than {re.escape(peft.__version__)}, which"
    ):
        compose_run(["method=peft", "peft.type=HIRA", "task=sst2"])


def test_projections_that_are_one_module_are_changed_as_a_whole() -> None:
    run = run_of("dora", "bottleneck=2")
    with pytest.raises(UserError, match=r"gpt2 computes key, query, value by one projection, c_attn, which peft"):
        attach_run(build("gpt2_classifier"), run)
    model = build("gpt2_classifier")
    attach_run(model, run_of("dora", "bottleneck=2", "peft.target_modules=[c_attn]"))
    assert len([name for name in list_added(model) if ".lora_A." in name]) == len(model.transformer.h)
    model = build("gpt2_classifier")
    attach_run(model, run_of("dora", "bottleneck=2", "modified_representation=all_linear"))
    assert len([name for name in list_added(model) if ".lora_A." in name]) == 4 * len(model.transformer.h)


def test_what_peft_refuses_is_said() -> None:
    with pytest.raises(UserError, match=r"^peft.type=ROAD on roberta: peft says: The out_features of the base layer"):
        attach_run(build("roberta"), run_of("road"))


def test_every_type_of_the_installed_peft_is_known_or_runs() -> None:
    """Those that no row of ours describes are named as peft names them."""
    members = {member.name for member in peft.PeftType}
    missing = {method.library or name for name, method in METHODS.items()} - members
    assert missing <= {"HIRA"}  # which peft 0.18 lacks
    assert members - set(REFUSED) <= {*list_types()}
