"""Where a backbone has its attentions, projections and feed-forward networks: model families as rows of data.

A family is one `Family` row in `FAMILIES`; `find_sites` resolves the row on a loaded model into `Layer`s of modules.
To support an architecture, add a row and a test case (CONTRIBUTING.md); no class is copied or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftbench.utils.errors import UserError


@dataclass(frozen=True)
class AttentionPaths:
    """One attention sub-layer, as paths from its layer.

    If query, key and value have the same path, the projection is fused: its output is q | k | v, or `interleaved`.
    """

    module: str  # the module that calls the attention function
    query: str
    key: str
    value: str
    output: str  # W_o; its input is the concatenation of the heads
    # A fused output is a list of groups, one for each key head: the group's queries, its key and its value.
    interleaved: bool = False
    source: str | None = None  # a projection that reads the attention's input x and nothing else; None: the query's
    late_biases: tuple[str, ...] = ()  # those of a fused projection to which the attention itself adds a bias later


@dataclass(frozen=True)
class FeedForwardPaths:
    """One feed-forward sub-layer, as paths from its layer."""

    first: tuple[str, ...]  # W_1, or all modules that read the sub-layer's input x; a layer may lack some of them
    second: str  # W_2
    dropout: str | None = None  # the Dropout module after W_2; None if there is none, or dropout is a function call
    fused: tuple[str, ...] = ()  # if `first` is one module that computes several matrices: their names, in its order


def _count_kv_heads(config: Any, heads: int) -> int:
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _is_never_parallel(config: Any) -> bool:
    return False


def _is_always_parallel(config: Any) -> bool:
    return True


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
    # Post-norm: the LayerNorm that ends a layer. Pre-norm: the module whose input is the residual that the FFN's output
    # is added to. Both may depend on the config.
    norm: str | Callable[[Any], str | None] | None = None
    residual: str | Callable[[Any], str | None] | None = None
    post_norm: str | None = None  # the norm of the FFN's output before it is added to that residual
    parallel: Callable[[Any], bool] = _is_never_parallel  # whether attention and FFN are added to one residual at once
    experts: str | None = None  # the module of a layer with its experts' weights, which are in no Linear modules
    kv_heads: Callable[[Any, int], int] = _count_kv_heads  # of a config and its number of heads
    functional_dropout: tuple[str, ...] = ()  # the paths of a layer's attributes with the rate of functional dropout
    attention_dropout: str = "attention_dropout"  # config attribute
    hidden_dropout: str = "dropout"  # config attribute; if the config lacks it, the rate is 0
    flattens: bool = False  # whether its FFNs read the tokens of all examples as one dimension, (B * S, d)
    counts_keys: bool = False  # whether its attentions add a bias to each key by its position among the keys
    autocast: bool = True  # whether its class computes under autocast
    shared: bool = False  # whether each module of a stack is several layers, one after another
    task_head: tuple[str, ...] = ("classification_head", "classifier", "score", "pre_classifier", "qa_outputs")


def _bart_attention(module: str) -> AttentionPaths:
    return AttentionPaths(module, f"{module}.q_proj", f"{module}.k_proj", f"{module}.v_proj", f"{module}.out_proj")


def _bert_attention(module: str) -> AttentionPaths:
    projections = f"{module}.self"
    return AttentionPaths(
        projections, f"{projections}.query", f"{projections}.key", f"{projections}.value", f"{module}.output.dense"
    )


def _t5_attention(module: str) -> AttentionPaths:
    return AttentionPaths(module, f"{module}.q", f"{module}.k", f"{module}.v", f"{module}.o")


def _count_falcon_kv_heads(config: Any, heads: int) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else heads


def _is_falcon_parallel(config: Any) -> bool:
    return bool(config.new_decoder_architecture or config.parallel_attn)


def _find_falcon_residual(config: Any) -> str:
    if not config.parallel_attn:
        return "post_attention_layernorm"
    both = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (2, None)
    return "ln_mlp" if both else "input_layernorm"


def _find_bloom_residual(config: Any) -> str:
    """The FFN's output is added to its input before the norm, or to that after it."""
    return "mlp.dense_h_to_4h" if config.apply_residual_connection_post_layernorm else "post_attention_layernorm"


def _llama_attention() -> AttentionPaths:
    return AttentionPaths("self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def _fused_attention(module: str, projection: str, output: str, *, interleaved: bool = False) -> AttentionPaths:
    path = f"{module}.{projection}"
    return AttentionPaths(module, path, path, path, f"{module}.{output}", interleaved=interleaved)


FAMILIES = (
    Family(
        model_types=("bart",),
        stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
        attentions={"self": _bart_attention("self_attn"), "cross": _bart_attention("encoder_attn")},
        ffn=FeedForwardPaths(("fc1",), "fc2"),
        embedding={"encoder": "encoder.layernorm_embedding", "decoder": "decoder.layernorm_embedding"},
        heads="{stack}_attention_heads",
        norm="final_layer_norm",
        functional_dropout=("dropout",),
    ),
    Family(
        model_types=("mbart",),
        stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
        attentions={"self": _bart_attention("self_attn"), "cross": _bart_attention("encoder_attn")},
        ffn=FeedForwardPaths(("fc1",), "fc2"),
        embedding={"encoder": "encoder.layernorm_embedding", "decoder": "decoder.layernorm_embedding"},
        heads="{stack}_attention_heads",
        residual="final_layer_norm",
        functional_dropout=("dropout",),
    ),
    Family(
        model_types=("bert", "roberta", "electra", "xlm-roberta", "camembert"),
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
    Family(  # not RoBERTa's row: a sub-layer begins with its norm, and no norm of a layer ends it
        model_types=("roberta-prelayernorm",),
        stacks={"encoder": "encoder.layer"},
        attentions={"self": _bert_attention("attention")},
        ffn=FeedForwardPaths(("intermediate.dense",), "output.dense", dropout="output.dropout"),
        heads="num_attention_heads",
        residual="intermediate.LayerNorm",
        attention_dropout="attention_probs_dropout_prob",
        hidden_dropout="hidden_dropout_prob",
    ),
    Family(  # all layers of a group are one module: its modifications are shared, as its weights are
        model_types=("albert",),
        stacks={"encoder": "encoder.albert_layer_groups"},
        attentions={
            "self": AttentionPaths(
                "albert_layers.0.attention",
                "albert_layers.0.attention.query",
                "albert_layers.0.attention.key",
                "albert_layers.0.attention.value",
                "albert_layers.0.attention.dense",
            )
        },
        ffn=FeedForwardPaths(("albert_layers.0.ffn",), "albert_layers.0.ffn_output"),
        heads="num_attention_heads",
        norm="albert_layers.0.full_layer_layer_norm",
        attention_dropout="attention_probs_dropout_prob",
        hidden_dropout="hidden_dropout_prob",
        shared=True,
    ),
    Family(
        model_types=("eurobert",),
        stacks={"encoder": "layers"},
        attentions={"self": _llama_attention()},
        ffn=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        heads="num_attention_heads",
        residual="post_attention_layernorm",
        hidden_dropout="hidden_dropout",
        task_head=("dense", "classifier"),
    ),
    Family(
        model_types=("t5", "mt5", "umt5"),
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
    Family(  # Granite multiplies a sub-layer's output with its Δh by residual_multiplier, and adds it to the residual
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo", "smollm3"),
        stacks={"decoder": "layers"},
        attentions={"self": _llama_attention()},
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
    Family(
        model_types=("phi3",),
        stacks={"decoder": "layers"},
        attentions={"self": _fused_attention("self_attn", "qkv_proj", "o_proj")},
        ffn=FeedForwardPaths(
            ("mlp.gate_up_proj",), "mlp.down_proj", dropout="resid_mlp_dropout", fused=("gate_proj", "up_proj")
        ),
        heads="num_attention_heads",
        residual="post_attention_layernorm",
        hidden_dropout="resid_pdrop",
    ),
    Family(  # rotary positions are made for the padded batch: no prompts, and no packing
        model_types=("modernbert",),
        stacks={"encoder": "layers"},
        attentions={"self": _fused_attention("attn", "Wqkv", "Wo")},
        ffn=FeedForwardPaths(("mlp.Wi",), "mlp.Wo", fused=("input", "gate")),  # act(input) * gate
        heads="num_attention_heads",
        residual="mlp_norm",
        hidden_dropout="mlp_dropout",
        task_head=("head", "classifier"),
    ),
    Family(  # h is a sub-layer's output before its own norm, to which Δh is added as in BERT's layers
        model_types=("gemma2", "gemma3_text"),
        stacks={"decoder": "layers"},
        attentions={"self": _llama_attention()},
        ffn=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        heads="num_attention_heads",
        residual="pre_feedforward_layernorm",
        post_norm="post_feedforward_layernorm",
        hidden_dropout="hidden_dropout",
    ),
    Family(  # no norm before a sub-layer, one after it: h is its output before that norm, as in Gemma 2 and BERT
        model_types=("olmo2",),
        stacks={"decoder": "layers"},
        attentions={"self": _llama_attention()},
        ffn=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        embedding={"decoder": "embed_tokens"},
        embedding_at="output",
        heads="num_attention_heads",
        residual="mlp.gate_proj",
        post_norm="post_feedforward_layernorm",
        hidden_dropout="hidden_dropout",
    ),
    Family(
        model_types=("cohere", "cohere2"),
        stacks={"decoder": "layers"},
        attentions={"self": _llama_attention()},
        ffn=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        embedding={"decoder": "embed_tokens"},
        embedding_at="output",
        heads="num_attention_heads",
        residual="input_layernorm",
        parallel=_is_always_parallel,
        hidden_dropout="hidden_dropout",
    ),
    Family(
        model_types=("stablelm",),
        stacks={"decoder": "layers"},
        attentions={"self": _llama_attention()},
        ffn=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", dropout="dropout"),
        embedding={"decoder": "embed_tokens"},
        embedding_at="output",
        heads="num_attention_heads",
        residual=lambda config: "input_layernorm" if config.use_parallel_residual else "post_attention_layernorm",
        parallel=lambda config: bool(config.use_parallel_residual),
        hidden_dropout="hidden_dropout",
    ),
    Family(
        model_types=("starcoder2",),
        stacks={"decoder": "layers"},
        attentions={"self": _llama_attention()},
        ffn=FeedForwardPaths(("mlp.c_fc",), "mlp.c_proj"),
        embedding={"decoder": "embed_tokens"},
        embedding_at="output",
        heads="num_attention_heads",
        residual="post_attention_layernorm",
        functional_dropout=("self_attn.residual_dropout", "mlp.residual_dropout"),
        hidden_dropout="residual_dropout",
    ),
    Family(
        model_types=("gptj",),
        stacks={"decoder": "h"},
        attentions={
            "self": AttentionPaths("attn", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),
        },
        ffn=FeedForwardPaths(("mlp.fc_in",), "mlp.fc_out", dropout="mlp.dropout"),
        embedding={"decoder": "wte"},
        embedding_at="output",
        heads="num_attention_heads",
        residual="ln_1",
        parallel=_is_always_parallel,
        attention_dropout="attn_pdrop",
        hidden_dropout="resid_pdrop",
    ),
    Family(  # pre-norm, except OPT-350m; no prompts, because its language model calls the decoder past the base model
        model_types=("opt",),
        stacks={"decoder": "decoder.layers"},
        attentions={"self": _bart_attention("self_attn")},
        ffn=FeedForwardPaths(("fc1",), "fc2"),
        heads="num_attention_heads",
        norm=lambda config: None if config.do_layer_norm_before else "final_layer_norm",
        residual=lambda config: "final_layer_norm" if config.do_layer_norm_before else None,
        functional_dropout=("dropout",),
        flattens=True,
    ),
    Family(
        model_types=("gpt_neox",),
        stacks={"decoder": "layers"},
        attentions={"self": _fused_attention("attention", "query_key_value", "dense", interleaved=True)},
        ffn=FeedForwardPaths(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", dropout="post_mlp_dropout"),
        heads="num_attention_heads",
        residual="post_attention_layernorm",
        parallel=lambda config: bool(config.use_parallel_residual),
        hidden_dropout="hidden_dropout",
    ),
    Family(
        model_types=("bloom",),
        stacks={"decoder": "h"},
        attentions={"self": _fused_attention("self_attention", "query_key_value", "dense", interleaved=True)},
        ffn=FeedForwardPaths(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        heads="num_attention_heads",
        residual=_find_bloom_residual,
        functional_dropout=("self_attention.hidden_dropout", "mlp.hidden_dropout"),
        hidden_dropout="hidden_dropout",
    ),
    Family(  # one dropout takes the sum of both sub-layers: a modified FFN's output is inside of it
        model_types=("falcon",),
        stacks={"decoder": "h"},
        attentions={"self": _fused_attention("self_attention", "query_key_value", "dense", interleaved=True)},
        ffn=FeedForwardPaths(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        heads="num_attention_heads",
        kv_heads=_count_falcon_kv_heads,
        residual=_find_falcon_residual,
        parallel=_is_falcon_parallel,
        hidden_dropout="hidden_dropout",
    ),
    Family(  # no norm of the embeddings, before which a prompt could join them, after their positions
        model_types=("marian",),
        stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
        attentions={"self": _bart_attention("self_attn"), "cross": _bart_attention("encoder_attn")},
        ffn=FeedForwardPaths(("fc1",), "fc2"),
        heads="{stack}_attention_heads",
        norm="final_layer_norm",
        functional_dropout=("dropout",),
    ),
    Family(  # nor here
        model_types=("m2m_100", "pegasus"),
        stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
        attentions={"self": _bart_attention("self_attn"), "cross": _bart_attention("encoder_attn")},
        ffn=FeedForwardPaths(("fc1",), "fc2"),
        heads="{stack}_attention_heads",
        residual="final_layer_norm",
        functional_dropout=("dropout",),
    ),
    Family(
        model_types=("mpnet",),
        stacks={"encoder": "encoder.layer"},
        attentions={"self": _t5_attention("attention.attn")},
        ffn=FeedForwardPaths(("intermediate.dense",), "output.dense", dropout="output.dropout"),
        heads="num_attention_heads",
        norm="output.LayerNorm",
        attention_dropout="attention_probs_dropout_prob",
        hidden_dropout="hidden_dropout_prob",
    ),
    Family(
        model_types=("deberta-v2",),  # and v3
        stacks={"encoder": "encoder.layer"},
        attentions={
            "self": AttentionPaths(
                "attention.self",
                "attention.self.query_proj",
                "attention.self.key_proj",
                "attention.self.value_proj",
                "attention.output.dense",
                source="attention.self.value_proj",  # those of query and key may read the relative positions too
            )
        },
        ffn=FeedForwardPaths(("intermediate.dense",), "output.dense", dropout="output.dropout"),
        heads="num_attention_heads",
        norm="output.LayerNorm",
        attention_dropout="attention_probs_dropout_prob",
        hidden_dropout="hidden_dropout_prob",
        task_head=("pooler", "classifier", "qa_outputs"),
    ),
    Family(  # v1
        model_types=("deberta",),
        stacks={"encoder": "encoder.layer"},
        attentions={
            "self": AttentionPaths(
                "attention.self",
                "attention.self.in_proj",
                "attention.self.in_proj",
                "attention.self.in_proj",
                "attention.output.dense",
                interleaved=True,
                late_biases=("query", "value"),
            )
        },
        ffn=FeedForwardPaths(("intermediate.dense",), "output.dense", dropout="output.dropout"),
        heads="num_attention_heads",
        norm="output.LayerNorm",
        attention_dropout="attention_probs_dropout_prob",
        hidden_dropout="hidden_dropout_prob",
        autocast=False,  # q_bias in float32 makes queries float32, whose least number 16-bit scores are masked with
        task_head=("pooler", "classifier", "qa_outputs"),
    ),
    Family(
        model_types=("mixtral", "qwen3_moe"),
        stacks={"decoder": "layers"},
        attentions={"self": _llama_attention()},
        ffn=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),  # of Qwen3-MoE's dense layers
        heads="num_attention_heads",
        residual="post_attention_layernorm",
        experts="mlp.experts",
        hidden_dropout="hidden_dropout",
    ),
)


@dataclass(frozen=True)
class Part:
    """One of the projections that a fused projection computes: the same slice of each of the equal groups into which
    the last axis of its output is divided."""

    name: str  # query, key or value; in an FFN, such as gate_proj
    start: int
    stop: int
    groups: int = 1
    late_bias: bool = False  # whether the attention adds a bias to it later, so that the output is h without its bias

    @property
    def width(self) -> int:
        """The number of columns of all groups."""
        return self.groups * (self.stop - self.start)

    def take(self, output: Tensor) -> Tensor:
        """Return this part of a fused output (..., columns), as (..., width)."""
        return self._group(output)[..., self.start : self.stop].flatten(-2)

    def put(self, output: Tensor, part: Tensor) -> Tensor:
        """Return the fused output (..., columns) with `part` (..., width) in place of this part."""
        own = self._group(part)
        return torch.slice_scatter(self._group(output), own, -1, self.start, self.stop).flatten(-2)

    def _group(self, columns: Tensor) -> Tensor:
        return columns.reshape(*columns.shape[:-1], self.groups, -1)


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
    source: nn.Module  # its input is the attention's input x
    parts: Mapping[str, Part] = field(default_factory=dict)  # by name, if query, key and value are one module


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward sub-layer of a loaded model."""

    name: str
    first: Mapping[str, nn.Module]  # by the last part of their names, or by those of their parts
    second: nn.Module
    dropout: nn.Module | None
    source: nn.Module  # its input is the sub-layer's input x
    post_norm: nn.Module | None = None  # the norm of its output, before the residual is added
    parts: Mapping[str, Part] = field(default_factory=dict)  # by name, if those of `first` are one module


@dataclass(frozen=True)
class Layer:
    """One layer of a loaded model."""

    name: str
    stack: str
    index: int
    depth: int  # number of layers in its stack
    module: nn.Module
    attentions: tuple[Attention, ...]
    dense: FeedForward | None  # None: its FFN is a mixture of experts
    norm: nn.Module | None
    residual: nn.Module | None
    parallel: bool = False  # attention and FFN read the same hidden states, and are added to them at once
    experts: nn.Module | None = None
    passes: int = 1  # how often a forward pass runs the module: more than once if several layers share it
    residual_multiplier: float = 1.0  # what each sub-layer's output is multiplied by before it is added to the residual

    @property
    def ffn(self) -> FeedForward:
        """The FFN, of a layer that has one.

        Raises:
            UserError: the FFN is a mixture of experts.
        """
        if self.dense is None:
            raise UserError(
                "The FFNs of this backbone are mixtures of experts, whose weights are not in Linear modules, to "
                "which a modification could be attached; modify the attention, such as with "
                "modified_representation=attention."
            )
        return self.dense


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
    """Resolve the model's family row into modules. Works on the meta device too.

    Raises:
        UserError: there is no such row, the config makes the layers multiply by weights without their modules, or it
            groups layers in a way that the row does not name.
    """
    config = model.config
    if getattr(config, "inner_group_num", 1) > 1:
        raise UserError(
            f"The backbone's config.json has inner_group_num={config.inner_group_num}: peftbench modifies an ALBERT "
            "whose groups have one layer each, as all published ones do; set it to 1."
        )
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise UserError(
            "The backbone's config.json has slow_but_exact=true, with which BLOOM's layers bypass the modules that a "
            "modification is attached to; set it to false."
        )
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


# Keys of a config by which logits are changed after the output layer, and the values with which they are not.
_CHANGED_LOGITS: Mapping[str, object] = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}


def has_plain_logits(model: PreTrainedModel) -> bool:
    """Return whether a language model's logits are W h + b, neither scaled nor capped after the output layer.

    Gemma 2 caps them, Granite divides them by `logits_scaling`, Cohere multiplies them by `logit_scale`.
    """
    return all(
        getattr(config, key, plain) == plain for config in list_configs(model) for key, plain in _CHANGED_LOGITS.items()
    )


def adds_router_loss(model: PreTrainedModel) -> bool:
    """Return whether a model adds to its loss that of its experts' routers, as Mixtral and Qwen3-MoE can."""
    return any(getattr(config, "output_router_logits", False) for config in list_configs(model))


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
    residual = family.residual(config) if callable(family.residual) else family.residual
    norm = family.norm(config) if callable(family.norm) else family.norm
    for stack, path in family.stacks.items():
        modules = list(base.get_submodule(path).children())
        heads = int(getattr(config, family.heads.format(stack=stack)))
        for index, module in enumerate(modules):
            experts = None if family.experts is None else _find_module(module, family.experts)
            yield Layer(
                name=names[module],
                stack=stack,
                index=index,
                depth=len(modules),
                module=module,
                attentions=tuple(_find_attentions(family, module, heads, config, names)),
                dense=_find_ffn(family, module, names) if experts is None else None,
                norm=None if norm is None else _require_module(module, norm),
                residual=None if residual is None else _require_module(module, residual),
                parallel=family.parallel(config),
                experts=experts,
                passes=_count_passes(config, index, len(modules)) if family.shared else 1,
                residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
            )


def _count_passes(config: Any, group: int, groups: int) -> int:
    """Return how many layers the module `group` of ALBERT's `groups` is."""
    layers = config.num_hidden_layers
    return sum(int(layer / (layers / groups)) == group for layer in range(layers))


def _find_ffn(family: Family, layer: nn.Module, names: Mapping[nn.Module, str]) -> FeedForward:
    paths = family.ffn
    second = _require_module(layer, paths.second)
    found = {path.rpartition(".")[2]: _find_module(layer, path) for path in paths.first}
    first = {name: linear for name, linear in found.items() if linear is not None}
    parts: dict[str, Part] = {}
    if paths.fused:
        (fused,) = first.values()
        widths = measure_projection(fused)
        assert widths is not None, f"{type(fused).__name__} is not a projection that in_out knows"
        parts = _divide(dict.fromkeys(paths.fused, widths[1] // len(paths.fused)))
        first = dict.fromkeys(paths.fused, fused)
    return FeedForward(
        name=names[second],
        first=first,
        second=second,
        dropout=None if paths.dropout is None else _require_module(layer, paths.dropout),
        source=next(iter(first.values())),
        post_norm=None if family.post_norm is None else _require_module(layer, family.post_norm),
        parts=parts,
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
        kv_heads = family.kv_heads(config, heads)
        fused = paths.query == paths.key == paths.value
        computed = {"query": heads, "key": kv_heads, "value": kv_heads} if fused else {"query": heads}
        head_width = widths[1] // sum(computed.values())
        groups = kv_heads if paths.interleaved else 1
        columns = {name: count * head_width // groups for name, count in computed.items()}
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
            source=query if paths.source is None else _require_module(layer, paths.source),
            parts=_divide(columns, groups, paths.late_biases) if fused else {},
        )


def _divide(columns: Mapping[str, int], groups: int = 1, late_biases: tuple[str, ...] = ()) -> dict[str, Part]:
    """Return the parts next to each other, each with its number of columns in every group."""
    parts, start = {}, 0
    for name, count in columns.items():
        parts[name] = Part(name, start, start + count, groups, name in late_biases)
        start += count
    return parts


def measure_projection(module: nn.Module) -> tuple[int, int] | None:
    """Return the widths of a projection's input and output, or None for a module that is not a projection.

    A layer of the peft library has those of the projection inside.
    """
    module = getattr(module, "base_layer", module)
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
