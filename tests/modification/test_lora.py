"""LoRA against the peft library: the same output and the same gradients to the last bit, with copied weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peftbench.backbones.load import build_meta_backbone
from peftbench.config.compose import compose_run
from peftbench.counts.run_counts import count_run
from peftbench.modification.attach import attach
from peftbench.modification.edit import Edit
from peftbench.modification.merge import merge
from tests.families import batch, build, dropout, modification, outcome, shake

RANK, ALPHA = 4, 12
# (family, our representation): peft's target modules, and how many Linears of the tiny model they are
CASES = {
    ("bart", "query_value"): (r".*\.(q_proj|v_proj)", 2 * (2 + 4)),
    ("bart", "ffn_weights"): (r".*\.(fc1|fc2)", 2 * (2 + 2)),
    ("mbart", "query_value"): (r".*\.(q_proj|v_proj)", 2 * (2 + 4)),
    ("mbart", "ffn_weights"): (r".*\.(fc1|fc2)", 2 * (2 + 2)),
    ("roberta", "query_value"): (r".*\.(query|value)", 2 * 2),
    ("roberta", "ffn_weights"): (r".*\.layer\.\d+\.(intermediate|output)\.dense", 2 * 2),
    ("electra", "query_value"): (r".*\.(query|value)", 2 * 2),
    ("distilbert", "query_value"): (r".*\.(q_lin|v_lin)", 2 * 2),
    ("distilbert", "ffn_weights"): (r".*\.(lin1|lin2)", 2 * 2),
    ("t5", "query_value"): (r".*Attention\.(q|v)", 2 * (2 + 4)),
    ("t5", "ffn_weights"): (r".*\.(wi|wo)", 2 * (2 + 2)),
    ("t5_gated", "ffn_weights"): (r".*\.(wi_0|wi_1|wo)", 3 * (2 + 2)),
    ("llama", "query_value"): (r".*\.(q_proj|v_proj)", 2 * 2),  # W_v is half as wide as W_q
    ("llama", "ffn_weights"): (r".*\.(gate_proj|up_proj|down_proj)", 3 * 2),
    ("mistral", "query_value"): (r".*\.(q_proj|v_proj)", 2 * 2),
    ("qwen2", "query_value"): (r".*\.(q_proj|v_proj)", 2 * 2),
    ("qwen3", "query_value"): (r".*\.(q_proj|v_proj)", 2 * 2),
    ("gpt2", "output"): (r".*\.attn\.c_proj", 2),
    ("gpt2", "ffn_weights"): (r".*\.mlp\.(c_fc|c_proj)", 2 * 2),
}
RATES = {family: dropout(family, 0.1, 0.2, 0.1) for family, _ in CASES}
TABLE = [pytest.param(*case, *expected, id="-".join(case)) for case, expected in CASES.items()]


def peft_lora(family: str, target: str, lora_dropout: float) -> LoraConfig:
    """Of rank 4 and scale 3. GPT-2's weights are stored as (in, out)."""
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=lora_dropout,
        target_modules=target,
        fan_in_fan_out=family == "gpt2",
    )


def pair(
    family: str, representation: str, target: str, lora_dropout: float
) -> tuple[PreTrainedModel, PeftModel, list[tuple[Edit, torch.nn.Module]]]:
    """Our model, peft's on the same backbone, and each place's two modules, with peft's weights random and copied."""
    ours, bare = build(family, **RATES[family]), build(family, **RATES[family])
    form = modification(
        "identity",
        representation,
        "parallel",
        "scaled",
        RANK,
        scale=ALPHA / RANK,
        dropout=0.0,
        input_dropout=lora_dropout,
    )
    attach(ours, {"": form})
    theirs = get_peft_model(bare, peft_lora(family, target, lora_dropout))
    places: list[tuple[Edit, torch.nn.Module]] = []
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            edit = ours.get_submodule(f"{name.removeprefix('base_model.model.')}.modification")
            assert isinstance(edit, Edit) and edit.function.down is not None and edit.function.up is not None
            for mine, linear in ((edit.function.down, module.lora_A), (edit.function.up, module.lora_B)):
                linear["default"].weight.normal_(std=0.5)
                mine.copy_(linear["default"].weight[None])
            places.append((edit, module))
    assert len(places) == sum(isinstance(module, Edit) for module in ours.modules())
    return ours, theirs, places


@pytest.mark.parametrize(("family", "representation", "target", "count"), TABLE)
@pytest.mark.parametrize(
    ("train", "lora_dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)], ids=["eval", "train", "train-lora-dropout"]
)
def test_lora_equals_peft_in_output_and_gradients(
    family: str, representation: str, target: str, count: int, train: bool, lora_dropout: float
) -> None:
    """h + (α/r) B A x at every query and value, or at both FFN Linears: difference 0.0 in fp32."""
    ours, theirs, places = pair(family, representation, target, lora_dropout)
    assert len(places) == count
    bare = outcome(build(family, **RATES[family]), family, train)
    expected = outcome(theirs, family, train)
    assert torch.equal(outcome(ours, family, train), expected)
    assert not torch.allclose(bare, expected, atol=1e-2)
    for edit, module in places:
        for mine, linear in ((edit.function.down, module.lora_A), (edit.function.up, module.lora_B)):
            gradient = linear["default"].weight.grad
            assert gradient.abs().max() > 0
            assert torch.equal(mine.grad[0], gradient)


@pytest.mark.parametrize(
    ("train", "lora_dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)], ids=["eval", "train", "train-lora-dropout"]
)
def test_lora_on_slices_of_a_fused_projection(train: bool, lora_dropout: float) -> None:
    """GPT-2's query and value, against two of peft's LoRAs on the whole c_attn whose B is zero outside its slice.

    Output and gradients of B: difference 0.0. A's gradient sums over 48 columns there, of which 32 are zero, and over
    16 here: the same sum in another order, hence the tolerance.
    """
    model = build("gpt2", **RATES["gpt2"])
    form = modification("identity", "query_value", "parallel", "scaled", RANK, scale=ALPHA / RANK, dropout=0.0)
    form.input_dropout = lora_dropout
    attach(model, {"": form})
    lora = peft_lora("gpt2", r".*\.c_attn", lora_dropout)
    theirs = get_peft_model(build("gpt2", **RATES["gpt2"]), lora, adapter_name="query")
    theirs.add_adapter("value", lora)
    theirs.base_model.set_adapter(["query", "value"])
    slices = {"query": slice(16), "value": slice(32, 48)}
    places = []
    with torch.no_grad():
        for layer in range(2):
            fused = theirs.get_submodule(f"base_model.model.transformer.h.{layer}.attn.c_attn")
            for part, columns in slices.items():
                a, b = fused.lora_A[part].weight.normal_(std=0.5), fused.lora_B[part].weight.zero_()
                b[columns].normal_(std=0.5)
                function = model.get_submodule(f"transformer.h.{layer}.attn.c_attn.{part}.modification.function")
                function.down.copy_(a[None])
                function.up.copy_(b[None, columns])
                places.append((function, a, b, columns))
    expected = outcome(theirs, "gpt2", train)
    assert torch.equal(outcome(model, "gpt2", train), expected)
    assert not torch.allclose(outcome(build("gpt2", **RATES["gpt2"]), "gpt2", train), expected, atol=1e-2)
    for function, a, b, columns in places:
        assert torch.equal(function.up.grad[0], b.grad[columns]) and b.grad[columns].any()
        assert (function.down.grad[0] - a.grad).abs().max() <= 1e-6 * a.grad.abs().max()


def test_lora_begins_as_peft_begins() -> None:
    """W_down uniform within ±1/√in (Kaiming, a = √5), W_up zero: the same distribution as peft's."""
    torch.manual_seed(3)
    wide = build("bart", d_model=64)
    attach(wide, {"": modification("identity", "query_value", "parallel", "scaled", 64, dropout=0.0)})
    ours = wide.get_submodule("model.encoder.layers.0.self_attn.q_proj.modification.function")
    theirs = get_peft_model(build("bart", d_model=64), LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj"]))
    layer = theirs.get_submodule("base_model.model.model.encoder.layers.0.self_attn.q_proj")
    down = layer.lora_A["default"].weight
    bound = 1 / 64**0.5
    for weight in (ours.down.detach(), down.detach()):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(float(weight.std()) - bound / 3**0.5) < 0.02 * bound
    assert not ours.up.any() and not layer.lora_B["default"].weight.any()


def test_lora_on_all_linear_layers_is_pefts_count_on_llama_1b() -> None:
    """target_modules="all-linear" leaves the output layer out: 5,636,096 at r = 8."""
    run = compose_run(["method=lora_all", "model=llama3_2_1b", "task=webnlg", "task.data_dir=.", "bottleneck=8"])
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        theirs = get_peft_model(build_meta_backbone(run.model, run.task), config)
    trained, every = theirs.get_nb_trainable_parameters()
    totals = count_run(run).totals
    assert totals.trained == totals.stored == totals.paper == trained == 5_636_096
    assert totals.backbone == every - trained == 1_235_814_400


@pytest.mark.parametrize("family", ["llama", "qwen3", "bart", "t5_gated", "roberta"])
def test_lora_on_all_linear_layers_is_pefts(family: str) -> None:
    """Output and gradients, with peft's random weights copied: every Linear of the layers, and no other."""
    model, bare = build(family), build(family)
    attach(model, {"": modification("identity", "all_linear", "parallel", "scaled", 4, scale=2.0, dropout=0.0)})
    linear = {name: m for name, m in bare.base_model.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = [name for name, m in linear.items() if m is not bare.get_output_embeddings()]
    names = "|".join(name.replace(".", r"\.") for name in inside)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=rf".*({names})", init_lora_weights=False)
    theirs = get_peft_model(bare, config).eval()
    places = {path.rpartition(".")[0]: m for path, m in model.named_modules() if isinstance(m, Edit)}
    loras = {path.removeprefix("base_model.model."): m for path, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert places.keys() == loras.keys() and places
    for path, edit in places.items():
        lora = loras[path]
        with torch.no_grad():
            edit.function.down.copy_(lora.lora_A["default"].weight[None])
            edit.function.up.copy_(lora.lora_B["default"].weight[None])
    for each in (model, theirs):
        each(**batch(family)).loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch(family)).logits, theirs(**batch(family)).logits, rtol=1e-5, atol=1e-5)
    for path, edit in places.items():
        torch.testing.assert_close(
            edit.function.down.grad[0], loras[path].lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            edit.function.up.grad[0], loras[path].lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6
        )


def test_lora_on_all_linear_layers_merges() -> None:
    model = build("llama")
    attach(model, {"": modification("identity", "all_linear", "parallel", "scaled", 4, scale=2.0, dropout=0.0)})
    shake(model)
    with torch.no_grad():
        expected = model(**batch("llama")).logits
        merge(model)
        hooks = [getattr(hook, "__self__", None) for m in model.modules() for hook in m._forward_hooks.values()]
        assert not any(isinstance(owner, Edit) for owner in hooks)
        torch.testing.assert_close(model(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-4)
