"""Build the modifications of a run and attach them to an unmodified model.

`attach` freezes the backbone, finds the family's sites and puts one module at every place that a modification names.
The modifications, the task head and what `unfreeze` names stay trainable. No transformers code is copied, subclassed or
replaced.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from peftbench.backbones.quantisation import is_quantised
from peftbench.backbones.sites import Attention, Layer, Sites, find_sites
from peftbench.config import schema
from peftbench.config.fidelity import Deviation, apply_fidelity
from peftbench.config.own_parts import is_own
from peftbench.modification.composition import Add, Gated, GatedAdd, Multiply, Scaled
from peftbench.modification.edit import Edit, SublayerDropout
from peftbench.modification.functional_form import Bottleneck, Constant, FunctionalForm
from peftbench.modification.head_attention import ATTENTION_NAME, HEADS, HeadModification, Prefix
from peftbench.modification.insertion import INSERTION_FORMS
from peftbench.modification.own_form import build_own_form
from peftbench.modification.peft_method import attach_peft
from peftbench.modification.prompt import PROMPT, DecoderPrompt, Prompt, PromptKeys, PromptMask
from peftbench.modification.reparameterization import PrefixMLP, PrefixTrunk
from peftbench.modification.representation import REPRESENTATIONS, Place, choose_sites
from peftbench.utils.errors import UserError

# One module can end a projection, its sub-layer and its layer at once, as W_2 does in Llama. The modification that is
# nearer to the weights is hooked first. All other representations have 1.
OUTWARDS = {"ffn_weights": 0, "all_linear": 0, "attention": 2, "attention_ffn": 2, "layer": 3}

BIASES = ("bias", "q_bias", "v_bias")  # names of parameters; DeBERTa adds those of queries and values by itself


def attach(
    model: PreTrainedModel,
    modifications: Mapping[str, schema.Modification],
    unfreeze: schema.Unfreeze = schema.Unfreeze.none,
    untrained: Collection[str] = (),
    *,
    train_head: bool = True,
) -> None:
    """Attach modifications to `model`, in place.

    Args:
        modifications: the modifications by the prefix of their keys, as `schema.list_modifications` returns them.
        unfreeze: which backbone parameters are trained too.
        untrained: names of parameters that came with no weights and therefore must be trained (the task head).
        train_head: if false, the `untrained` parameters stay as they are and are frozen, unless `unfreeze` names them.
    """
    sites = find_sites(model)
    _freeze(model, sites, unfreeze, untrained, train_head)
    sites, dropouts = _wrap_dropout(sites) if modifications else (sites, [])
    with model.device:  # create new parameters on the backbone's device, which may be the meta device
        for prefix, m in sorted(modifications.items(), key=lambda item: OUTWARDS.get(_name_representation(item[1]), 1)):
            _attach_one(model, sites, prefix, m)
    for linear, dropout in dropouts:
        linear.register_forward_hook(dropout.drop)
    model.train(model.training)  # new modules start in training mode, whatever the model's mode is


def attach_run(
    model: PreTrainedModel, run: schema.Run, untrained: Collection[str] = ()
) -> tuple[schema.Run, list[Deviation]]:
    """Attach the modifications of a run, interpreted according to its `fidelity`, or its method of peft.

    Returns:
        The run with its deviations from the paper's text filled in, and these deviations.
    """
    run, deviations = apply_fidelity(run, model.config.model_type)
    train_head = not run.fidelity.frozen_task_head
    attach(model, schema.list_modifications(run), run.unfreeze, untrained, train_head=train_head)
    if run.peft:
        attach_peft(model, run)
    return run, deviations


def _name_representation(m: schema.Modification) -> str:
    return str(m.modified_representation.name.name)


def _freeze(
    model: PreTrainedModel, sites: Sites, unfreeze: schema.Unfreeze, untrained: Collection[str], train_head: bool
) -> None:
    if is_quantised(model) and unfreeze is not schema.Unfreeze.none:
        raise UserError(
            f"unfreeze={unfreeze.name}: the backbone is quantised, and a packed backbone is frozen as a whole; use a "
            "method that adds parameters, such as method=lora, or the unquantised model."
        )
    computed_in, unfrozen = model.dtype, _list_unfrozen(model, unfreeze)
    in_backbone = False
    for name, parameter in model.named_parameters():
        in_head = name in untrained or name.split(".")[0] in sites.family.task_head
        in_backbone = in_backbone or (name in unfrozen and not in_head)
        parameter.requires_grad_((in_head and train_head) or name in unfrozen)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if unfreeze is not schema.Unfreeze.none and not in_backbone:
        raise UserError(
            f"unfreeze={unfreeze.name}: {model.config.model_type} has no {unfreeze.name} to train; use unfreeze=norm, "
            "or a method that adds parameters, such as method=lora."
        )
    if computed_in is torch.float32:
        return
    for module in model.modules():  # the task head's Linears
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_read_in_float32)


def _list_unfrozen(model: PreTrainedModel, unfreeze: schema.Unfreeze) -> set[str]:
    """Return the names of the parameters that `unfreeze` makes trainable."""
    names = {name for name, _ in model.named_parameters()}
    if unfreeze is schema.Unfreeze.none:
        return set()
    if unfreeze is schema.Unfreeze.bias:  # not T5's relative_attention_bias.weight, a table of positions
        return {name for name in names if name.rpartition(".")[2] in BIASES}
    if unfreeze is schema.Unfreeze.norm:
        norms = _find_norms(model)
        return {name for name, parameter in model.named_parameters() if id(parameter) in norms}
    return names


def _read_in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the inputs of a trained module of a bfloat16 backbone to float32 (forward pre-hook)."""
    return tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def _find_norms(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters of all norms: LayerNorm, and the RMSNorm class of each family."""
    norms = (module for module in model.modules() if type(module).__name__.endswith("Norm"))
    return {id(parameter) for norm in norms for parameter in norm.parameters()}


def _wrap_dropout(sites: Sites) -> tuple[Sites, list[tuple[nn.Module, SublayerDropout]]]:
    """Turn a family's functional dropout into modules, so that h after the dropout has a place; see `SublayerDropout`.

    Returns the sites with `ffn.dropout` filled in, and pairs of a Linear and its dropout module. Hook each dropout onto
    its Linear after all edits of that Linear are attached.
    """
    attributes = sites.family.functional_dropout
    if not attributes:
        return sites, []
    layers: list[Layer] = []
    owned: list[tuple[nn.Module, SublayerDropout]] = []
    for layer in sites.layers:
        for path in attributes:
            owner, _, attribute = path.rpartition(".")
            rate = float(getattr(layer.module.get_submodule(owner), attribute))
            setattr(layer.module.get_submodule(owner), attribute, 0.0)
        for linear in (*(attention.output for attention in layer.attentions), layer.ffn.second):
            dropout = SublayerDropout(rate)
            linear.add_module("sublayer_dropout", dropout)
            owned.append((linear, dropout))
        layers.append(replace(layer, dense=replace(layer.ffn, dropout=owned[-1][1])))
    return replace(sites, layers=tuple(layers)), owned


def _attach_one(model: PreTrainedModel, sites: Sites, prefix: str, m: schema.Modification) -> None:
    """Attach one modification. `prefix` is the prefix of its keys, "" or "mix.NAME.", and gives its modules' name."""
    name = schema.name_module(prefix)
    representation = _name_representation(m)
    if representation == "embedding":
        _attach_prompt(model, sites, m, name)
    elif representation == "heads":
        _attach_to_heads(model, sites, m, name, prefix)
    else:
        _attach_to_places(sites, m, name, prefix)


def _attach_to_places(sites: Sites, m: schema.Modification, name: str, prefix: str) -> None:
    insertion = m.insertion_form.name.name
    places = REPRESENTATIONS[_name_representation(m)]
    for layer, attentions in choose_sites(sites, m, prefix):
        if m.modified_representation.ffn_input is schema.FFNInput.residual:
            layer = _read_residual(layer, prefix)
        for place in places(layer, attentions):
            _require_whole(place, m, prefix)
            in_width, out_width = place.widths(sites.width, insertion)
            rate = sites.attention_dropout if place.in_attention else sites.hidden_dropout
            edit = Edit(
                _build_function(m, in_width, out_width, rate),
                place.insertion(insertion),
                _build_composition(m, in_width, 1),
            )
            edit.attach(name, place.target, place.source, place.at, place.part)


def _require_whole(place: Place, m: schema.Modification, prefix: str) -> None:
    """Refuse a modification that needs the bias of h where the attention adds that later, in a family such as DeBERTa:
    h + Δh is the same without it, h ∘ (1 + Δh), (1-λ)h + λΔh and f(h) are not."""
    if place.part is None or not place.part.late_bias:
        return
    composition = m.composition_function.name
    reads = m.functional_form.name != "constant" or composition is schema.Composition.gated_add  # by f, or by the gate
    if m.insertion_form.name is schema.Insertion.sequential and reads:
        what, instead = "insertion_form=sequential reads h", "insertion_form=parallel"
    elif composition in (schema.Composition.multiply, schema.Composition.gated):
        what = f"composition_function={composition.name} changes all of h"
        instead = "composition_function=add"
    else:
        return
    raise UserError(
        f"{prefix}modified_representation={_name_representation(m)}: in this backbone the attention itself adds the "
        f"bias of the {place.part.name} after its projection, and {what}, with its bias; use {prefix}{instead}, or "
        "another representation, such as attention or ffn."
    )


def _read_residual(layer: Layer, prefix: str) -> Layer:
    """Return the layer with the input x of its FFN taken before the norm."""
    if layer.residual is None:
        raise UserError(
            f"{prefix}modified_representation.ffn_input=residual: in this backbone each norm comes after its "
            "sub-layer, so that the FFN's input already is the residual; leave it out."
        )
    return replace(layer, dense=replace(layer.ffn, source=layer.residual))


def _attach_to_heads(model: PreTrainedModel, sites: Sites, m: schema.Modification, name: str, prefix: str) -> None:
    """Attach one modification to every head, inside the attention function."""
    insertion = m.insertion_form.name.name
    head_input = m.modified_representation.head_input
    hidden = head_input is schema.HeadInput.hidden
    is_prefix = m.functional_form.name == "softmax" and m.composition_function.name is schema.Composition.gated
    _require_attention_interface(sites, f"{prefix}modified_representation=heads")
    trunks: dict[tuple[str, str], PrefixTrunk] = {}
    for layer, attentions in choose_sites(sites, m, prefix):
        for attention in attentions:
            groups = attention.kv_heads if is_prefix else attention.heads
            generator = None
            if m.prefix_mlp is not None:
                kind = (layer.stack, attention.kind)
                if kind not in trunks:
                    trunks[kind] = PrefixTrunk(_get_size(m), sites.width, m.prefix_mlp)
                generator = PrefixMLP(trunks[kind], groups, attention.head_width)
            function = _build_function(
                m,
                sites.width if hidden else attention.head_width,
                attention.head_width,
                sites.attention_dropout,
                groups=groups,
                generator=generator,
            )
            if is_prefix:
                assert isinstance(function, Bottleneck)
                _add_to_heads(attention, name, Prefix(function))
                continue
            composition = _build_composition(m, function.in_width, groups)
            normed = head_input is schema.HeadInput.normed_query
            modification = HeadModification(
                function,
                INSERTION_FORMS[insertion],
                composition,
                reads_hidden=hidden,
                query_norm=nn.LayerNorm(sites.width) if normed else None,
                query_part=attention.parts.get("query"),
            )
            if modification.reads_input:
                attention.query.register_forward_pre_hook(modification.read)
            _add_to_heads(attention, name, modification)
    use_our_attention(model)


def _require_attention_interface(sites: Sites, key: str) -> None:
    """Refuse a transformers version whose attention classes do not look up registered functions: it would never call
    ours."""
    attention = type(sites.layers[0].attentions[0].module)
    if not _class_takes_ours(attention.__module__, attention.__qualname__):
        newer = ", or a newer transformers" if {"t5", "mt5", "umt5", "gptj"} & {*sites.family.model_types} else ""
        raise UserError(
            f"{key}: transformers {transformers.__version__} does not let its {attention.__name__} be modified, "
            "because that calls no registered attention function; use a method that modifies neither heads nor "
            f"embeddings, such as method=lora or method=parallel_adapter{newer}."
        )


def takes_our_attention(model: PreTrainedModel) -> bool:
    """Return whether the model's attentions look up functions that are registered with transformers."""
    attention = type(find_sites(model).layers[0].attentions[0].module)
    return _class_takes_ours(attention.__module__, attention.__qualname__)


@cache
def _class_takes_ours(module: str, name: str) -> bool:
    """Look up an attention class by name, cached: finding the source of a class takes tens of milliseconds."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(getattr(sys.modules[module], name))


def use_our_attention(model: PreTrainedModel) -> None:
    """Select our attention function in every stack: T5's stacks have their own configs, which transformers 5.17 does
    not reach from the top."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(ATTENTION_NAME)


def _add_to_heads(attention: Attention, name: str, modification: nn.Module) -> None:
    if not hasattr(attention.module, HEADS):
        attention.module.add_module(HEADS, nn.ModuleDict())
    getattr(attention.module, HEADS)[name] = modification


def _attach_prompt(model: PreTrainedModel, sites: Sites, m: schema.Modification, name: str) -> None:
    """Put vectors before the input of the first stack, and widen the mask of every attention that sees them."""
    _require_attention_interface(sites, "modified_representation=embedding")
    if not sites.embedding:
        raise UserError(
            f"modified_representation=embedding: prompts are not supported for {model.config.model_type}, because its "
            "family names no embedding to lengthen; use method=prefix."
        )
    if not model.config.is_encoder_decoder and set(sites.family.stacks) == {"decoder"}:
        _attach_decoder_prompt(model, sites, m, name)
        return
    stack, module = next(iter(sites.embedding.items()))
    prompt = Prompt(_get_size(m), int(module.get_parameter("weight").shape[-1]))
    module.add_module(name, prompt)
    if sites.family.embedding_at == "input":
        module.register_forward_pre_hook(prompt.prepend_to_input)
    else:
        module.register_forward_hook(prompt.prepend_to_output)
    for layer in sites.layers:
        for attention in layer.attentions:
            if layer.stack == stack or attention.kind == "cross":
                there = getattr(attention.module, PROMPT, None)  # the mask module of another prompt
                attention.module.add_module(PROMPT, PromptMask(_get_size(m) + (there.length if there else 0)))
    last = [layer for layer in sites.layers if layer.stack == stack][-1]
    if len(sites.embedding) == 1 and last.norm is not None:  # only an encoder: its task head reads fixed positions
        last.norm.register_forward_hook(prompt.strip)
    use_our_attention(model)


def _attach_decoder_prompt(model: PreTrainedModel, sites: Sites, m: schema.Modification, name: str) -> None:
    """Put vectors before the tokens of a decoder alone, whose keys and values are the attentions' prefixes."""
    (embedding,), length, config = sites.embedding.values(), _get_size(m), model.config
    if any(isinstance(module, DecoderPrompt) for module in model.modules()):
        raise UserError(
            f"modified_representation=embedding twice on {config.model_type}: a decoder takes one prompt; add the "
            "bottlenecks of the two."
        )
    if length > config.max_position_embeddings:
        raise UserError(
            f"bottleneck={length} with modified_representation=embedding: the backbone has "
            f"{config.max_position_embeddings} positions; use a shorter prompt."
        )
    fronts = []
    for layer in sites.layers:
        for attention in layer.attentions:
            fronts.append(Prefix(PromptKeys(length)))
            _add_to_heads(attention, name, fronts[-1])
    prompt = DecoderPrompt(length, int(embedding.get_parameter("weight").shape[-1]), fronts)
    embedding.add_module(name, prompt)
    model.base_model.register_forward_pre_hook(prompt.run_before)
    use_our_attention(model)


def _build_function(
    m: schema.Modification,
    in_width: int,
    out_width: int,
    own_dropout: float,
    groups: int = 1,
    generator: PrefixMLP | None = None,
) -> FunctionalForm:
    if m.functional_form.name == "constant":
        return Constant(out_width, groups=groups, init=m.init.name)
    if is_own(m.functional_form.name):
        return build_own_form(m, in_width, out_width, own_dropout, groups=groups)
    return Bottleneck(
        in_width,
        _get_size(m),
        out_width,
        m.functional_form.name,
        groups=groups,
        bias=m.bias,
        dropout=own_dropout if m.dropout is None else m.dropout,
        input_dropout=m.input_dropout,
        layer_norm=m.layer_norm.name,
        init=m.init.name,
        generator=generator,
    )


def _build_composition(m: schema.Modification, in_width: int, groups: int) -> nn.Module:
    composition = m.composition_function
    if composition.name is schema.Composition.scaled:
        return Scaled(composition.scale, composition.learned)
    if composition.name is schema.Composition.gated:
        return Gated(in_width, groups)
    if composition.name is schema.Composition.gated_add:
        return GatedAdd(in_width, groups)
    if composition.name is schema.Composition.multiply:
        return Multiply()
    return Add()


def _get_size(m: schema.Modification) -> int:
    assert m.bottleneck is not None, "config/axes.py requires a bottleneck"
    return m.bottleneck
