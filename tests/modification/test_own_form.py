"""A functional form of the user's own: the same numbers as our own form that it writes out, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from peftbench import load_run
from peftbench.cli.main import main
from peftbench.config import own_parts
from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.counts.run_counts import count_run
from peftbench.counts.solve import solve_budget
from peftbench.exchange.peft_form import PeftAdapter
from peftbench.modification.attach import attach
from peftbench.modification.functional_form import Bottleneck, OwnForm
from peftbench.modification.merge import find_obstacles
from peftbench.records.record import find_record
from peftbench.records.recording import record_axes
from peftbench.utils.errors import UserError
from tests.families import batch, build, modification, outcome, shake
from tests.finished import make_run
from tests.own_parts import EXAMPLE, forget_classes, importable

FORMS = """
import torch
from torch import nn

class Adapter(nn.Module):
    "The relu form of peftbench, written out."
    def __init__(self, in_width, bottleneck, out_width):
        super().__init__()
        self.down, self.up = nn.Linear(in_width, bottleneck, False), nn.Linear(bottleneck, out_width, False)
    def forward(self, x):
        return self.up(torch.relu(self.down(x)))

class Grouped(nn.Module):
    "The same, for all heads at once."
    def __init__(self, in_width, bottleneck, out_width, groups):
        super().__init__()
        self.down = nn.Parameter(torch.randn(groups, in_width, bottleneck))
        self.up = nn.Parameter(torch.randn(groups, bottleneck, out_width))
    def forward(self, x):
        return torch.relu(x @ self.down) @ self.up

class Vector(nn.Module):
    def __init__(self, in_width, out_width):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(out_width))
    def forward(self, x):
        return self.vector * x.mean(-1, keepdim=True)

class Square(Adapter):
    def __init__(self, in_width, bottleneck, out_width):
        super().__init__(in_width, bottleneck * bottleneck, out_width)

class Needy(Adapter):
    def __init__(self, in_width, bottleneck, out_width, rate):
        super().__init__(in_width, bottleneck, out_width)

class Bare(nn.Module):
    def __init__(self, width):
        super().__init__()

class NotTrained(Vector):
    def __init__(self, in_width, out_width):
        super().__init__(in_width, out_width)
        self.vector.requires_grad_(False)

class Random(Vector):
    def __init__(self, in_width, out_width):
        super().__init__(in_width, out_width)
        self.register_buffer("basis", torch.randn(in_width))

class Mixing(Vector):
    def forward(self, x):
        return self.vector + x.mean(-2, keepdim=True).mean(-1, keepdim=True).expand(*x.shape[:-1], 1)

class Narrow(Vector):
    def forward(self, x):
        return x[..., :1]

class Fails(Vector):
    def forward(self, x):
        raise ZeroDivisionError("no width")

class Infinite(Vector):
    def forward(self, x):
        return super().forward(x) + torch.inf

class Pair(Vector):
    def forward(self, x):
        return x, x

class OnCpuOnly(Vector):
    def __init__(self, in_width, out_width):
        super().__init__(in_width, out_width)
        self.first = self.vector[0].item()
"""


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The example's folder and one with forms can be imported from, in each test only."""
    (tmp_path / "forms.py").write_text(FORMS, encoding="utf-8")
    with importable(monkeypatch, EXAMPLE, tmp_path):
        yield


def copy_weights(own: nn.Module, ours: nn.Module) -> int:
    """Copy the weights of our forms into those of the user's own, and return how many places there are."""
    pairs = [
        [module for module in model.modules() if isinstance(module, kind)]
        for model, kind in ((own, OwnForm), (ours, Bottleneck))
    ]
    for one, other in zip(*pairs, strict=True):
        assert isinstance(one, OwnForm) and isinstance(other, Bottleneck)
        assert other.down is not None and other.up is not None
        forms = list(one.form) if isinstance(one.form, nn.ModuleList) else [one.form]
        with torch.no_grad():
            if isinstance(forms[0].down, nn.Parameter):
                forms[0].down.copy_(other.down.transpose(1, 2))
                forms[0].up.copy_(other.up.transpose(1, 2))
                continue
            for form, down, up in zip(forms, other.down, other.up, strict=True):
                form.down.weight.copy_(down)
                form.up.weight.copy_(up)
    return len(pairs[0])


@pytest.mark.parametrize(
    ("family", "form", "representation", "insertion", "head_input", "composition"),
    [
        pytest.param("bart", "Adapter", "ffn", "parallel", "query", "scaled", marks=pytest.mark.slow),
        ("bart", "Adapter", "heads", "parallel", "query", "add"),
        pytest.param("bart", "Grouped", "heads", "parallel", "hidden", "add", marks=pytest.mark.slow),
        ("bart", "Grouped", "heads", "parallel", "normed_query", "gated_add"),
        ("bart", "Adapter", "heads", "sequential", "query", "multiply"),
        ("t5", "Adapter", "layer", "sequential", "query", "add"),
        ("llama", "Adapter", "key_value", "parallel", "query", "gated"),
        pytest.param("llama", "Adapter", "heads", "parallel", "query", "add", marks=pytest.mark.slow),
        pytest.param("bert", "Adapter", "ffn_weights", "parallel", "query", "add", marks=pytest.mark.slow),
    ],
)
def test_a_form_that_writes_out_ours_computes_the_same(
    family: str, form: str, representation: str, insertion: str, head_input: str, composition: str
) -> None:
    logits, gradients = [], []
    models = []
    for name in (f"forms.{form}", "relu"):
        m = modification(
            name,
            representation,
            insertion,
            composition,
            scale=4.0,
            head_input=head_input,
            dropout=0.0,
            input_dropout=0.0,
        )
        model = build(family)
        attach(model, {"": m})
        shake(model)
        models.append(model)
    own, ours = models
    for name, parameter in own.named_parameters():  # gates and scales too
        if ".form." not in name and parameter.requires_grad:
            parameter.data.copy_(ours.get_parameter(name).data)
    assert copy_weights(own, ours) > 1
    for model in models:
        logits.append(outcome(model, family, train=False))
        gradients.append(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    bare = build(family)(**batch(family)).logits
    assert not torch.allclose(logits[0], bare, atol=1e-3)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


def test_dropout_and_norms_are_those_of_our_forms() -> None:
    models = []
    for name in ("forms.Adapter", "relu"):
        model = build("bart")
        attach(model, {"": modification(name, "ffn", dropout=0.0, input_dropout=0.5, layer_norm="output")})
        shake(model)
        models.append(model)
    own, ours = models
    copy_weights(own, ours)
    for name, parameter in own.named_parameters():
        if "norm_out" in name:
            parameter.data.copy_(ours.get_parameter(name).data)
    torch.testing.assert_close(outcome(own, "bart", train=True), outcome(ours, "bart", train=True))


def test_weights_in_float32_serve_a_bfloat16_backbone() -> None:
    model = build("bart").bfloat16()
    attach(model, {"": modification("forms.Adapter", "ffn")})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert outcome(model, "bart", train=False).dtype is torch.bfloat16


def test_it_is_counted_and_a_budget_sets_its_size() -> None:
    words = ["method=lora", "functional_form._target_=forms.Adapter"]
    counts = count_run(compose_run([*words, "bottleneck=5"], reads_data=False)).totals
    alike = count_run(compose_run(["method=lora", "bottleneck=5"], reads_data=False)).totals
    assert (counts.trained, counts.stored, counts.paper) == (alike.trained, alike.stored, alike.paper)
    solved = solve_budget(compose_run([*words, "budget=2%"], reads_data=False))
    assert solved.bottleneck == solve_budget(compose_run(["method=lora", "budget=2%"], reads_data=False)).bottleneck
    with pytest.raises(UserError, match=r"budget=2%: the parameters of forms.Square do not grow linearly"):
        solve_budget(compose_run(["method=lora", "functional_form._target_=forms.Square", "budget=2%"]))
    with pytest.raises(UserError, match=r"budget=2% determines bottlenecks, but method=lora has none"):
        compose_run(["method=lora", "functional_form._target_=forms.Vector", "bottleneck=null", "budget=2%"])


def test_a_run_is_named_by_the_form_its_settings_and_its_code(tmp_path: Path) -> None:
    def name(*words: str) -> str:
        return hash_run(compose_run(["method=lora", *words]))

    own = name("functional_form._target_=my_parts.Swish2")
    assert own == name("functional_form.name=my_parts.Swish2") != name()
    assert name("functional_form._target_=my_parts.Swish2", "functional_form.settings.beta=2") != own
    before = name("functional_form._target_=forms.Adapter")
    (tmp_path / "forms.py").write_text(FORMS.replace("torch.relu", "torch.tanh"), encoding="utf-8")
    assert name("functional_form._target_=forms.Adapter") != before
    assert name() == name("functional_form=identity")  # no run of our own forms has another name


def test_records_name_the_form_and_its_settings() -> None:
    words = ["functional_form._target_=my_parts.Swish2", "functional_form.settings.beta=2.5"]
    (axes,) = record_axes(compose_run(["method=lora", *words]))
    assert axes.functional_form == "my_parts.Swish2"
    assert axes.options["functional_form.settings.beta"] == 2.5


def test_installed_packages_offer_forms_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_parts, "list_entry_points", lambda key: {"swish2": "my_parts.Swish2"})
    words = ["mix=[parallel_adapter_ffn]", "mix.ffn.functional_form.name=swish2"]
    run = compose_run(["method=lora", "functional_form._target_=swish2", *words])
    assert run.functional_form.name == run.mix["ffn"].functional_form.name == "my_parts.Swish2"


@pytest.mark.slow
def test_a_finished_run_is_loaded_and_told_of_code_that_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=lora", "functional_form._target_=forms.Adapter", "task=doctopic", "bottleneck=4"]
    folder = make_run(tmp_path / "run", *words)
    model, _ = load_run(folder)
    stored = find_record(folder)
    assert stored is not None and set(stored.own_code) == {"forms.Adapter"}
    assert "has changed" not in capsys.readouterr().err
    assert set(find_obstacles(model).values()) == {"nobody knows whether a form of your own is linear"}
    with pytest.raises(UserError, match="peft has no such form"):
        PeftAdapter.of(model, compose_run(words))
    (tmp_path / "forms.py").write_text(f"{FORMS}\n\n", encoding="utf-8")
    forget_classes()
    again, _ = load_run(folder)
    assert "The code of forms.Adapter has changed since this run was recorded." in capsys.readouterr().err
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("forms.Missing", [], "functional_form._target_=forms.Missing: forms has no Missing."),
        ("no_such.Form", [], "functional_form._target_=no_such.Form cannot be imported (ModuleNotFoundError"),
        ("os.path", [], "functional_form._target_=os.path is not a class derived from torch.Module."),
        ("my_parts.WithinOne", [], "functional_form._target_=my_parts.WithinOne is not a class derived from"),
        ("forms.Bare", [], "needs the parameters in_width and out_width in its __init__"),
        ("forms.Needy", [], "forms.Needy needs rate; give functional_form.settings.rate=VALUE."),
        ("forms.Adapter", ["functional_form.settings.b=1"], "forms.Adapter has no b; it takes no settings."),
        ("my_parts.Swish2", ["functional_form.settings.b=1"], "my_parts.Swish2 has no b; its settings are beta."),
        ("forms.Adapter", ["functional_form.settings.in_width=1"], "a form gets in_width from the run; leave it out."),
        ("forms.Adapter", ["bias=true"], "bias=true with functional_form._target_=forms.Adapter: its __init__ has no"),
        ("forms.Adapter", ["init=bert"], "its __init__ has no parameter init; set init=lora, or give it one."),
        ("forms.Adapter", ["bottleneck=null"], "bottleneck=null with functional_form._target_=forms.Adapter, which"),
        ("forms.Vector", [], "its __init__ has no parameter bottleneck; set bottleneck=null, or give it one."),
        ("forms.NotTrained", ["bottleneck=null"], "has no parameter that is trained."),
        ("forms.Random", ["bottleneck=null"], "its basis is random and not trained, so that a checkpoint would not"),
        ("forms.Mixing", ["bottleneck=null"], "computes a position's Δh from other positions or examples too"),
        (
            "forms.Narrow",
            ["bottleneck=null"],
            "Narrow returns vectors of 1 elements; it must return Δh, whose vectors have 40.",
        ),
        ("forms.Fails", ["bottleneck=null"], "fails on vectors of shape (2, 3, 24): ZeroDivisionError: no width"),
        ("forms.Infinite", ["bottleneck=null"], "returns values that are not finite"),
        ("forms.Pair", ["bottleneck=null"], "Pair returns tuple; it must return Δh, whose vectors have 40."),
        ("forms.OnCpuOnly", ["bottleneck=null"], "fails: RuntimeError: Tensor.item() cannot be called on meta tensors"),
    ],
)
def test_what_is_no_form_is_refused_in_one_sentence_before_anything_is_loaded(
    name: str, words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["method=lora", f"functional_form._target_={name}", *words, f"output_dir={tmp_path / 'runs'}"]
    assert main(["train", *typed]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peftbench: ")]
    assert len(told) == 1 and sentence in told[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["functional_form=my_parts.Swish2"], "a form of your own is typed functional_form._target_=my_parts.Swish2"),
        (["functional_form.settings.beta=1"], "functional_form=identity takes none; they are for a form of your own"),
        (["functional_form._target_=swish"], "functional_form.name=swish is unknown"),
        (
            ["functional_form._target_=my_parts.Swish2", "modified_representation=embedding"],
            "modified_representation=embedding is prompt tuning",
        ),
        (
            ["functional_form._target_=my_parts.Swish2", "modified_representation=heads", "prefix_mlp=8"],
            "prefix_mlp=8 makes W_down and W_up, and functional_form=my_parts.Swish2 is a form of your own",
        ),
    ],
)
def test_keys_that_do_not_fit_an_own_form_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        compose_run(["method=lora", *words])
    assert sentence in str(error.value)
