"""Where a backbone has its attentions, projections and feed-forward networks: model families as rows of data.

A family is one `Family` row in `FAMILIES`; `find_sites` resolves the row on a loaded model into `Layer`s of modules.
To support an architecture, add a row and a test case (CONTRIBUTING.md); no class is copied or replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftbench.utils.errors import UserError


@dataclass(frozen=True)
class AttentionPaths:
    """One attention sub-layer, as paths from its layer.

    If query, key and value have the same path, the projection is fused: its output is q | k | v.
    """

    module: str  # the module that calls the attention function
    query: str
    key: str
    value: str
    output: str  # W_o; its input is the concatenation of the heads


@dataclass(frozen=True)
class FeedForwardPaths:
    """One feed-forward sub-layer, as paths from its layer."""

    first: tuple[str, ...]  # W_1, or all modules that read the sub-layer's input x; a layer may lack some of them
    second: str  # W_2
    dropout: str | None = None  # the Dropout module after W_2; None if there is none, or dropout is a function call


@dataclass(frozen=True)
class Family:
    """One row: the layout of a family of transformers classes, relative to `model.base_model`."""

    model_types: tuple[str, ...]  # `config.model_type`
    stacks: Mapping[str, str]  # stack name: path of its list of layers
    attentions: Mapping[str, AttentionPaths]  # "self" and, if the family has it, "cross"
    ffn: FeedForwardPaths
    heads: str  # config attribute with the number of heads; one for each stack if it contains "{stack}_"
    # Stack name: where its embedded input can be lengthened. A decoder alone: its token embedding (`DecoderPrompt`).
    embedding: Mapping[str, str] = field(default_factory=dict)
    embedding_at: str = "input"  # of that module, a LayerNorm; or "output", of an embedding, if there is no such norm
    norm: str | None = None  # post-norm: the LayerNorm that ends a layer
    residual: str | None = None  # pre-norm: the module whose input is the residual that the FFN's output is added to
    functional_dropout: str | None = None  # the attribute of a layer with the rate of its functional dropout
    attention_dropout: str = "attention_dropout"  # config attribute
    hidden_dropout: str = "dropout"  # config attribute; if the config lacks it, the rate is 0
    counts_keys: bool = False  # whether its attentions add a bias to each key by its position among the keys
    task_head: tuple[str, ...] = ("classification_head", "classifier", "score", "pre_classifier")


def _bart_attention(module: str) -> AttentionPaths:
    return AttentionPaths(module, f"{module}.q_proj", f"{module}.k_proj", f"{module}.v_proj", f"{module}.out_proj")


def _bert_attention(module: str) -> AttentionPaths:
    projections = f"{module}.self"
    return AttentionPaths(
        projections, f"{projections}.query", f"{projections}.key", f"{projections}.value", f"{module}.output.dense"
    )


def _t5_attention(module: str) -> AttentionPaths:
    return AttentionPaths(module, f"{module}.q", f"{module}.k", f"{module}.v", f"{module}.o")


FAMILIES = (
    Family(
        model_types=("bart",),
        stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
        attentions={"self": _bart_attention("self_attn"), "cross": _bart_attention("encoder_attn")},
        ffn=FeedForwardPaths(("fc1",), "fc2"),
        embedding={"encoder": "encoder.layernorm_embedding", "decoder": "decoder.layernorm_embedding"},
        heads="{stack}_attention_heads",
        norm="final_layer_norm",
        functional_dropout="dropout",
    ),
    Family(
        model_types=("mbart",),
        stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
        attentions={"self": _bart_attention("self_attn"), "cross": _bart_attention("encoder_attn")},
        ffn=FeedForwardPaths(("fc1",), "fc2"),
        embedding={"encoder": "encoder.layernorm_embedding", "decoder": "decoder.layernorm_embedding"},
        heads="{stack}_attention_heads",
        residual="final_layer_norm",
        functional_dropout="dropout",
    ),
    Family(
        model_types=("bert", "roberta", "electra"),
        stacks={"encoder": "encoder.layer"},
        attentions={"self": _bert_attention("attention"), "cross": _bert_attention("crossattention")},
        ffn=FeedForwardPaths(("intermediate.dense",), "output.dense", dropout="output.dropout"),
        embedding={"encoder": "embeddings.LayerNorm"},
        heads="num_attention_heads",
        norm="output.LayerNorm",
        attention_dropout="attention_probs_dropout_prob",
        hidden_dropout="hidden_dropout_prob",
    ),
    Family(
        model_types=("distilbert",),
        stacks={"encoder": "transformer.layer"},
        attentions={
            "self": AttentionPaths(
                "attention", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"
            )
        },
        ffn=FeedForwardPaths(("ffn.lin1",), "ffn.lin2", dropout="ffn.dropout"),
        embedding={"encoder": "embeddings.LayerNorm"},
        heads="n_heads",
        norm="output_layer_norm",
    ),
    Family(
        model_types=("t5",),
        stacks={"encoder": "encoder.block", "decoder": "decoder.block"},
        attentions={"self": _t5_attention("layer.0.SelfAttention"), "cross": _t5_attention("layer.1.EncDecAttention")},
        ffn=FeedForwardPaths(
            tuple(f"layer.-1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1")),
            "layer.-1.DenseReluDense.wo",
            dropout="layer.-1.dropout",
        ),
        embedding={"encoder": "encoder.embed_tokens", "decoder": "decoder.embed_tokens"},
        embedding_at="output",
        heads="num_heads",
        residual="layer.-1.layer_norm",
        attention_dropout="dropout_rate",
        hidden_dropout="dropout_rate",
        counts_keys=True,
    ),
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        stacks={"decoder": "layers"},
        attentions={
            "self": AttentionPaths(
                "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
            )
        },
        ffn=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        embedding={"decoder": "embed_tokens"},
        embedding_at="output",
        heads="num_attention_heads",
        residual="post_attention_layernorm",
        hidden_dropout="hidden_dropout",
    ),
    Family(
        model_types=("gpt2",),
        stacks={"decoder": "h"},
        attentions={"self": AttentionPaths("attn", "attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj")},
        ffn=FeedForwardPaths(("mlp.c_fc",), "mlp.c_proj", dropout="mlp.dropout"),
        embedding={"decoder": "wte"},
        embedding_at="output",
        heads="num_attention_heads",
        residual="ln_2",
        attention_dropout="attn_pdrop",
        hidden_dropout="resid_pdrop",
    ),
)


@dataclass(frozen=True)
class Part:
    """One of the projections that a fused projection computes: a slice of the last axis of its output."""

    name: str  # query, key or value
    start: int
    stop: int


@dataclass(frozen=True)
class Attention:
    """One attention sub-layer of a loaded model."""

    name: str  # path from the top of the model
    kind: str  # "self" or "cross"
    heads: int
    kv_heads: int  # heads of keys and values; fewer than `heads` in grouped-query attention
    head_width: int
    module: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    parts: Mapping[str, Part] = field(default_factory=dict)  # by name, if query, key and value are one module


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward sub-layer of a loaded model."""

    name: str
    first: Mapping[str, nn.Module]  # by the last part of their names
    second: nn.Module
    dropout: nn.Module | None
    source: nn.Module  # its input is the sub-layer's input x


@dataclass(frozen=True)
class Layer:
    """One layer of a loaded model."""

    name: str
    stack: str
    index: int
    depth: int  # number of layers in its stack
    module: nn.Module
    attentions: tuple[Attention, ...]
    ffn: FeedForward
    norm: nn.Module | None
    residual: nn.Module | None


@dataclass(frozen=True)
class Sites:
    """All places of a loaded model that a modification can name."""

    family: Family
    width: int  # d, the width of the hidden states
    layers: tuple[Layer, ...]
    embedding: Mapping[str, nn.Module] = field(default_factory=dict)
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0


def find_family(model_type: str) -> Family:
    """Return the row of `FAMILIES` for a config's `model_type`. A UserError names the supported ones if there is
    none."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise UserError(
        f"The backbone's model_type is {model_type}, for which peftbench has no family; supported: {supported}. "
        "A family is one row of FAMILIES in peftbench/backbones/sites.py."
    )


def find_sites(model: PreTrainedModel) -> Sites:
    """Resolve the model's family row into modules. Works on the meta device too."""
    config = model.config
    family = find_family(config.model_type)
    base = model.base_model
    names = {module: name for name, module in model.named_modules()}
    return Sites(
        family=family,
        width=config.hidden_size,
        layers=tuple(_find_layers(family, base, config, names)),
        embedding={stack: base.get_submodule(path) for stack, path in family.embedding.items()},
        attention_dropout=float(getattr(config, family.attention_dropout)),
        hidden_dropout=float(getattr(config, family.hidden_dropout, 0.0)),
    )


def list_configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return the configs that a model's parts read, each once: T5's stacks have their own."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list({id(config): config for config in configs}.values())


@contextmanager
def set_configs(configs: Iterable[object], key: str, value: object) -> Iterator[None]:
    """Inside the block, `key` is `value` in all of the configs (or models)."""
    before = [(config, getattr(config, key)) for config in configs]
    for config, _ in before:
        setattr(config, key, value)
    try:
        yield
    finally:
        for config, was in before:
            setattr(config, key, was)


def _find_layers(family: Family, base: nn.Module, config: object, names: Mapping[nn.Module, str]) -> Iterator[Layer]:
    for stack, path in family.stacks.items():
        modules = list(base.get_submodule(path).children())
        heads = int(getattr(config, family.heads.format(stack=stack)))
        for index, module in enumerate(modules):
            second = _require_module(module, family.ffn.second)
            found = {path.rpartition(".")[2]: _find_module(module, path) for path in family.ffn.first}
            first = {name: linear for name, linear in found.items() if linear is not None}
            yield Layer(
                name=names[module],
                stack=stack,
                index=index,
                depth=len(modules),
                module=module,
                attentions=tuple(_find_attentions(family, module, heads, config, names)),
                ffn=FeedForward(
                    name=names[second],
                    first=first,
                    second=second,
                    dropout=None if family.ffn.dropout is None else _require_module(module, family.ffn.dropout),
                    source=next(iter(first.values())),
                ),
                norm=None if family.norm is None else _require_module(module, family.norm),
                residual=None if family.residual is None else _require_module(module, family.residual),
            )


def _find_attentions(
    family: Family, layer: nn.Module, heads: int, config: object, names: Mapping[nn.Module, str]
) -> Iterator[Attention]:
    for kind, paths in family.attentions.items():
        module = _find_module(layer, paths.module)
        if module is None:
            continue  # an encoder layer, or a decoder without cross-attention
        query = _require_module(layer, paths.query)
        widths = measure_projection(query)
        assert widths is not None, f"{type(query).__name__} is not a projection that in_out knows"
        kv_heads = int(getattr(config, "num_key_value_heads", heads))
        fused = paths.query == paths.key == paths.value
        computed = {"query": heads, "key": kv_heads, "value": kv_heads} if fused else {"query": heads}
        head_width = widths[1] // sum(computed.values())
        yield Attention(
            name=names[module],
            kind=kind,
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            module=module,
            query=query,
            key=_require_module(layer, paths.key),
            value=_require_module(layer, paths.value),
            output=_require_module(layer, paths.output),
            parts={part.name: part for part in _divide_heads(computed, head_width)} if fused else {},
        )


def _divide_heads(heads: Mapping[str, int], head_width: int) -> Iterator[Part]:
    """Yield the parts next to each other, each as wide as its heads."""
    start = 0
    for name, count in heads.items():
        yield Part(name, start, start := start + count * head_width)


def measure_projection(module: nn.Module) -> tuple[int, int] | None:
    """Return the widths of a projection's input and output, or None for a module that is not a projection."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # a Linear whose weight is stored as (in, out)
        return module.nx, module.nf
    return None


def _find_module(root: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at `path`, or None if there is none. Negative indices count a list's items from its end."""
    for part in path.split("."):
        if part.startswith("-") and isinstance(root, nn.ModuleList):
            root = root[int(part)]
        elif isinstance(child := getattr(root, part, None), nn.Module):
            root = child
        else:
            return None
    return root


def _require_module(root: nn.Module, path: str) -> nn.Module:
    found = _find_module(root, path)
    assert found is not None, (
        f"{type(root).__name__} has no {path}; this transformers version differs from backbones/sites.py"
    )
    return found
