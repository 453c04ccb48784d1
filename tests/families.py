"""Tiny random models of every family, and modifications written in one line, for all tests."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    CamembertConfig,
    CamembertForSequenceClassification,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    EuroBertConfig,
    EuroBertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    MT5Config,
    MT5ForConditionalGeneration,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    UMT5Config,
    UMT5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.t5.modeling_t5 import T5Attention

from peftbench.config import schema
from peftbench.config.axes import RULES
from peftbench.modification.representation import REPRESENTATIONS

# Since some version after 5.10, and after 5.11.
T5_HAS_INTERFACE = "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(T5Attention)
GPTJ_HAS_INTERFACE = "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(GPTJAttention)

VOCABULARY = 99
_ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "init_std": 0.3,  # large enough that a wrong mask or position shows
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "num_labels": 3,
    "initializer_range": 0.3,
}


def bart(**more: Any) -> PreTrainedModel:
    return BartForConditionalGeneration(BartConfig(**{**_ENCODER_DECODER, **more}))


def bart_classifier(**more: Any) -> PreTrainedModel:
    return BartForSequenceClassification(BartConfig(**{**_ENCODER_DECODER, "num_labels": 3, **more}))


def mbart(**more: Any) -> PreTrainedModel:
    return MBartForConditionalGeneration(MBartConfig(**{**_ENCODER_DECODER, "decoder_start_token_id": 2, **more}))


def roberta(**more: Any) -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**{**_ENCODER, **more}))


def bert(**more: Any) -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**{**_ENCODER, "pad_token_id": 0, **more}))


def electra(**more: Any) -> PreTrainedModel:
    return ElectraForSequenceClassification(ElectraConfig(**{**_ENCODER, "embedding_size": 8, **more}))


def distilbert(**more: Any) -> PreTrainedModel:
    own = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "vocab_size": VOCABULARY, "num_labels": 3}
    return DistilBertForSequenceClassification(
        DistilBertConfig(**{**own, "max_position_embeddings": 64, "pad_token_id": 1, "initializer_range": 0.3, **more})
    )


_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 6,  # heads x d_kv differs from d_model, as in some T5s
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def t5(**more: Any) -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(**{**_T5, **more}))


def t5_gated(**more: Any) -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(**{**_T5, "feed_forward_proj": "gated-gelu", **more}))


def t5_classifier(**more: Any) -> PreTrainedModel:
    return T5ForSequenceClassification(T5Config(**{**_T5, "num_labels": 3, **more}))


_DECODER = {**_ENCODER, "num_key_value_heads": 2, "eos_token_id": 2, "bos_token_id": 0}


def llama(**more: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_DECODER, **more}))


def llama_classifier(**more: Any) -> PreTrainedModel:
    return LlamaForSequenceClassification(LlamaConfig(**{**_DECODER, **more}))


def mistral(**more: Any) -> PreTrainedModel:
    """With a window that is shorter than the texts."""
    return MistralForCausalLM(MistralConfig(**{**_DECODER, "sliding_window": 4, **more}))


def qwen2(**more: Any) -> PreTrainedModel:
    """Projections with biases; the second layer has a window, the first has none."""
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**{**_DECODER, **window, **more}))


def qwen3(**more: Any) -> PreTrainedModel:
    """Queries and keys are normed head by head, and heads are wider than their share of the hidden state."""
    return Qwen3ForCausalLM(Qwen3Config(**{**_DECODER, "head_dim": 6, **more}))


_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 32,
    "n_positions": 64,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "num_labels": 3,
    "initializer_range": 0.3,
}


def gpt2(**more: Any) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(**{**_GPT2, **more}))


def gpt2_classifier(**more: Any) -> PreTrainedModel:
    return GPT2ForSequenceClassification(GPT2Config(**{**_GPT2, **more}))


def phi3(**more: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**{**_DECODER, **more}))


def modernbert(**more: Any) -> PreTrainedModel:
    """The first layer sees everything, the second has a window that is shorter than the texts."""
    own = {"global_attn_every_n_layers": 2, "local_attention": 4, "eos_token_id": 2, "bos_token_id": 0}
    return ModernBertForSequenceClassification(ModernBertConfig(**{**_ENCODER, **own, **more}))


def gemma2(**more: Any) -> PreTrainedModel:
    """Caps so low that a forgotten one shows; the first layer has a window that is shorter than the texts."""
    own = {"head_dim": 6, "sliding_window": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(**{**_DECODER, **own, "query_pre_attn_scalar": 6, **more}))


_NO_GROUPS = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}


def gpt_neox(**more: Any) -> PreTrainedModel:
    """Attention and FFN read the same hidden states."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**_NO_GROUPS, **more}))


def bloom(**more: Any) -> PreTrainedModel:
    own = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    return BloomForCausalLM(BloomConfig(**{**own, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, **more}))


def falcon(**more: Any) -> PreTrainedModel:
    """As Falcon-40B: two key heads, each after its two query heads, and a norm for each sub-layer."""
    own = {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 32, "bias": False}
    return FalconForCausalLM(FalconConfig(**{**_NO_GROUPS, **own, **more}))


def m2m_100(**more: Any) -> PreTrainedModel:
    own = {**_ENCODER_DECODER, "decoder_start_token_id": 2, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    return M2M100ForConditionalGeneration(M2M100Config(**{**own, **more}))


def mpnet(**more: Any) -> PreTrainedModel:
    return MPNetForSequenceClassification(MPNetConfig(**{**_ENCODER, **more}))


def deberta_v2(**more: Any) -> PreTrainedModel:
    """As v3: the projections of queries and keys also read the relative positions."""
    own = {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    own |= {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "pad_token_id": 1}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**{**_ENCODER, **own, **more}))


def deberta(**more: Any) -> PreTrainedModel:
    """v1: one projection for each head's query, key and value, two of whose biases the attention adds by itself."""
    own = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    own |= {"max_relative_positions": 6, "type_vocab_size": 0, "pad_token_id": 1}
    model = DebertaForSequenceClassification(DebertaConfig(**{**_ENCODER, **own, **more}))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_bias", "v_bias")):  # which begin as zeros, and could be forgotten
            torch.nn.init.normal_(parameter)
    return model


def mixtral(**more: Any) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**{**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, **more}))


def qwen3_moe(**more: Any) -> PreTrainedModel:
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 6}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_DECODER, **own, **more}))


def xlm_roberta(**more: Any) -> PreTrainedModel:
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(**{**_ENCODER, **more}))


def camembert(**more: Any) -> PreTrainedModel:
    return CamembertForSequenceClassification(CamembertConfig(**{**_ENCODER, **more}))


def roberta_prelayernorm(**more: Any) -> PreTrainedModel:
    return RobertaPreLayerNormForSequenceClassification(RobertaPreLayerNormConfig(**{**_ENCODER, **more}))


def albert(**more: Any) -> PreTrainedModel:
    """Two layers that are one module."""
    own = {"embedding_size": 8, "pad_token_id": 1, "classifier_dropout_prob": 0.0}
    return AlbertForSequenceClassification(AlbertConfig(**{**_ENCODER, **own, **more}))


def eurobert(**more: Any) -> PreTrainedModel:
    """A Llama that sees what comes later too."""
    return EuroBertForSequenceClassification(EuroBertConfig(**{**_DECODER, **more}))


def mt5(**more: Any) -> PreTrainedModel:
    return MT5ForConditionalGeneration(MT5Config(**{**_T5, **more}))


def umt5(**more: Any) -> PreTrainedModel:
    """Every layer has a bias of positions of its own."""
    return UMT5ForConditionalGeneration(UMT5Config(**{**_T5, **more}))


def marian(**more: Any) -> PreTrainedModel:
    own = {"decoder_start_token_id": 1, "activation_function": "swish", "scale_embedding": True}
    return MarianMTModel(MarianConfig(**{**_ENCODER_DECODER, **own, **more}))


def pegasus(**more: Any) -> PreTrainedModel:
    return PegasusForConditionalGeneration(PegasusConfig(**{**_ENCODER_DECODER, "decoder_start_token_id": 1, **more}))


def gemma(**more: Any) -> PreTrainedModel:
    return GemmaForCausalLM(GemmaConfig(**{**_DECODER, "head_dim": 6, **more}))


def gemma3(**more: Any) -> PreTrainedModel:
    """The first layer has a window that is shorter than the texts, and positions of its own; no cap, as published."""
    own = {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 9}
    own |= {"layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_DECODER, **own, **more}))


def smollm3(**more: Any) -> PreTrainedModel:
    """The second layer has no positions."""
    return SmolLM3ForCausalLM(SmolLM3Config(**{**_DECODER, "no_rope_layers": [1, 0], **more}))


def granite(**more: Any) -> PreTrainedModel:
    """Four multipliers, each other than what a model without it has."""
    own = {"embedding_multiplier": 3.0, "attention_multiplier": 0.7, "residual_multiplier": 0.4, "logits_scaling": 5.0}
    return GraniteForCausalLM(GraniteConfig(**{**_DECODER, **own, **more}))


def olmo(**more: Any) -> PreTrainedModel:
    """Norms without weights; queries, keys and values are clipped."""
    return OlmoForCausalLM(OlmoConfig(**{**_DECODER, "clip_qkv": 2.0, **more}))


def olmo2(**more: Any) -> PreTrainedModel:
    """Each norm comes after its sub-layer."""
    return Olmo2ForCausalLM(Olmo2Config(**{**_DECODER, **more}))


def cohere(**more: Any) -> PreTrainedModel:
    """One norm for both sub-layers; queries and keys are normed."""
    return CohereForCausalLM(CohereConfig(**{**_DECODER, "use_qk_norm": True, **more}))


def cohere2(**more: Any) -> PreTrainedModel:
    """As Cohere; the first layer has a window that is shorter than the texts, the second has no positions."""
    own = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Cohere2ForCausalLM(Cohere2Config(**{**_DECODER, **own, **more}))


def stablelm(**more: Any) -> PreTrainedModel:
    """Half of each head's dimensions are rotated."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return StableLmForCausalLM(StableLmConfig(**{**_DECODER, "rope_parameters": rope, **more}))


def stablelm_parallel(**more: Any) -> PreTrainedModel:
    """As StableLM 2 12B: one norm for both sub-layers, and a norm for each head of queries and keys."""
    return stablelm(**{"use_parallel_residual": True, "qk_layernorm": True, **more})


def starcoder2(**more: Any) -> PreTrainedModel:
    """Biases everywhere, a window that is shorter than the texts."""
    own = {"sliding_window": 4, "embedding_dropout": 0.0, "residual_dropout": 0.0}
    return Starcoder2ForCausalLM(Starcoder2Config(**{**_DECODER, **own, **more}))


def gptj(**more: Any) -> PreTrainedModel:
    """One norm for both sub-layers; two of a head's four dimensions are rotated."""
    return GPTJForCausalLM(GPTJConfig(**{**_GPT2, "rotary_dim": 2, **more}))


_OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16, "eos_token_id": 2, "bos_token_id": 0, "init_std": 0.3}


def opt(**more: Any) -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**{**_ENCODER, **_OPT, **more}))


def opt_post_norm(**more: Any) -> PreTrainedModel:
    """As OPT-350m: norms after the sub-layers, and embeddings that are narrower than the layers."""
    return opt(**{"do_layer_norm_before": False, "word_embed_proj_dim": 8, **more})


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "bart": bart,
    "bart_classifier": bart_classifier,
    "mbart": mbart,
    "roberta": roberta,
    "bert": bert,
}
MORE_FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "electra": electra,
    "distilbert": distilbert,
    "t5": t5,
    "t5_gated": t5_gated,
    "t5_classifier": t5_classifier,
    "llama": llama,
    "llama_classifier": llama_classifier,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gpt2": gpt2,
    "gpt2_classifier": gpt2_classifier,
}
# Families whose layers are laid out in another way than a row of modules: tests/backbones/test_layouts.py.
LAYOUTS: dict[str, Callable[..., PreTrainedModel]] = {
    "phi3": phi3,
    "modernbert": modernbert,
    "gemma2": gemma2,
    "gpt_neox": gpt_neox,
    "bloom": bloom,
    "falcon": falcon,
    "m2m_100": m2m_100,
    "mpnet": mpnet,
    "deberta": deberta,
    "deberta_v2": deberta_v2,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}
# Families that are a row of modules: tests/backbones/test_contract.py.
ROWS: dict[str, Callable[..., PreTrainedModel]] = {
    "xlm_roberta": xlm_roberta,
    "camembert": camembert,
    "roberta_prelayernorm": roberta_prelayernorm,
    "albert": albert,
    "eurobert": eurobert,
    "mt5": mt5,
    "umt5": umt5,
    "marian": marian,
    "pegasus": pegasus,
    "gemma": gemma,
    "gemma3": gemma3,
    "smollm3": smollm3,
    "granite": granite,
    "olmo": olmo,
    "olmo2": olmo2,
    "cohere": cohere,
    "cohere2": cohere2,
    "stablelm": stablelm,
    "stablelm_parallel": stablelm_parallel,
    "starcoder2": starcoder2,
    "gptj": gptj,
    "opt": opt,
    "opt_post_norm": opt_post_norm,
}
GENERATING = ("bart", "mbart")
WRITING = (*GENERATING, "t5", "t5_gated")  # whose labels are texts
CONTINUING = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # decoders alone, whose labels are the input itself
LAID_OUT_WRITING = ("m2m_100",)  # of LAYOUTS
LAID_OUT_CONTINUING = ("phi3", "gemma2", "gpt_neox", "bloom", "falcon", "mixtral", "qwen3_moe")
ROW_WRITING = ("mt5", "umt5", "marian", "pegasus")  # of ROWS
ROW_CONTINUING = tuple(list(ROWS)[list(ROWS).index("gemma") :])
WITHOUT_CLASSIFIER = ("marian", "pegasus", "granite", "cohere", "cohere2")  # of ROWS; transformers has no such class
DECODERS = (*CONTINUING, "llama_classifier", "gpt2_classifier")


def build(family: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A tiny model with the same weights for the same seed, in eval mode, and torch's random numbers as they are after
    it was made: a copy of the first one that was asked for, which takes a fifth of the time."""
    if family.removeprefix("u").removeprefix("m").startswith("t5") and not T5_HAS_INTERFACE:
        pytest.skip("this transformers' T5 does not call registered attention functions; peftbench refuses its heads")
    if family == "gptj" and not GPTJ_HAS_INTERFACE:
        pytest.skip("this transformers' GPT-J calls no registered attention functions; peftbench refuses its heads")
    made = (family, seed, repr(sorted(more.items())))
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    if made not in _BUILT:
        torch.manual_seed(seed)
        model = {**FAMILIES, **MORE_FAMILIES, **LAYOUTS, **ROWS}[family](**more)
        if model._supports_sdpa:  # of some versions also where scores are capped, which it cannot
            capped = getattr(model.config, "attn_logit_softcapping", None) is not None
            model.set_attn_implementation("eager" if capped else "sdpa")
        _BUILT[made] = (model.eval(), torch.get_rng_state())
    model, state = _BUILT[made]
    torch.set_rng_state(state)
    return _copy(model, {})


def _copy(module: Any, memo: dict[int, Any]) -> Any:
    """What copy.deepcopy makes of a module without hooks. Most of its time goes to the empty dicts for hooks, of which
    each module has ten, and to numbers and flags, which need no copy."""
    copied = memo[id(module)] = module.__class__.__new__(module.__class__)
    attributes = vars(copied)
    for name, value in vars(module).items():
        kind = type(value)
        if kind in (bool, int, float, str, NoneType):
            attributes[name] = value
        elif name == "_modules":
            attributes[name] = {key: memo.get(id(part)) or (part and _copy(part, memo)) for key, part in value.items()}
        elif kind in (dict, OrderedDict, set) and not value:
            attributes[name] = kind()
        else:
            attributes[name] = copy.deepcopy(value, memo)
    return copied


_BUILT: dict[tuple[str, int, str], tuple[PreTrainedModel, torch.Tensor]] = {}


def dropout(family: str, hidden: float = 0.0, attention: float = 0.0, activation: float = 0.0) -> dict[str, float]:
    """The config's dropout rates, for `build`; none at all unless given. Some families have fewer than three: T5 has
    one, Llama and its kin have the attention's only."""
    if family in ("roberta", "bert", "electra"):
        return {"hidden_dropout_prob": hidden, "attention_probs_dropout_prob": attention}
    if family in ("gpt2", "gpt2_classifier"):
        return {"resid_pdrop": hidden, "embd_pdrop": hidden, "attn_pdrop": attention}
    if family.startswith("t5"):
        return {"dropout_rate": hidden}
    if family in DECODERS:
        return {"attention_dropout": attention}
    rates = {"dropout": hidden, "attention_dropout": attention}
    return rates if family == "distilbert" else {**rates, "activation_dropout": activation}


def batch(family: str, lengths: tuple[int, ...] = (9, 6), seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch with labels."""
    generator = torch.Generator().manual_seed(seed)
    pad = 0 if family == "bert" else 1
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), pad)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        ids[row, length - 1] = 2  # BART's classifier reads the last </s>
        mask[row, :length] = 1
    if family in (*CONTINUING, *LAID_OUT_CONTINUING, *ROW_CONTINUING):
        labels = ids.masked_fill(mask == 0, -100)
    elif family in (*WRITING, *LAID_OUT_WRITING, *ROW_WRITING):
        labels = torch.randint(5, VOCABULARY, (len(lengths), 5), generator=generator)
    else:
        labels = torch.randint(0, 3, (len(lengths),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def inputs(family: str, lengths: tuple[int, ...] = (9, 6), seed: int = 1) -> dict[str, torch.Tensor]:
    """What generation begins with: a batch without labels, for decoders alone padded on the left."""
    found = batch(family, lengths, seed)
    del found["labels"]
    if family in (*CONTINUING, *LAID_OUT_CONTINUING, *ROW_CONTINUING):
        longest = max(lengths)
        for name, tensor in found.items():
            rows = zip(tensor, lengths, strict=True)
            found[name] = torch.stack([row.roll(longest - length) for row, length in rows])
    return found


def modification(
    form: str = "relu",
    representation: str = "ffn",
    insertion: str = "parallel",
    composition: str = "add",
    bottleneck: int | None = 8,  # enough that not every ReLU of a place is dead
    *,
    scale: float = 1.0,
    learned: bool = False,
    head_input: str = "query",
    ffn_input: str = "normed",
    stacks: tuple[str, ...] = ("encoder", "decoder"),
    attentions: tuple[str, ...] = ("self", "cross"),
    layers: list[int] | None = None,
    **options: Any,
) -> schema.Modification:
    """A point on the four axes by names."""
    return schema.Modification(
        functional_form=schema.FunctionalForm(form),
        modified_representation=schema.ModifiedRepresentation(
            schema.Representation[representation],
            stacks=[schema.Stack[stack] for stack in stacks],
            attentions=[schema.AttentionKind[kind] for kind in attentions],
            layers=layers,
            head_input=schema.HeadInput[head_input],
            ffn_input=schema.FFNInput[ffn_input],
        ),
        insertion_form=schema.InsertionForm(schema.Insertion[insertion]),
        composition_function=schema.CompositionFunction(schema.Composition[composition], scale, learned),
        bottleneck=None if form == "constant" else bottleneck,
        init=schema.Init[options.pop("init", "lora")],
        layer_norm=schema.LayerNormPlace[options.pop("layer_norm", "none")],
        **options,
    )


def points(*forms: str, **options: object) -> Iterator[tuple[str, schema.Modification]]:
    """Every combination of the axes that config/axes.py lets through, under a name for it."""
    representations = (*REPRESENTATIONS, "heads", "embedding")
    insertions, compositions = ("parallel", "sequential"), ("add", "scaled", "gated", "gated_add", "multiply")
    for axes in itertools.product(forms, representations, insertions, compositions):
        m = modification(*axes, scale=2.0, **options)  # type: ignore[arg-type]  # strings of axes and options alike
        if not any(rule.broken(m) for rule in RULES):
            yield "-".join(axes), m


PRESETS: dict[str, dict[str, schema.Modification]] = {
    "prompt": {"": modification("softmax", "embedding", "parallel", "gated", init="bert")},
    "prefix": {"": modification("softmax", "heads", "parallel", "gated", prefix_mlp=8)},
    "prefix_no_gating": {"": modification("softmax", "heads", "parallel", "add", prefix_mlp=8)},
    "adapter": {"": modification("relu", "attention_ffn", "sequential", "add", bias=True, init="bert")},
    "pfeiffer": {"": modification("relu", "layer", "sequential", "add", bias=True, init="bert")},
    "lora": {"": modification("identity", "query_value", "parallel", "scaled", scale=2.0, dropout=0.0)},
    "lora_ffn": {"": modification("identity", "ffn_weights", "parallel", "scaled", scale=4.0, dropout=0.0)},
    "parallel_adapter": {"": modification("relu", "ffn", "parallel", "add", bias=True, init="bert")},
    "parallel_adapter_attention": {"": modification("relu", "attention", "parallel", "add", bias=True, init="bert")},
    "heads_joint": {"": modification("relu", "heads_joint", "parallel", "add", bias=True, init="bert")},
    "mh_parallel_adapter": {"": modification("relu", "heads", "parallel", "add", init="bert")},
    "mh_parallel_adapter_hidden": {
        "": modification("relu", "heads", "parallel", "add", init="bert", head_input="hidden")
    },
    "mh_parallel_adapter_normed_query": {
        "": modification("relu", "heads", "parallel", "add", prefix_mlp=8, head_input="normed_query")
    },
    "scaled_parallel_adapter": {"": modification("relu", "ffn", "parallel", "scaled", scale=4.0, bias=True)},
    "mam": {
        "": modification("relu", "ffn", "parallel", "scaled", 5, scale=4.0, bias=True),
        "mix.attention.": modification("softmax", "heads", "parallel", "gated", prefix_mlp=8),
    },
    "ia3": {
        "": modification("constant", "key_value", "sequential", "multiply"),
        "mix.ffn.": modification("constant", "ffn_intermediate", "sequential", "multiply"),
    },
    "unipelt": {
        "": modification("relu", "ffn", "sequential", "gated_add", 5, bias=True, init="bert"),
        "mix.attention.": modification("softmax", "heads", "parallel", "gated", prefix_mlp=8),
        "mix.lora.": modification("identity", "query_value", "parallel", "gated_add", 3, dropout=0.0),
    },
    "learned_scale": {"": modification("relu", "ffn", "parallel", "scaled", learned=True, init="bert")},
    "learned_gate": {"": modification("relu", "attention", "parallel", "gated", init="bert")},
    "heads_gate": {"": modification("relu", "heads", "parallel", "gated", init="bert")},
}


def shake(model: torch.nn.Module, scale: float = 0.3, seed: int = 2) -> None:
    """Give every trained tensor random values, so that zero-initialised ones take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def list_methods(*, peft: bool = False) -> list[str]:
    """The presets of conf/method that are our own, or with `peft` those of the peft library."""
    files = sorted((schema.find_conf_dir() / "method").glob("*.yaml"))
    return [file.stem for file in files if ("\npeft:\n" in file.read_text(encoding="utf-8")) is peft]


def run_on(family: str, folder: Path, found: dict[str, schema.Modification], **more: Any) -> schema.Run:
    """A run of the modifications `found`, by prefix, on a tiny model of which `folder` has the config.json alone."""
    build(family).config.save_pretrained(folder)
    root = {} if "" not in found else {key: getattr(found[""], key) for key in schema.Modification.__dataclass_fields__}
    writes = family in (*WRITING, *LAID_OUT_WRITING, *ROW_WRITING, *WITHOUT_CLASSIFIER)
    kind = schema.TaskKind.text_to_text if writes else schema.TaskKind.classification
    return schema.Run(
        **root,
        mix={prefix.split(".")[1]: m for prefix, m in found.items() if prefix},
        method="tiny",
        model=schema.Model(name=family, path=str(folder)),
        task=schema.Task(name="some", kind=kind, labels=["a", "b", "c"], metric="accuracy"),
        **more,
    )


# Families that are laid out as another one here, with the same row in sites.py and attentions that work alike: their
# tests are slow, and take a preset for each kind of place only.
ALIKE = {"bart_classifier", "bert", "t5_classifier", "t5_gated"}
ALIKE |= {"gpt2_classifier", "llama_classifier", "mistral", "qwen2"}

# A preset for each kind of place, head input and insertion form that any preset has. The family decides these; what is
# computed there, and how it joins h, is the same whatever the family, and the family that it is like has all presets.
PLACES = ("prompt", "mam", "adapter", "pfeiffer", "lora", "lora_ffn", "ia3", "heads_joint")
PLACES += ("parallel_adapter_attention", "unipelt")
PLACES += ("mh_parallel_adapter", "mh_parallel_adapter_hidden", "mh_parallel_adapter_normed_query")


# Families whose layers are another one's but for the order of the norms (mBART), the embeddings and the task head
# (ELECTRA) or a norm of queries and keys (Qwen3): they take `PLACES` only, since what a preset computes at its places
# is tested on BART, RoBERTa and Llama.
NEAR = {"mbart", "electra", "qwen3"}


def cases(families: Iterable[str]) -> list[tuple[str, str]]:
    """Every family with every preset, or what `ALIKE` and `NEAR` name with those of `PLACES`; no prompt for a decoder
    alone."""
    return [
        (family, preset)
        for family in families
        for preset in PRESETS
        if (family not in DECODERS or preset != "prompt") and (family not in ALIKE | NEAR or preset in PLACES)
    ]


def table(families: Iterable[str], *quick: str) -> list[Any]:
    """`cases`; but for the quick families, or those that `ALIKE` does not name, they are slow."""

    def is_quick(family: str) -> bool:
        return family in quick if quick else family not in ALIKE

    return [
        pytest.param(family, preset, id=f"{family}-{preset}", marks=[] if is_quick(family) else [pytest.mark.slow])
        for family, preset in cases(families)
    ]


def long_tail(families: Iterable[str], *quick: str) -> list[Any]:
    """The families, of which all but the quick ones are left to the slow tests."""
    return [family if family in quick else pytest.param(family, marks=pytest.mark.slow) for family in families]


def outcome(model: torch.nn.Module, family: str, train: bool) -> torch.Tensor:
    """Logits under one seed, behind a backward pass of the loss."""
    model.train(train)
    torch.manual_seed(11)
    out = model(**batch(family))
    out.loss.backward()
    logits: torch.Tensor = out.logits.detach()
    return logits
