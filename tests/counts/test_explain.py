"""`peftbench explain`: its formulas, its numbers against the counted ones, and its picture of the network."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.notation import COMPOSITIONS, REPRESENTATIONS
from peftbench.config.schema import (
    ACTIVATIONS,
    Composition,
    FFNInput,
    HeadInput,
    Modification,
    Representation,
    Unfreeze,
)
from peftbench.counts.explanation import Explanation, explain
from peftbench.counts.formula import describe_modification
from peftbench.counts.resolve import resolve_sizes
from peftbench.counts.sizes import Size
from peftbench.counts.tree import Branch
from peftbench.modification.attach import attach
from peftbench.modification.counting import count, count_places
from peftbench.records.recording import start_record
from tests.families import FAMILIES, MORE_FAMILIES, PRESETS, build, modification, run_on, table

FORMULAS = {  # as table 1 and equation 7 have them, with the biases that a preset has
    "prompt": "h ← [P; h]",
    "prefix": "h ← (1 - λ) h + λ softmax(q P_kᵀ) P_v",
    "prefix_no_gating": "h ← h + softmax(q P_kᵀ) P_v",
    "adapter": "h ← h + ReLU(h W_down + b_down) W_up + b_up",
    "pfeiffer": "h ← h + ReLU(h W_down + b_down) W_up + b_up",
    "lora": "h ← h + s · x W_down W_up",
    "lora_ffn": "h ← h + s · x W_down W_up",
    "parallel_adapter": "h ← h + ReLU(x W_down + b_down) W_up + b_up",
    "parallel_adapter_attention": "h ← h + ReLU(x W_down + b_down) W_up + b_up",
    "heads_joint": "h ← h + ReLU(x W_down + b_down) W_up + b_up",
    "mh_parallel_adapter": "h ← h + ReLU(q W_down) W_up",
    "mh_parallel_adapter_hidden": "h ← h + ReLU(x W_down) W_up",
    "mh_parallel_adapter_normed_query": "h ← h + ReLU(q W_down) W_up",
    "scaled_parallel_adapter": "h ← h + s · (ReLU(x W_down + b_down) W_up + b_up)",
    "mam": "h ← h + s · (ReLU(x W_down + b_down) W_up + b_up)",
    "learned_scale": "h ← h + s · ReLU(x W_down) W_up",
    "learned_gate": "h ← (1 - λ) h + λ ReLU(x W_down) W_up",
    "heads_gate": "h ← (1 - λ) h + λ ReLU(q W_down) W_up",
    "ia3": "h ← h ∘ (1 + l)",
    "unipelt": "h ← h + λ (ReLU(h W_down + b_down) W_up + b_up)",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_formulas(preset: str) -> None:
    assert describe_modification("", PRESETS[preset][""]).formula == FORMULAS[preset]


@pytest.mark.parametrize(
    ("m", "formula"),
    [
        (modification("identity", bias=True), "h ← h + (x W_down + b_down) W_up + b_up"),
        (modification("gelu_new", layer_norm="input"), "h ← h + gelu_new(LN(x) W_down) W_up"),
        (modification("silu", layer_norm="output", bias=True), "h ← h + LN(SiLU(x W_down + b_down) W_up + b_up)"),
        (
            modification("relu", layer_norm="output", bias=True, composition="scaled"),
            "h ← h + s · LN(ReLU(x W_down + b_down) W_up + b_up)",
        ),
        (modification("softmax", "ffn"), "h ← h + softmax(x W_down) W_up"),
        (modification("softmax", "heads", "sequential"), "h ← h + softmax(h W_down) W_up"),
        (modification("softmax", "heads", bias=True), "h ← h + softmax(q W_down + b_down) W_up + b_up"),
    ],
)
def test_formulas_of_other_points(m: Modification, formula: str) -> None:
    assert describe_modification("", m).formula == formula


def test_the_gate_and_the_scale_say_what_they_are() -> None:
    meanings = {name: describe_modification("", PRESETS[name][""]).axes["composition function"][1] for name in PRESETS}
    assert meanings["prefix"] == "(1 - λ) h + λ Δh, λ: the share of the attention that the prefix gets (eq. 8)"
    assert meanings["learned_gate"] == "(1 - λ) h + λ Δh, λ = σ(x w + b), trained"
    assert meanings["heads_gate"] == "(1 - λ) h + λ Δh, λ = σ(q w + b), trained"
    assert meanings["lora"] == "h + s · Δh, s = 2"
    assert meanings["unipelt"] == "h + λ Δh, λ = σ(h w + b), trained"
    assert meanings["learned_scale"] == "h + s · Δh, s = 1 at first, trained"


def test_where_no_module_holds_the_layers_output() -> None:
    row = describe_modification("", PRESETS["pfeiffer"][""], over_residual=True)
    assert row.formula == "h ← h + ReLU((h + x) W_down + b_down) W_up + b_up"
    assert describe_modification("", PRESETS["adapter"][""], over_residual=True) == describe_modification(
        "", PRESETS["adapter"][""]
    )


def test_every_choice_of_every_axis_is_written() -> None:
    assert REPRESENTATIONS.keys() == set(Representation) - {Representation.none}
    assert COMPOSITIONS.keys() == set(Composition) - {Composition.none}
    for name in ACTIVATIONS:
        assert describe_modification("", modification(name)).formula.endswith("(x W_down) W_up")
    read = {
        m.modified_representation.head_input: describe_modification("", m).axes["insertion form"][1]
        for m in (PRESETS[f"mh_parallel_adapter{which}"][""] for which in ("", "_hidden", "_normed_query"))
    }
    assert len(set(read.values())) == len(HeadInput)
    m = modification("relu", "ffn")
    m.modified_representation.ffn_input = FFNInput.residual
    assert "residual" in describe_modification("", m).axes["insertion form"][1]


@pytest.mark.parametrize(
    ("name", "m"),
    [
        ("prefix tuning (table 1)", PRESETS["prefix"][""]),
        ("adapter (table 1)", PRESETS["adapter"][""]),
        ("LoRA (table 1)", PRESETS["lora"][""]),
        ("parallel adapter (table 1)", PRESETS["parallel_adapter_attention"][""]),
        ("multi-head parallel adapter (table 1)", PRESETS["mh_parallel_adapter"][""]),
        ("scaled parallel adapter (table 1)", PRESETS["mam"][""]),
        ("Pfeiffer adapter (table 6)", PRESETS["pfeiffer"][""]),
        (None, PRESETS["learned_gate"][""]),
        (None, modification("gelu")),
    ],
)
def test_the_papers_names(name: str | None, m: Modification) -> None:
    assert describe_modification("", m).name == name


def value(written: str) -> int:
    """What a formula in numbers comes to: sums of products, perhaps in parentheses and times a number of places."""
    found = re.fullmatch(r"\(?([\d· +]+?)\)?(?: × (\d+))?", written)
    assert found is not None, written
    total, places = found.groups()
    return int(places or 1) * sum(math.prod(map(int, term.split("·"))) for term in total.split(" + "))


def filled_in(size: Size) -> str:
    """A formula's letters as numbers."""
    return re.sub(r"[A-Za-z]\w*", lambda letter: str(size.values[letter[0]]), size.formula.replace(" places", ""))


def explained(
    family: str, found: dict[str, Modification], folder: Path, unfreeze: Unfreeze = Unfreeze.none
) -> Explanation:
    return explain(run_on(family, folder, found, unfreeze=unfreeze))


def inserted(branch: Branch) -> int:
    """How many places a branch shows, each as often as there are layers like it."""
    below = branch.inserted + sum(inserted(child) for child in branch.children)
    return below * max(1, len(branch.layers))


@pytest.mark.parametrize(
    ("family", "preset"), table([*FAMILIES, *MORE_FAMILIES], "bart", "roberta", "t5_gated", "llama")
)
def test_formulas_come_to_the_counted_numbers(family: str, preset: str, tmp_path: Path) -> None:
    """In letters and in numbers, place by place and in total; and the network shows every place that there is."""
    found = explained(family, PRESETS[preset], tmp_path)
    model = build(family)
    attach(model, PRESETS[preset])
    assert sum(size.stored for size in found.sizes) == count(model).stored
    groups = [group for group in found.counted.groups if group.prefix is not None]
    for size, group in zip(found.sizes, groups, strict=True):
        assert size.stored == group.stored == value(size.numbers)
        assert filled_in(size) == size.numbers
        assert not re.search(r"\d{2}", size.formula.split("×")[0]), "an axis without a letter"
    assert sum(map(inserted, found.network)) == len(count_places(model))


@pytest.mark.parametrize("family", ["bart", "roberta"])
@pytest.mark.parametrize("unfreeze", Unfreeze)
def test_what_is_trained_is_marked(family: str, unfreeze: Unfreeze, tmp_path: Path) -> None:
    """As many modules as have a trained tensor of their own, a tied one at its first module."""
    found = explained(family, {}, tmp_path, unfreeze)
    model = build(family)
    attach(model, {}, unfreeze)
    seen: set[int] = set()
    expected = 0
    for module in model.modules():
        own = {id(p) for p in module.parameters(recurse=False) if p.requires_grad} - seen
        expected += bool(own)
        seen |= own

    def marked(branch: Branch) -> int:
        here = any(mark.endswith("trained") for mark in branch.marks)
        return (here + sum(map(marked, branch.children))) * max(1, len(branch.layers))

    assert sum(map(marked, found.network)) == expected
    assert not found.rows and not found.sizes


def lines(branch: Branch, depth: int = 0) -> list[str]:
    text = " ".join(filter(None, (branch.name, *branch.marks)))
    return ["  " * depth + text, *(line for child in branch.children for line in lines(child, depth + 1))]


def test_mam_spelled_out(tmp_path: Path) -> None:
    """A layer of the decoder of BART: what is read, edited and inserted, and in which module."""
    found = explained("bart", PRESETS["mam"], tmp_path)
    assert [branch.layers for branch in found.network] == [(0, 1), (0, 1)]
    assert lines(found.network[1]) == [
        "model.decoder.layers 0 to 1, the same",
        "  self_attn h is each head's output",
        "    k_proj",
        "    v_proj",
        "    q_proj q is its output",
        "    out_proj",
        "    mix.attention",
        "  self_attn_layer_norm",
        "  encoder_attn h is each head's output",
        "    k_proj",
        "    v_proj",
        "    q_proj q is its output",
        "    out_proj",
        "    mix.attention",
        "  encoder_attn_layer_norm",
        "  fc1 x is its input",
        "  fc2",
        "    sublayer_dropout h is its output",
        "      modification",
        "  final_layer_norm",
    ]
    assert [size.formula for size in found.sizes] == ["(2·r·d + r + d) × 4 places", *3 * ["2·N_h·l·d_h × 2 places"]]
    assert [size.numbers for size in found.sizes] == ["(2·5·16 + 5 + 16) × 4", *3 * ["2·4·8·4 × 2"]]


def test_a_pre_norm_layer_spelled_out(tmp_path: Path) -> None:
    """Llama's layer output is a sum that no module holds; the residual is read where the norm reads it."""
    (layer,) = (b for b in explained("llama", PRESETS["pfeiffer"], tmp_path).network if b.layers)
    marked = [line.strip() for line in lines(layer) if " is " in line or "modification" in line]
    assert marked == ["down_proj h is its output", "modification", "post_attention_layernorm x is its input"]


def test_sequential_reads_nothing_else(tmp_path: Path) -> None:
    found = explained("roberta", PRESETS["adapter"], tmp_path)
    marked = [line.strip() for line in lines(found.network[0]) if " is " in line]
    assert marked == ["dense h is its output", "dropout h is its output"]


def test_layers_that_differ_stand_apart(tmp_path: Path) -> None:
    found = explain(run_on("roberta", tmp_path, {"": modification("relu", "ffn", layers=[-1])}))
    names = [branch.name for branch in found.network if branch.layers]
    assert names == ["roberta.encoder.layer 0", "roberta.encoder.layer 1"]
    assert [inserted(branch) for branch in found.network if branch.layers] == [0, 1]


def test_unfrozen_biases_beside_a_modification(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["explain", "method=lora", "unfreeze=bias"]) == 0
    printed = capsys.readouterr().out
    assert "The backbone's own biases are trained too." in printed
    assert re.search(r"biases +14,976 +0\.32%  the backbone's own", printed)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("method", ["mam", "prompt", "full", "heads_joint"])
def test_it_prints_plain_text_within_the_width(
    method: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    point = ["method=parallel_adapter_attention", f"modified_representation={method}"]
    assert main(["explain", "task=xsum", *(point if method == "heads_joint" else [f"method={method}"])]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns and "\x1b" not in printed
    assert printed.count("model.encoder.layers 0 to 11, the same") == 1


def test_mam_on_bart_large_on_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["explain", "task=xsum"]) == 0
    printed = [line.strip(" │├└─") for line in capsys.readouterr().out.splitlines()]
    for line in (
        "mam on bart_large of 406,291,456 parameters",
        "scaled parallel adapter (table 1)",
        "h ← h + s · (ReLU(x W_down + b_down) W_up + b_up)",
        "mix.attention.*: prefix tuning (table 1)",
        "h ← (1 - λ) h + λ softmax(q P_kᵀ) P_v",
        "model.decoder.layers 0 to 11, the same  BartDecoderLayer",
        "+ modification: down 512×1024 + 512, up 1024×512 + 1024",
        "+ mix.attention: down 16×30×64, up 16×64×30",
        "ffn: (2·r·d + r + d) × 24 places",
        "= (2·512·1024 + 512 + 1024) × 24 = 25,202,688",
        "decoder cross heads: 2·N_h·l·d_h × 12 places = 2·16·30·64 × 12 = 737,280",
        "stored   27,414,528   6.75%  of the backbone",
        "trained  86,810,976  21.37%  during training an MLP computes the prefix",
    ):
        assert line in printed


def test_bare_explain_is_of_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    assert capsys.readouterr().out.startswith("mam on mini of ")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "method=mam", "task=sst2", "budget=0.5%", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [m["prefix"] for m in found["modifications"]] == ["", "mix.attention."]
    assert found["parameters"][0]["numbers"] == "(2·16·768 + 16 + 768) × 12"
    assert sum(size["stored"] for size in found["parameters"]) == found["totals"]["stored"] == 599_232
    assert found["budget"] == "0.5%" and found["network"][0]["layers"] == list(range(12))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["method=lroa"], "method=lroa is unknown; did you mean lora?"),
        (["bottleneck=8,16"], "bottleneck=8,16 names several values"),
        (["3f2a91"], "3f2a91 is neither the folder of a run, nor the first digits of one below outputs, nor KEY=VALUE"),
        (["modified_representation.layers=[99]"], "modified_representation.layers: 99 is outside"),
        (["budget=1k"], "budget=1k: the smallest mam on mini stores 6,534 parameters"),
        (["model.path=null", "model.hub_id=some/model"], "How model.hub_id=some/model is built is not known"),
    ],
)
def test_what_is_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_a_run_is_explained_as_it_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["method=lora", "budget=1%"]
    (run,) = resolve_sizes([compose_run(words)])
    start_record(run, tmp_path / "run", words)
    assert main(["explain", str(tmp_path / "run"), "--json"]) == 0
    of_run = json.loads(capsys.readouterr().out)
    assert main(["explain", *words, "--json"]) == 0
    typed = json.loads(capsys.readouterr().out)
    for key in ("totals", "parameters", "modifications", "network"):
        assert of_run[key] == typed[key]
    assert main(["explain", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'run'}: interrupted, seed 42, doctopic\n")
    assert main(["explain", str(tmp_path / "run"), "seed=1"]) == 2
    assert "is a run, which is explained as it was trained" in capsys.readouterr().err
    assert main(["explain", str(tmp_path)]) == 2
    assert f"{tmp_path} has no run" in capsys.readouterr().err
