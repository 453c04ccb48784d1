"""What the paper's released code does otherwise, written out from its description, against fidelity=released_code.

The code is jxhe/unify-parameter-efficient-tuning at 3222ce2; the lines stand in docs/fidelity.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from peftbench.backbones.sites import Attention, find_sites
from peftbench.cli.main import main
from peftbench.config import schema
from peftbench.config.axes import find_steep_starts
from peftbench.config.compose import compose_run
from peftbench.config.fidelity import apply_fidelity
from peftbench.counts.run_counts import count_run
from peftbench.modification import state
from peftbench.modification.attach import attach
from peftbench.modification.dead_parameters import count_dead
from peftbench.modification.edit import Edit
from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.head_attention import HEADS, HeadModification
from peftbench.records.record import load_records
from peftbench.training.fit import checkpoint_gradients
from peftbench.utils.errors import UserError
from tests.families import PRESETS, batch, build, dropout, modification, shake
from tests.modification.test_head_attention import attention_calls, plain_attention

TASKS = {"bart": "xsum", "mbart": "xsum", "roberta": "sst2"}


def composed(*overrides: str) -> schema.Run:
    return compose_run(overrides)


def attached(
    family: str, overrides: str, *, fidelity: str = "released_code", shaken: bool = True
) -> tuple[PreTrainedModel, set[str]]:
    """A tiny model with a preset of conf/ as text or code have it, without dropout; and the deviations in force."""
    model = build(family, **dropout(family))
    run = composed(f"task={TASKS[family]}", "bottleneck=5", f"fidelity={fidelity}", *overrides.split())
    run, deviations = apply_fidelity(run, model.config.model_type)
    attach(model, schema.list_modifications(run), run.unfreeze, train_head=not run.fidelity.frozen_task_head)
    if shaken:
        shake(model)
    return model, {deviation.name for deviation in deviations}


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-5), times the norm's weight, plus its bias."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * norm.get_parameter("weight") + norm.get_parameter("bias")


def delta(f: Bottleneck, x: Tensor) -> Tensor:
    """relu(x W_down + b_down) W_up + b_up."""
    down, up = f.weights()
    assert f.down_bias is not None and f.up_bias is not None
    z = torch.relu(x @ down[0].T + f.down_bias[0, 0])
    return z @ up[0].T + f.up_bias[0, 0]


@torch.no_grad()
def first_attention(model: PreTrainedModel, family: str) -> tuple[Attention, Tensor, Tensor, Tensor]:
    """The first encoder layer's attention, its input x, W_o's input and W_o's output, with all that is hooked on."""
    attention = find_sites(model).layers[0].attentions[0]
    seen: dict[str, Tensor] = {}
    handles = [
        attention.query.register_forward_pre_hook(lambda module, args: seen.update(x=args[0])),
        attention.output.register_forward_pre_hook(lambda module, args: seen.update(joint=args[0])),
        attention.output.register_forward_hook(lambda module, args, output: seen.update(out=output)),
    ]
    model(**batch(family))
    for handle in handles:
        handle.remove()
    return attention, seen["x"], seen["joint"], seen["out"]


# ---- what no switch sets: other points of the axes ----


def test_a_norm_after_the_scale_is_the_norm_without_it() -> None:
    """Ours is h + s LN(Δh), the code's h + LN(sΔh) (petl_factory.py); add gives the code's, but for ε."""
    found = {}
    for name in ("scaled", "add"):
        model = build("bart")
        attach(model, {"": modification("relu", "ffn", composition=name, scale=4.0, layer_norm="output", bias=True)})
        shake(model)
        found[name] = next(module for module in model.modules() if isinstance(module, Edit))
    f = found["scaled"].function
    assert isinstance(f, Bottleneck) and isinstance(f.norm_out, nn.LayerNorm)
    h, x = torch.randn(2, 5, 7, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        change = delta(f, x)
        code = h + normed(4.0 * change, f.norm_out)
        assert (found["scaled"].modify(h, x) - (h + 4.0 * normed(change, f.norm_out))).abs().max() < 1e-5
        assert (found["add"].modify(h, x) - code).abs().max() < 1e-3  # ε counts 16 times as much there
        assert (found["scaled"].modify(h, x) - code).abs().max() > 0.1


def test_a_prefix_without_gating_behind_a_norm_of_its_own() -> None:
    """heads + softmax(LN(x) W_q P_k^T) P_v on BART, with the backbone's W_q and a trained LayerNorm."""
    normed_query = "modified_representation.head_input=normed_query prefix_mlp=null init=bert"
    model, _ = attached("bart", f"method=prefix_no_gating {normed_query}", fidelity="paper")
    _, x, plain, _ = first_attention(build("bart", **dropout("bart")), "bart")
    attention, _, heads, _ = first_attention(model, "bart")
    changed = attention.module.get_submodule(f"{HEADS}.modification")
    assert isinstance(changed, HeadModification) and changed.query_norm is not None
    f = changed.function
    assert isinstance(f, Bottleneck)
    keys, values = (weight.detach() for weight in f.weights())  # (N_h, l, d_h), (N_h, d_h, l)
    with torch.no_grad():
        weight, bias = attention.query.get_parameter("weight"), attention.query.get_parameter("bias")
        query = F.linear(normed(x, changed.query_norm), weight, bias).unflatten(-1, (4, 4)).transpose(1, 2)
        added = (query @ keys.transpose(1, 2)).softmax(-1) @ values.transpose(1, 2)
    assert (heads - plain - added.transpose(1, 2).flatten(-2)).abs().max() < 1e-5
    assert added.abs().max() > 0.1


def test_the_start_of_a_prefix_without_mlp() -> None:
    """P_v at 0, or with init=bert both P_k and P_v from N(0, 0.02), as the code's prefix_nomlp."""
    for more, spread in (("", 0.0), (" init=bert", 0.02)):
        model, _ = attached("bart", f"method=prefix prefix_mlp=null{more}", fidelity="paper", shaken=False)
        ours = [f.weights() for f in state.list_bottlenecks(model)]
        keys, values = (torch.cat([pair[side].detach().flatten() for pair in ours]) for side in (0, 1))
        assert abs(float(values.std()) - spread) <= 0.1 * spread
        if spread:
            assert abs(float(keys.std()) - spread) <= 0.1 * spread


def test_a_gated_prefix_without_mlp_does_not_begin_as_the_backbone() -> None:
    """All else whose W_up starts at 0 does."""
    plain = build("bart")(**batch("bart")).logits
    gated = modification("softmax", "heads", "parallel", "gated", 3)
    for m, begins_as_it in (
        (gated, False),
        *((PRESETS[name][""], True) for name in ("lora", "scaled_parallel_adapter")),
    ):
        model = build("bart")
        attach(model, {"": m})
        assert torch.equal(model.eval()(**batch("bart")).logits, plain) == begins_as_it


def test_a_norm_of_nothing_makes_the_first_gradients_steep() -> None:
    """W_up = 0 before a LayerNorm: 1/√ε times the gradient, of which a note warns; from N(0, 0.02) there is none."""
    steepest = {}
    for place in ("none", "output"):
        model = build("bart")
        attach(model, {"": modification("relu", "ffn", layer_norm=place)})
        model(**batch("bart")).loss.backward()
        steepest[place] = max(float(f.up.grad.norm()) for f in state.list_bottlenecks(model) if f.up is not None)
    assert 100 < steepest["output"] / steepest["none"] < 1000
    (note,) = find_steep_starts("mix.ffn.", modification("relu", "ffn", layer_norm="output"))
    assert note.startswith("mix.ffn.layer_norm=output with mix.ffn.init=lora: Δh starts at 0")
    for m in (modification("relu", "ffn", layer_norm="output", init="bert"), modification("relu", "ffn")):
        assert not list(find_steep_starts("", m))


@pytest.mark.slow
def test_a_run_with_steep_first_gradients_says_so(tmp_path: Path) -> None:
    words = ["method=parallel_adapter", "layer_norm=output", "init=lora", "debug=smoke", f"output_dir={tmp_path}"]
    assert main(["train", *words, "trainer.max_steps=1"]) == 0
    (record,) = load_records(tmp_path)[0]
    assert any("layer_norm=output with init=lora: Δh starts at 0" in note for note in record.notes)


# ---- adapters at the attention ----


@pytest.mark.parametrize("family", TASKS)
def test_parallel_attention_adapter_stands_before_the_output_projection(family: str) -> None:
    """W_o(heads + ReLU(LN(x) W_down) W_up), x the attention's input (modeling_bart.py 300-301, 369-374)."""
    model, deviations = attached(family, "method=parallel_adapter_attention")
    assert {"attention_adapter_before_output", "attention_adapter_norm"} <= deviations
    _, x, heads, _ = first_attention(build(family, **dropout(family)), family)
    attention, _, _, out = first_attention(model, family)
    f = attention.output.get_submodule("modification.function")
    assert isinstance(f, Bottleneck) and isinstance(f.norm_in, nn.LayerNorm)
    weight, bias = attention.output.get_parameter("weight"), attention.output.get_parameter("bias")
    change = delta(f, normed(x, f.norm_in))
    assert (out - F.linear(heads + change, weight, bias)).abs().max() < 1e-5
    assert (out - F.linear(heads, weight, bias) - change).abs().max() > 0.1  # the text's place is another one


@pytest.mark.parametrize("family", TASKS)
def test_parallel_attention_adapter_of_the_text(family: str) -> None:
    """W_o(heads) + ReLU(x W_down) W_up, without a norm (table 1)."""
    model, deviations = attached(family, "method=parallel_adapter_attention", fidelity="paper")
    assert deviations == set()
    _, x, heads, _ = first_attention(build(family, **dropout(family)), family)
    attention, _, _, out = first_attention(model, family)
    f = attention.output.get_submodule("modification.function")
    assert isinstance(f, Bottleneck)
    h = F.linear(heads, attention.output.get_parameter("weight"), attention.output.get_parameter("bias"))
    assert (out - h - delta(f, x)).abs().max() < 1e-5


@pytest.mark.parametrize("family", TASKS)
def test_sequential_attention_adapter_has_a_norm_and_the_ffns_has_none(family: str) -> None:
    """h + ReLU(LN(h) W_down) W_up, h = W_o(heads) (modeling_bart.py 374-378); Houlsby's has both places."""
    model, deviations = attached(family, "method=adapter")
    assert deviations - {"frozen_task_head"} == {"attention_adapter_norm"}
    _, _, heads, _ = first_attention(build(family, **dropout(family)), family)
    attention, _, _, out = first_attention(model, family)
    f = attention.output.get_submodule("modification.function")
    assert isinstance(f, Bottleneck) and isinstance(f.norm_in, nn.LayerNorm)
    h = F.linear(heads, attention.output.get_parameter("weight"), attention.output.get_parameter("bias"))
    assert (out - h - delta(f, normed(h, f.norm_in))).abs().max() < 1e-5
    at_ffn = [m for name, m in model.named_modules() if name.endswith("modification_ffn.function")]
    assert len(at_ffn) == len(find_sites(model).layers)
    assert not any(isinstance(m.norm_in, nn.LayerNorm) for m in at_ffn)


def test_attention_adapters_begin_as_bert_and_ffn_adapters_as_they_are_set() -> None:
    """N(0, 0.02) at the attention also where a scaled adapter begins with W_up = 0; at the FFN nothing is changed."""
    attention = "method=scaled_parallel_adapter modified_representation=attention"
    model, deviations = attached("bart", attention, shaken=False)
    assert "attention_adapter_bert_init" in deviations
    drawn = torch.cat([f.up.flatten() for f in state.list_bottlenecks(model) if f.up is not None])
    assert 0.018 < float(drawn.detach().std()) < 0.022
    for overrides, fidelity in ((attention, "paper"), ("method=scaled_parallel_adapter", "released_code")):
        model, deviations = attached("bart", overrides, fidelity=fidelity, shaken=False)
        assert deviations == set()
        assert not any(f.up.any() for f in state.list_bottlenecks(model) if f.up is not None)


# ---- the multi-head parallel adapter ----


def made_by_mlp(model: PreTrainedModel, attention: nn.Module) -> tuple[Tensor, Tensor]:
    """P_k and P_v of one attention, (l, d) each: W_i tanh(W E + b) + b_i (petl_factory.py 45-136)."""
    generator = attention.get_submodule(f"{HEADS}.modification.function.generator")
    trunk = generator.get_submodule("trunk")
    inner = trunk.get_parameter("embedding") @ trunk.get_parameter("linear.weight").T
    hidden = torch.tanh(inner + trunk.get_parameter("linear.bias"))
    made = hidden @ generator.get_parameter("linear.weight").T + generator.get_parameter("linear.bias")
    assert made.shape[-1] == 2 * model.config.hidden_size
    return made[:, : model.config.hidden_size], made[:, model.config.hidden_size :]


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_multi_head_parallel_adapter_of_the_code(family: str) -> None:
    """Each head's ReLU(q P_k^T) P_v beside its attention, P from the prefix's MLP.

    mBART: q the head's scaled query (modeling_mbart.py 279-283). BART: q = LN(x) W_q, not scaled (modeling_bart.py
    271-274).
    """
    model, deviations = attached(family, "method=mh_parallel_adapter", shaken=False)
    own = {"bart": "head_adapter_normed_query", "mbart": "dead_parameters"}[family]
    assert deviations == {"head_adapter_from_mlp", own}
    shake(model, 0.1)
    inputs: dict[nn.Module, Tensor] = {}
    attentions = [attention for layer in find_sites(model).layers for attention in layer.attentions]
    for attention in attentions:
        attention.query.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0]))
    calls = {call["module"]: call for call in attention_calls(model, batch(family))}
    assert len(calls) == len(attentions) == 6
    for attention in attentions:
        call, keys_values = calls[attention.module], made_by_mlp(model, attention.module)
        assert keys_values[0].shape == (5, 16)
        context, _ = plain_attention(call["q"], call["k"], call["v"], call["mask"], call["scaling"])
        norm = attention.module.get_submodule(f"{HEADS}.modification").query_norm
        weight, bias = attention.query.get_parameter("weight"), attention.query.get_parameter("bias")
        x = inputs[attention.query]
        if family == "bart":
            assert isinstance(norm, nn.LayerNorm)
            q = F.linear(normed(x, norm), weight, bias)
        else:
            assert norm is None
            q = F.linear(x, weight, bias) / 4**0.5  # heads of width 4
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            change = torch.relu(q[..., part] @ keys_values[0][:, part].T) @ keys_values[1][:, part]
            assert (call["out"][:, :, head] - context[:, head] - change).abs().max() < 1e-4
            assert change.abs().max() > 0.01


def test_the_code_reuses_the_backbones_query_weights() -> None:
    """LoRA at the query beside it is another modification: what the adapter reads stays LN(x) W_q, in any precision."""
    model = build("bart")
    more = {"mix.query.": modification("identity", "query", "parallel", "scaled", scale=2.0)}
    attach(model, PRESETS["mh_parallel_adapter_normed_query"] | more)
    shake(model)
    attention = find_sites(model).layers[0].attentions[0]
    adapter = attention.module.get_submodule(f"{HEADS}.modification")
    assert isinstance(adapter, HeadModification) and isinstance(adapter.query_norm, nn.LayerNorm)
    weight, bias = attention.query.get_parameter("weight"), attention.query.get_parameter("bias")
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3))
    expected = F.linear(normed(x, adapter.query_norm), weight, bias)
    assert (attention.query(x) - F.linear(x, weight, bias)).abs().max() > 0.1
    assert adapter._x is not None and adapter._x.shape == (2, 4, 7, 4)
    assert (adapter._x.transpose(1, 2).flatten(2) - expected).abs().max() < 1e-5


# ---- the FFN adapter of mBART ----


@pytest.mark.parametrize("overrides", ["method=scaled_parallel_adapter", "method=adapter insertion_form=parallel"])
@pytest.mark.parametrize("fidelity", ["paper", "released_code"])
def test_what_the_parallel_ffn_adapter_of_mbart_reads(fidelity: str, overrides: str) -> None:
    """x = r + FFN(LN(r)) + s ReLU(· W_down) W_up with · = LN(r) in the text and r in the code (modeling_mbart.py
    456-462, 628-633), in every layer of both stacks."""
    model, deviations = attached("mbart", overrides, fidelity=fidelity)
    assert ("mbart_ffn_adapter_reads_residual" in deviations) is (fidelity == "released_code")
    seen: dict[str, Tensor] = {}
    layers = find_sites(model).layers
    for layer in layers:
        assert layer.residual is not None
        layer.residual.register_forward_pre_hook(lambda module, args, n=layer.name: seen.update({f"{n} r": args[0]}))
        layer.module.register_forward_hook(
            lambda module, args, out, n=layer.name: seen.update({n: out if isinstance(out, Tensor) else out[0]})
        )
    with torch.no_grad():
        model(**batch("mbart"))
    scale = 4.0 if "scaled" in overrides else 1.0
    for layer in layers:
        r = seen[f"{layer.name} r"]
        assert layer.residual is not None
        (first,) = layer.ffn.first.values()
        x = normed(r, layer.residual)
        ffn = F.gelu(F.linear(x, first.get_parameter("weight"), first.get_parameter("bias")))
        ffn = F.linear(ffn, layer.ffn.second.get_parameter("weight"), layer.ffn.second.get_parameter("bias"))
        (f,) = (m for m in layer.ffn.second.modules() if isinstance(m, Bottleneck))
        read, other = (r, x) if fidelity == "released_code" else (x, r)
        assert (seen[layer.name] - r - ffn - scale * delta(f, read)).abs().max() < 1e-4
        assert (seen[layer.name] - r - ffn - scale * delta(f, other)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["bart", "roberta"])
def test_behind_a_norm_there_is_no_other_residual_to_read(family: str) -> None:
    with pytest.raises(UserError, match="ffn_input=residual: in this backbone each norm comes after its sub-layer"):
        attach(build(family), {"": modification("relu", "ffn", ffn_input="residual")})


@pytest.mark.parametrize("family", ["mbart", "t5", "llama"])
def test_reading_the_residual_trains(family: str) -> None:
    """In every family with norms before its sub-layers, and the same where layers are computed twice."""
    model = build(family)
    attach(model, {"": modification("relu", "attention_ffn", ffn_input="residual", bias=True)})
    shake(model)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_gradients(model)
        model.train()
        model.zero_grad()
        torch.manual_seed(4)
        model(**batch(family)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "modification" in name})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any(), name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6 * max(1.0, float(gradient.abs().max()))), name


def test_generation_of_mbart_as_in_the_code_is_the_same_with_and_without_cache() -> None:
    model, _ = attached("mbart", "method=pa_attention_pa_ffn")
    inputs = {name: tensor for name, tensor in batch("mbart").items() if name != "labels"}
    options = {"num_beams": 4, "min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


# ---- the task head ----

ROBERTA_HEAD = {f"classifier.{part}.{tensor}" for part in ("dense", "out_proj") for tensor in ("weight", "bias")}


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("lora", set()),
        ("mam", set()),
        ("bitfit", {"classifier.dense.bias", "classifier.out_proj.bias"}),
        ("full", ROBERTA_HEAD),
    ],
)
def test_the_frozen_task_head(method: str, trained: set[str]) -> None:
    """What has neither `ef_` (for BitFit: bias) in its name is frozen, the head too (petl_enc_model.py 42-69)."""
    overrides = f"method={method}" if method in ("lora", "mam") else f"method={method} bottleneck=null"
    model, deviations = attached("roberta", overrides, shaken=False)
    assert ("frozen_task_head" in deviations) is (method != "full")
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    assert named & ROBERTA_HEAD == trained
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in ROBERTA_HEAD}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    model(**batch("roberta")).loss.backward()
    optimiser.step()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, model.get_parameter(name))}
    assert moved == trained


def test_a_frozen_head_is_kept_in_the_checkpoint(tmp_path: Path) -> None:
    """It was drawn at random and stands nowhere else; a file without it is refused."""
    model, _ = attached("roberta", "method=lora")
    other = build("roberta", seed=5)  # another head, and the backbone of the first
    own = {name: p for name, p in model.state_dict().items() if not name.startswith("classifier")}
    other.load_state_dict(own, strict=False)
    attach(other, {"": modification("identity", "query_value", "parallel", "scaled", 5, scale=2.0)}, train_head=False)
    state.save(model, tmp_path, ROBERTA_HEAD)
    with pytest.raises(UserError, match="4 tensors are only in the file or only in the model"):
        state.load(other, tmp_path)
    state.load(other, tmp_path, ROBERTA_HEAD)
    with torch.no_grad():
        assert torch.equal(other.eval()(**batch("roberta")).logits, model.eval()(**batch("roberta")).logits)


# ---- numbers ----

SET = 15_391_520  # one set of prefixes with its MLP: l = 16, d = 768, 12 layers
FFN = 25_360  # an adapter: r = 16, d = 768
NORMS = 36 * 2 * 1024

NUMBERS = [  # overrides: trained, stored, dead, of the head
    ("task=sst2 method=mam", SET + 12 * FFN, 599_232, 2 * SET + 12 * FFN, 0),
    ("task=sst2 method=prefix bottleneck=16", SET, 294_912, 2 * SET, 0),
    ("task=sst2 method=parallel_adapter bottleneck=16", 12 * FFN, 12 * FFN, 12 * FFN, 0),
    ("task=sst2 method=adapter insertion_form=parallel", 24 * FFN + 12 * 2 * 768, 627_072, 12 * FFN, 0),
    ("task=sst2 method=adapter", 24 * FFN + 12 * 2 * 768, 627_072, 0, 0),
    ("task=sst2 method=lora", 589_824, 589_824, 0, 0),
    ("task=sst2 method=bitfit", 102_144, 102_144, 0, 768 + 2),
    ("task=sst2 method=full", 124_055_040, 124_055_040, 0, 592_130),
    ("task=xsum method=adapter", 24_723_168, 24_723_168, 0, 0),
    ("task=xsum method=parallel_adapter_attention", 14_789_664 + NORMS, 14_789_664 + NORMS, 0, 0),
    ("task=xsum method=mh_parallel_adapter", 62_130_528 + NORMS, 14_745_600 + NORMS, 0, 0),
    ("task=xsum model=mbart_large method=mh_parallel_adapter", 62_130_528, 14_745_600, NORMS, 0),
    ("task=xsum model=mbart_large method=mam", 86_810_976, 27_414_528, 0, 0),
]


@pytest.mark.parametrize(("overrides", "trained", "stored", "dead", "head"), NUMBERS, ids=[n[0] for n in NUMBERS])
def test_counts_as_in_the_code(overrides: str, trained: int, stored: int, dead: int, head: int) -> None:
    counted = count_run(composed(*overrides.split(), "fidelity=released_code"))
    totals = counted.totals
    assert (totals.trained, totals.stored, counted.dead, totals.head) == (trained, stored, dead, head)
    assert sum(group.trained for group in counted.groups) == trained


def test_the_number_of_issue_15() -> None:
    """What a user of the code reports for MAM on RoBERTa-base, and for the same without the two unused prefix sets."""
    counted = count_run(composed("task=sst2", "method=mam", "fidelity=released_code"))
    assert counted.totals.trained + counted.totals.head + counted.dead == 46_783_200 == 3 * SET + 24 * FFN
    assert counted.totals.trained + counted.dead - 2 * SET == 16_000_160


def test_dead_parameters_of_the_layers_that_are_modified() -> None:
    """Those of the chosen layers and of each modification, not of what stands beside them."""
    modifications = {
        "": modification("relu", "attention_ffn", "parallel", bottleneck=5, layers=[1]),
        "mix.prefix.": modification("softmax", "heads", "parallel", "gated", 3, layers=[0]),
        "mix.lora.": modification("identity", "ffn", "parallel", bottleneck=7),
    }
    model = build("roberta")
    attach(model, modifications)
    assert count_dead(model, modifications) == 2 * 5 * 16 + 2 * (2 * 3 * 16)
    other = build("bert")  # not a model of the released code
    attach(other, modifications)
    assert count_dead(other, modifications) == 0
