"""The contract of a family that is a row of modules: places, order, gradients, counts, saving, merging, generation.

Each is compared with something that does not read the row: the family's own class, its attention function's arguments,
or its layers written out by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from peftbench.backbones.sites import find_sites, has_plain_logits
from peftbench.config import schema
from peftbench.counts.run_counts import count_run
from peftbench.evaluation.inference import prepare_inference
from peftbench.evaluation.kv_cache import make_caches
from peftbench.modification.attach import attach
from peftbench.modification.counting import count
from peftbench.modification.edit import Edit
from peftbench.modification.functional_form import Bottleneck, Constant
from peftbench.modification.head_attention import ATTENTION_NAME, attend_modified
from peftbench.modification.merge import find_obstacles, merge
from peftbench.modification.prompt import DecoderPrompt
from peftbench.modification.state import fold, load, save
from peftbench.training.arithmetic import count_operations
from peftbench.training.batching import Lengths
from peftbench.training.padding_free import PaddingFree, add_lengths, find_refusal
from peftbench.training.token_loss import TokenLoss, find_output_layer
from peftbench.utils.errors import UserError
from tests.families import (
    PLACES,
    PRESETS,
    ROW_CONTINUING,
    ROW_WRITING,
    ROWS,
    VOCABULARY,
    WITHOUT_CLASSIFIER,
    batch,
    build,
    inputs,
    modification,
    run_on,
    shake,
)

# Laid out as a family of the full matrix, with attentions that work alike: all presets but one are slow.
KNOWN = {"xlm_roberta", "camembert", "mt5", "gemma", "olmo", "smollm3"}
QUICK = {"lora", "mam"}  # a preset for each of the projections, and of heads and FFNs
PARALLEL = ("cohere", "cohere2", "stablelm_parallel", "gptj")

NO_PROMPT = ("roberta_prelayernorm", "albert", "eurobert", "marian", "pegasus", "gemma3", "opt", "opt_post_norm")
REFUSED: dict[tuple[str, str], str] = {(family, "prompt"): "names no embedding to lengthen" for family in NO_PROMPT}
REFUSED |= {(family, "pfeiffer"): "to one residual at once" for family in PARALLEL}
REFUSED |= {("granite", "pfeiffer"): r"residual_multiplier=0\.4"}


def mark(family: str, preset: str) -> Any:
    """A case; it is slow if the quick ones already have its places."""
    quick = preset == "mam" or (preset in QUICK and family not in KNOWN)
    return pytest.param(family, preset, id=f"{family}-{preset}", marks=[] if quick else [pytest.mark.slow])


# A preset for each kind of place: a row of modules says where those are, and what is computed there is tested on the
# families of the full matrix (tests/modification/test_behaviours.py).
CASES = [mark(family, preset) for family in ROWS for preset in PLACES if (family, preset) not in REFUSED]
every_case = pytest.mark.parametrize(("family", "preset"), CASES)
every_family = pytest.mark.parametrize("family", ROWS)


def attached(family: str, preset: str, **more: Any) -> PreTrainedModel:
    """The family's tiny model, in evaluation mode, with modifications whose weights are random."""
    model = build(family, **more)
    attach(model, PRESETS[preset])
    shake(model)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    found: Tensor = model(**batch(family)).logits
    return found


@torch.no_grad()
def near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(("family", "preset"), REFUSED)
def test_what_a_family_cannot_do_is_refused_in_a_sentence(family: str, preset: str) -> None:
    with pytest.raises(UserError, match=REFUSED[family, preset]) as caught:
        attach(build(family), PRESETS[preset])
    assert "\n" not in str(caught.value)


@every_case
def test_two_steps_train_every_tensor_and_nothing_else(family: str, preset: str) -> None:
    model = attached(family, preset)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch(family)).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


@every_case
def test_saved_and_loaded_and_in_inference_it_predicts_the_same(family: str, preset: str, tmp_path: Path) -> None:
    model = attached(family, preset)
    expected = logits(model, family)
    assert not near(expected, logits(build(family), family))
    fold(model)
    save(model, tmp_path)
    again = build(family)
    attach(again, PRESETS[preset])
    fold(again)
    load(again, tmp_path)
    assert near(logits(again, family), expected)
    with prepare_inference(again):
        assert near(logits(again, family), expected)


@every_case
def test_groups_of_a_run_sum_to_the_counts_of_the_model(family: str, preset: str, tmp_path: Path) -> None:
    """Counted without weights, group by group, as `params` prints them."""
    found = count_run(run_on(family, tmp_path, PRESETS[preset]))
    expected = count(attached(family, preset))
    for name in ("trained", "stored", "paper"):
        assert sum(getattr(group, name) for group in found.groups) == getattr(found.totals, name)
        assert getattr(found.totals, name) == getattr(expected, name)


@pytest.mark.slow
@every_case
def test_padding_changes_nothing(family: str, preset: str) -> None:
    model = attached(family, preset)
    both = batch(family, (9, 6))
    alone = {name: both[name][1:, :6] for name in ("input_ids", "attention_mask")}
    if family in ROW_WRITING:
        alone["labels"] = both["labels"][1:]
    with torch.no_grad():
        padded, single = model(**both).logits[1], model(**alone).logits[0]
    assert near(padded[: len(single)], single)


# Places


def capture_attention(model: PreTrainedModel, family: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the attention function is called with, and what it returns, call by call."""
    seen: list[Any] = []

    def keep(module: nn.Module, *given: Any, **more: Any) -> Any:
        heads = attend_modified(module, *given, **more)
        seen.append((module, given, more, heads[0]))
        return heads

    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION_NAME, keep)
    logits(model, family)
    return seen


@every_family
def test_an_edit_of_a_projection_reaches_that_argument_of_the_attention_function(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values are told apart by the class, which passes them on: one changes, the others do not."""
    zero = {"mix.own.": modification("relu", "heads", "parallel", "add", init="lora")}  # selects our attention function
    plain = build(family)
    attach(plain, zero)
    before = capture_attention(plain, family, monkeypatch)
    for index, part in enumerate(("query", "key", "value")):
        model = build(family)
        attach(model, {"": modification("relu", part, "parallel", "add", bias=True, init="bert"), **zero})
        for name, parameter in model.named_parameters():
            if "own" not in name and parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        after = capture_attention(model, family, monkeypatch)
        for other in range(3):
            same = torch.equal(before[0][1][other], after[0][1][other])
            assert same is (other != index), (part, other)
        attention = find_sites(model).layers[0].attentions[0]
        heads = attention.heads if part == "query" else attention.kv_heads
        assert after[0][1][index].shape[1::2] == (heads, attention.head_width)


@every_family
def test_every_layer_and_attention_of_the_model_is_a_place(family: str) -> None:
    """The modules that `attach` finds, against those that have their name in the class."""
    model = build(family)
    sites = find_sites(model)
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "scaling")]
    attentions = attentions or [m for m in model.modules() if type(m).__name__.endswith("SelfAttention")]
    assert {a.module for layer in sites.layers for a in layer.attentions} == set(attentions)
    layers = {id(layer.module) for layer in sites.layers}
    assert len(layers) == len(sites.layers)
    places = [m for layer in sites.layers for m in (*layer.ffn.first.values(), layer.ffn.second)]
    places += [m for layer in sites.layers for a in layer.attentions for m in (a.query, a.key, a.value, a.output)]
    assert len(set(places)) == len(places)
    inside = [m for layer in sites.layers for m in layer.module.modules() if isinstance(m, nn.Linear)]
    assert set(places) == set(inside)  # no matrix of a layer is left out


@every_family
def test_our_attention_function_computes_the_familys_own(family: str) -> None:
    """Heads with a Δ of zero: windows, scales, biases of positions and masks are those of the class's own attention."""
    model, plain = build(family), build(family)
    attach(model, {"": modification("relu", "heads", "parallel", "add", init="lora")})
    plain.set_attn_implementation("eager")
    assert near(logits(model, family), logits(plain, family), 1e-5)


@every_family
def test_a_prefix_is_equation_5(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax over the prefix's keys and those of the text, with the class's own scale, mask and bias of positions."""
    model = build(family)
    attach(model, {"": modification("softmax", "heads", "parallel", "gated", 3, init="bert")})
    shake(model)
    for module, (q, k, v, mask), more, heads in capture_attention(model, family, monkeypatch):
        (prefix,) = module.head_modifications.values()
        p_k, p_v = prefix.vectors(torch.float32)
        groups, rows = q.shape[1] // k.shape[1], len(q)
        keys = torch.cat([p_k.expand(rows, -1, -1, -1), k], 2).repeat_interleave(groups, 1)
        values = torch.cat([p_v.expand(rows, -1, -1, -1), v], 2).repeat_interleave(groups, 1)
        scaling = 1.0 if family.startswith("opt") else module.scaling  # OPT's queries come scaled
        scores = torch.einsum("bnqd,bnkd->bnqk", q, keys) * scaling
        if more.get("position_bias") is not None:
            scores[..., 3:] += more["position_bias"]
        if mask is not None:
            hidden = ~mask if mask.dtype is torch.bool else mask < -1
            scores[..., 3:] = scores[..., 3:].masked_fill(hidden, -torch.inf)
        assert near(heads, (scores.softmax(-1) @ values).transpose(1, 2))


# Order: one layer in training, against the same layer written out. It begins at each attention's joint heads, which are
# taken from the class with the state of torch's random numbers there; all after them is computed here.

HIDDEN, ATTENTION, ACTIVATION = 0.3, 0.2, 0.1  # dropout rates, so that none can stand for another
_BERT_RATES = {"hidden_dropout_prob": HIDDEN, "attention_probs_dropout_prob": ATTENTION}
_OPT_RATES = {"dropout": HIDDEN, "attention_dropout": ATTENTION}
_STABLELM_RATES = {"hidden_dropout": HIDDEN, "attention_dropout": ATTENTION}
_BART_RATES = {"dropout": HIDDEN, "attention_dropout": ATTENTION, "activation_dropout": ACTIVATION}
RATES: dict[str, dict[str, float]] = {
    **dict.fromkeys(("xlm_roberta", "camembert", "roberta_prelayernorm", "albert"), _BERT_RATES),
    **{family: {"dropout_rate": HIDDEN} for family in ("mt5", "umt5")},
    **dict.fromkeys(("marian", "pegasus"), _BART_RATES),
    **dict.fromkeys(("opt", "opt_post_norm"), _OPT_RATES),
    **dict.fromkeys(("stablelm", "stablelm_parallel"), _STABLELM_RATES),
    "starcoder2": {"residual_dropout": HIDDEN, "attention_dropout": ATTENTION},
    "gptj": {"resid_pdrop": HIDDEN, "attn_pdrop": ATTENTION},
}
DRAWS_NONE = ("eurobert", "gemma", "gemma3", "smollm3", "granite", "olmo", "olmo2", "cohere", "cohere2")

METHODS: dict[str, schema.Modification] = {
    "nothing": modification("constant", "value", "sequential", "multiply"),
    "ffn_parallel": modification("relu", "ffn", "parallel", "scaled", scale=4.0, bias=True),
    "ffn_residual": modification("relu", "ffn", "parallel", "add", ffn_input="residual"),
    "attention_parallel": modification("relu", "attention", "parallel", "add", bias=True),
    "houlsby": modification("relu", "attention_ffn", "sequential", "add", bias=True),
    "pfeiffer": modification("relu", "layer", "sequential", "add", bias=True),
    "weights": modification("identity", "ffn_weights", "parallel", "scaled", scale=4.0, dropout=0.0),
    "ia3": modification("constant", "ffn_intermediate", "sequential", "multiply"),
}
POST_NORM = ("xlm_roberta", "camembert", "albert", "marian", "opt_post_norm")


@dataclass
class Recorded:
    """What a pass of one layer left: its input and output, and joint heads with the random state, by W_o's path."""

    joint: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    x: Tensor | None = None
    out: Tensor | None = None


class Naive:
    """The functions of one layer, from its own weights, with its edits by place: attention, ffn, layer, intermediate,
    or the path of a weight."""

    def __init__(self, layer: nn.Module, recorded: Recorded, edits: dict[str, Edit], hidden: float, own: float) -> None:
        self.layer, self.recorded, self.edits, self.hidden, self.own = layer, recorded, edits, hidden, own

    def linear(self, x: Tensor, path: str) -> Tensor:
        module = self.layer.get_submodule(path)
        return self.changed(path, F.linear(x, module.weight, module.bias), x)

    def norm(self, x: Tensor, path: str) -> Tensor:
        found: Tensor = self.layer.get_submodule(path).forward(x)  # without its hooks
        return found

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.hidden)

    def attend(self, path: str, x: Tensor) -> Tensor:
        """W_o of the joint heads, and Δh of x or of h."""
        joint, state = self.recorded.joint[path]
        torch.set_rng_state(state)
        return self.changed("attention", self.linear(joint, path), x, rate=self.own)

    def act(self, x: Tensor, path: str) -> Tensor:
        found: Tensor = self.layer.get_submodule(path)(x)
        return found

    def ffn(self, h: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """h + Δh; `residual` is what the released code's parallel form reads in place of x."""
        edit = self.edits.get("ffn")
        reads_residual = edit is not None and getattr(edit, "reads_residual", False)
        return self.changed("ffn", h, residual if reads_residual and residual is not None else x, rate=self.hidden)

    def inner(self, z: Tensor) -> Tensor:
        return self.changed("intermediate", z, z)

    def swiglu(self, x: Tensor, act: str = "mlp.act_fn") -> Tensor:
        z = self.act(self.linear(x, "mlp.gate_proj"), act) * self.linear(x, "mlp.up_proj")
        return self.linear(self.inner(z), "mlp.down_proj")

    def end(self, x: Tensor, h: Tensor) -> Tensor:
        """x + h, which Pfeiffer's f reads."""
        return x + self.changed("layer", h, x + h, reads=x + h, rate=self.hidden)

    def after(self, out: Tensor) -> Tensor:
        """Pfeiffer's place after a norm."""
        return self.changed("layer", out, out, rate=self.hidden)

    def changed(self, place: str, h: Tensor, x: Tensor, reads: Tensor | None = None, rate: float = 0.0) -> Tensor:
        if place not in self.edits:
            return h
        edit = self.edits[place]
        f = edit.function
        if isinstance(f, Constant):
            return h * (1 + f.vector[0, 0])
        assert isinstance(f, Bottleneck) and f.down is not None and f.up is not None
        sequential = edit.insertion.__name__ == "sequential"
        seen = reads if reads is not None else (h if sequential else x)
        z = F.linear(seen, f.down[0], None if f.down_bias is None else f.down_bias[0, 0])
        z = z if isinstance(f.f, nn.Identity) else F.dropout(torch.relu(z), rate)
        scale = getattr(edit.composition, "scale", 1.0)
        return h + F.linear(z, f.up[0], None if f.up_bias is None else f.up_bias[0, 0]) * scale


def bert(n: Naive, x: Tensor) -> Tensor:
    x = n.norm(n.drop(n.attend("attention.output.dense", x)) + x, "attention.output.LayerNorm")
    h = n.linear(n.inner(F.gelu(n.linear(x, "intermediate.dense"))), "output.dense")
    return n.after(n.norm(n.ffn(n.drop(h), x) + x, "output.LayerNorm"))


def roberta_prelayernorm(n: Naive, x: Tensor) -> Tensor:
    x = x + n.drop(n.attend("attention.output.dense", n.norm(x, "attention.LayerNorm")))
    y = n.norm(x, "intermediate.LayerNorm")
    h = n.linear(n.inner(F.gelu(n.linear(y, "intermediate.dense"))), "output.dense")
    return n.end(x, n.ffn(n.drop(h), y, x))


def albert(n: Naive, x: Tensor) -> Tensor:
    """No dropout after the FFN."""
    one = "albert_layers.0"
    x = n.norm(x + n.drop(n.attend(f"{one}.attention.dense", x)), f"{one}.attention.LayerNorm")
    h = n.linear(n.inner(n.act(n.linear(x, f"{one}.ffn"), f"{one}.activation")), f"{one}.ffn_output")
    return n.after(n.norm(n.ffn(h, x) + x, f"{one}.full_layer_layer_norm"))


def t5(n: Naive, x: Tensor) -> Tensor:
    x = x + n.drop(n.attend("layer.0.SelfAttention.o", n.norm(x, "layer.0.layer_norm")))
    last = len(n.layer.layer) - 1
    if last == 2:
        x = x + n.drop(n.attend("layer.1.EncDecAttention.o", n.norm(x, "layer.1.layer_norm")))
    y, ffn = n.norm(x, f"layer.{last}.layer_norm"), f"layer.{last}.DenseReluDense"
    z = F.gelu(n.linear(y, f"{ffn}.wi_0"), approximate="tanh") * n.linear(y, f"{ffn}.wi_1")
    return n.end(x, n.ffn(n.drop(n.linear(n.inner(n.drop(z)), f"{ffn}.wo")), y, x))


def bart_like(n: Naive, x: Tensor, pre: bool, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Marian (norms after the sub-layers), Pegasus (before them), and OPT, which has both kinds."""
    for name in ("self_attn", "encoder_attn"):
        if hasattr(n.layer, name):
            y = n.norm(x, f"{name}_layer_norm") if pre else x
            x = x + n.drop(n.attend(f"{name}.out_proj", y))
            x = x if pre else n.norm(x, f"{name}_layer_norm")
    y = n.norm(x, "final_layer_norm") if pre else x
    z = F.dropout(act(n.linear(y, "fc1")), getattr(n.layer, "activation_dropout", 0.0))
    h = n.ffn(n.drop(n.linear(n.inner(z), "fc2")), y, x)
    return n.end(x, h) if pre else n.after(n.norm(x + h, "final_layer_norm"))


def llama(n: Naive, x: Tensor) -> Tensor:
    """Granite multiplies both sub-layers' outputs, with their Δh, by 0.4."""
    by = getattr(n.layer, "residual_multiplier", 1.0)
    x = x + by * n.attend("self_attn.o_proj", n.norm(x, "input_layernorm"))
    y = n.norm(x, "post_attention_layernorm")
    return n.end(x, by * n.ffn(n.swiglu(y), y, x))


def stablelm(n: Naive, x: Tensor) -> Tensor:
    x = x + n.attend("self_attn.o_proj", n.norm(x, "input_layernorm"))
    y = n.norm(x, "post_attention_layernorm")
    return n.end(x, n.ffn(n.drop(n.swiglu(y)), y, x))


def gemma3(n: Naive, x: Tensor) -> Tensor:
    """Each sub-layer's output is normed with its Δh, and then added to the residual."""
    h = n.attend("self_attn.o_proj", n.norm(x, "input_layernorm"))
    x = x + n.norm(h, "post_attention_layernorm")
    y = n.norm(x, "pre_feedforward_layernorm")
    return n.end(x, n.norm(n.ffn(n.swiglu(y), y, x), "post_feedforward_layernorm"))


def olmo2(n: Naive, x: Tensor) -> Tensor:
    """The sub-layers read the residual itself."""
    x = x + n.norm(n.attend("self_attn.o_proj", x), "post_attention_layernorm")
    return n.end(x, n.norm(n.ffn(n.swiglu(x), x, x), "post_feedforward_layernorm"))


def cohere(n: Naive, x: Tensor) -> Tensor:
    y = n.norm(x, "input_layernorm")
    return x + n.attend("self_attn.o_proj", y) + n.ffn(n.swiglu(y), y, x)


def stablelm_parallel(n: Naive, x: Tensor) -> Tensor:
    y = n.norm(x, "input_layernorm")
    return x + n.attend("self_attn.o_proj", y) + n.ffn(n.drop(n.swiglu(y)), y, x)


def gptj(n: Naive, x: Tensor) -> Tensor:
    y = n.norm(x, "ln_1")
    a = n.drop(n.attend("attn.out_proj", y))
    h = n.linear(n.inner(n.act(n.linear(y, "mlp.fc_in"), "mlp.act")), "mlp.fc_out")
    return x + a + n.ffn(n.drop(h), y, x)


def starcoder2(n: Naive, x: Tensor) -> Tensor:
    x = x + n.drop(n.attend("self_attn.o_proj", n.norm(x, "input_layernorm")))
    y = n.norm(x, "post_attention_layernorm")
    h = n.linear(n.inner(n.act(n.linear(y, "mlp.c_fc"), "mlp.act")), "mlp.c_proj")
    return n.end(x, n.ffn(n.drop(h), y, x))


LAYERS: dict[str, Callable[[Naive, Tensor], Tensor]] = {
    **dict.fromkeys(("xlm_roberta", "camembert"), bert),
    "roberta_prelayernorm": roberta_prelayernorm,
    "albert": albert,
    **dict.fromkeys(("mt5", "umt5"), t5),
    "marian": lambda n, x: bart_like(n, x, False, F.silu),
    "pegasus": lambda n, x: bart_like(n, x, True, F.gelu),
    "opt": lambda n, x: bart_like(n, x, True, F.relu),
    "opt_post_norm": lambda n, x: bart_like(n, x, False, F.relu),
    **dict.fromkeys(("gemma", "olmo", "smollm3", "eurobert", "granite"), llama),
    "stablelm": stablelm,
    "gemma3": gemma3,
    "olmo2": olmo2,
    **dict.fromkeys(("cohere", "cohere2"), cohere),
    "stablelm_parallel": stablelm_parallel,
    "gptj": gptj,
    "starcoder2": starcoder2,
}


def record_pass(model: PreTrainedModel, family: str, layer: nn.Module, outputs: list[str]) -> Recorded:
    """Run a batch in training mode and keep what `Recorded` has of the layer's first call."""
    recorded = Recorded()

    def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if recorded.x is None:
            recorded.x = (args[0] if args else given["hidden_states"]).detach()

    def after(module: nn.Module, args: Any, out: Any) -> None:
        if recorded.out is None:
            recorded.out = (out[0] if isinstance(out, tuple) else out).detach()

    def joint(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            recorded.joint.setdefault(path, (args[0].detach(), torch.get_rng_state()))

        return keep

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
    for path in outputs:
        layer.get_submodule(path).register_forward_pre_hook(joint(path))
    torch.manual_seed(5)
    with torch.no_grad():
        model.train()(**batch(family))
    return recorded


def list_edits(layer: nn.Module, m: schema.Modification) -> Iterator[tuple[str, str, Edit]]:
    """The edits of a layer as place, path of the module that has it, and edit."""
    representation = m.modified_representation.name.name
    for path, module in layer.named_modules():
        if not isinstance(module, Edit):
            continue
        owner = path.rpartition(".")[0].removesuffix(".sublayer_dropout")
        in_attention = any(word in owner.lower() for word in ("attn", "attention"))
        if representation == "attention_ffn":
            yield ("attention" if in_attention else "ffn"), owner, module
        elif representation == "ffn_weights":
            yield owner, owner, module
        else:
            yield {"ffn_intermediate": "intermediate"}.get(representation, representation), owner, module


QUICK_ORDERS = {"ffn_parallel", "houlsby", "pfeiffer"}
ORDERS = [
    pytest.param(
        family,
        method,
        id=f"{family}-{method}",
        marks=[] if family not in KNOWN and method in QUICK_ORDERS else [pytest.mark.slow],
    )
    for family in LAYERS
    for method in METHODS
    if not (method == "pfeiffer" and (family, "pfeiffer") in REFUSED)
    and not (method == "ffn_residual" and family in POST_NORM)
]


@pytest.mark.parametrize(("family", "method"), ORDERS)
def test_a_layer_in_training_equals_the_layer_written_out(family: str, method: str) -> None:
    """The last layer of each stack, with every dropout on: where Δh is among dropout, norm, multiplier and residual."""
    m = METHODS[method]
    rates = RATES.get(family, {"attention_dropout": ATTENTION})
    hidden = 0.0 if family in DRAWS_NONE else HIDDEN
    own = hidden if family in ("mt5", "umt5") else ATTENTION
    model = build(family, **rates)
    attach(model, {"": m})
    shake(model)
    sites = find_sites(model)
    for stack in sites.family.stacks:
        layer = [each for each in sites.layers if each.stack == stack][-1].module
        outputs = [
            path
            for path, _ in layer.named_modules()
            if path.endswith(("o_proj", "out_proj", ".o", "attention.output.dense", "attention.dense"))
        ]
        edits: dict[str, Edit] = {}
        crossed: dict[str, Edit] = {}
        for place, owner, edit in list_edits(layer, m) if method != "nothing" else ():
            edit.reads_residual = method == "ffn_residual"  # type: ignore[assignment]
            target = crossed if place == "attention" and ("encoder_attn" in owner or "EncDec" in owner) else edits
            assert place not in target
            target[place] = edit
        recorded = record_pass(model, family, layer, outputs)
        assert recorded.x is not None and recorded.out is not None
        naive = Naive(layer, recorded, edits, hidden, own)
        if crossed:  # the cross-attention has an edit of its own
            naive.attend = with_cross(naive, crossed)  # type: ignore[method-assign]
        with torch.no_grad():
            assert near(LAYERS[family](naive, recorded.x), recorded.out, 1e-5)
            for place in edits if method != "nothing" else ():  # each modification matters
                others = Naive(layer, recorded, {p: e for p, e in edits.items() if p != place}, hidden, own)
                if crossed:
                    others.attend = with_cross(others, crossed)  # type: ignore[method-assign]
                assert not near(LAYERS[family](others, recorded.x), recorded.out, 1e-3)
        assert method == "nothing" or edits


def with_cross(naive: Naive, crossed: dict[str, Edit]) -> Callable[[str, Tensor], Tensor]:
    """`Naive.attend`, with the cross-attention's own edit there."""

    def attend(path: str, x: Tensor) -> Tensor:
        edits = {**naive.edits, **crossed} if "encoder_attn" in path or "EncDec" in path else naive.edits
        return Naive.attend(Naive(naive.layer, naive.recorded, edits, naive.hidden, naive.own), path, x)

    return attend


# What is used after training


@every_family
@pytest.mark.parametrize("preset", ["ia3", *(pytest.param(p, marks=pytest.mark.slow) for p in ("lora", "lora_ffn"))])
def test_merged_predicts_as_unmerged(family: str, preset: str) -> None:
    model = attached(family, preset)
    expected = logits(model, family)
    merge(model)
    if not find_obstacles(model):
        assert not any(isinstance(hook, Edit) for m in model.modules() for hook in m._forward_hooks.values())
    assert near(logits(model, family), expected)


GENERATIONS = [
    pytest.param(family, preset, id=f"{family}-{preset}", marks=[pytest.mark.slow] if preset == "lora" else [])
    for family in (*ROW_CONTINUING, *ROW_WRITING)
    for preset in ("mam", "lora")
]


@pytest.mark.parametrize(("family", "preset"), GENERATIONS)
@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_generation_with_cache_equals_without(family: str, preset: str, beams: int) -> None:
    model = attached(family, preset)
    fold(model)
    options = GenerationConfig(num_beams=beams, min_new_tokens=6, max_new_tokens=6, do_sample=False, pad_token_id=1)
    options.eos_token_id, options.decoder_start_token_id = 2, 2
    given = inputs(family)
    options.use_cache = False
    expected = model.generate(**given, generation_config=options)
    options.use_cache = True
    assert torch.equal(model.generate(**given, generation_config=options), expected)
    with prepare_inference(model), make_caches(model, beams) as new:
        assert torch.equal(model.generate(**given, **new(), generation_config=options), expected)


@pytest.mark.parametrize("family", [*ROW_CONTINUING, *ROW_WRITING])
def test_the_fused_loss_is_the_models_own_or_is_not_taken(family: str) -> None:
    """Granite and Cohere scale their logits after the output layer; GPT-J's output layer has a bias."""
    model = attached(family, "lora")
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias.normal_()
    if hasattr(model, "lm_head") and model.lm_head.bias is not None:
        model.lm_head.bias.data.normal_()
    layer = find_output_layer(model)
    assert (layer is not None) is has_plain_logits(model) is (family not in ("granite", "cohere", "cohere2"))
    if layer is not None:
        given = batch(family)
        with torch.no_grad():
            assert torch.allclose(TokenLoss(model, layer, 0.0)(given), model(**given).loss, atol=1e-5)


def test_gemma3s_cap_of_its_logits_is_seen() -> None:
    assert find_output_layer(attached("gemma3", "lora", final_logit_softcapping=0.5)) is None


@every_family
@pytest.mark.parametrize("preset", ["mam", pytest.param("lora", marks=pytest.mark.slow)])
def test_without_padding_the_loss_is_the_same_or_it_is_refused(family: str, preset: str) -> None:
    """Positions are each example's own, windows and scales too."""
    model = attached(family, preset)
    if find_refusal(model, 9) is not None:
        with pytest.raises(UserError, match=r"trainer\.padding_free=true is not supported for"):
            PaddingFree(model, 9, 5)
        return
    lengths = (9, 6)
    both = batch(family, lengths)
    with torch.no_grad():
        expected = model(**both).logits
        free = PaddingFree(model, 9, 0)
        with free.active():
            given = free.load({**add_lengths(lambda _: dict(both), joined=family in ROW_CONTINUING)([])})
            found = model(**given).logits
    mask = both["attention_mask"].bool() if family in ROW_CONTINUING else slice(None)
    assert near(found[mask], expected[mask])


WITH_PROMPTS = [family for family in ROW_CONTINUING if (family, "prompt") not in REFUSED]
WHOLE = {"cohere2": {"sliding_window": 64}, "starcoder2": {"sliding_window": None}}  # a window would hide the prompt


@pytest.mark.parametrize("family", WITH_PROMPTS)
def test_a_prompt_is_vectors_before_the_tokens(family: str) -> None:
    """The logits are those with the prompt in `inputs_embeds`. GPT-J's tokens keep their positions, from 0."""
    model = build(family, **WHOLE.get(family, {}))
    attach(model, {"": modification("softmax", "embedding", "parallel", "gated", 4)})
    (prompt,) = (module for module in model.modules() if isinstance(module, DecoderPrompt))
    torch.nn.init.normal_(prompt.vectors)
    ids = batch(family, (9,))["input_ids"]
    plain = build(family, **WHOLE.get(family, {}))
    with torch.no_grad():
        found = model(input_ids=ids).logits
        joined = torch.cat([prompt.vectors[None], plain.get_input_embeddings()(ids)], dim=1)
        positions = torch.arange(13) if family != "gptj" else torch.cat([torch.arange(4), torch.arange(9)])
        expected = plain(inputs_embeds=joined, attention_mask=torch.ones(1, 13), position_ids=positions[None]).logits
    assert near(found, expected[:, 4:])


# Classification


@every_family
def test_a_classifier_trains_its_head_or_there_is_none(family: str, tmp_path: Path) -> None:
    """The head is all that the class has above the backbone, but for a pooler."""
    run = run_on(family, tmp_path, PRESETS["mam"])
    run.task.kind = schema.TaskKind.classification
    if family in WITHOUT_CLASSIFIER:
        with pytest.raises(UserError, match=r"task=some needs a classifier and transformers has none on model=\w+ \("):
            count_run(run)
        return
    config = build(family).config
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    attach(model, PRESETS["mam"])
    heads = find_sites(model).family.task_head
    own = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert own - set(heads) == {model.base_model_prefix}
    ids = torch.randint(5, VOCABULARY, (2, 7))
    ids[:, -1] = 2
    out = model.train()(input_ids=ids, labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in heads:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# ALBERT


def test_albert_has_one_modification_for_all_its_layers() -> None:
    """Counted once; a change of it changes the layers' outputs twice, as a change of its weights does."""
    model = attached("albert", "lora")
    (layer,) = find_sites(model).layers
    assert layer.passes == 2
    assert count(model).paper == 2 * 8 * (16 + 16)
    lent = build("albert")
    lent.classifier.load_state_dict(model.classifier.state_dict())
    with torch.no_grad():
        for name in ("query", "value"):
            projection = getattr(find_sites(model).layers[0].attentions[0], name)
            (edit,) = (m for m in projection.modules() if isinstance(m, Edit))
            weight = getattr(find_sites(lent).layers[0].attentions[0], name).weight
            weight += 2.0 * edit.function.up[0] @ edit.function.down[0]
    assert near(logits(model, "albert"), logits(lent, "albert"))


def test_layers_that_share_a_module_cannot_be_chosen() -> None:
    with pytest.raises(UserError, match="the 2 layers of this backbone share one module"):
        attach(build("albert"), {"": modification("relu", "ffn", layers=[0])})


def test_groups_of_several_layers_are_refused() -> None:
    with pytest.raises(UserError, match="inner_group_num=2"):
        attach(build("albert", inner_group_num=2), PRESETS["lora"])


def test_layers_are_counted_as_often_as_they_run() -> None:
    """Against torch's count, with gradients at the embeddings."""
    model = build("albert", hidden_size=64, intermediate_size=256, num_hidden_layers=4, embedding_size=64)
    attach(model, PRESETS["lora_ffn"])
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda m, args, out: out.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=torch.randint(5, 90, (2, 40)), labels=torch.tensor([0, 1])).loss.backward()
    found = 2 * count_operations(model, Lengths([40, 40], [], joined=False))
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)  # the embeddings' map is not in a layer
