r"""A run's modifications in the terms of the peft library: which of its methods they are, and with which tensors.

LoRA: h + (α/r) B A x at a projection, with A (r, in) and B (out, r); our s is α/r. Several modifications of one
projection are one of a larger rank: the rows of A and the columns of B are put next to each other. Where one module
computes query, key and value, each of them has its own rows of B and zeros in the others', so that B is block-diagonal.
IA3: h ∘ l with l = 1 + our vector. Prompt tuning: vectors before the embedded input. Other points of the four axes have
no form in peft; `PeftAdapter.of` says why.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_family, measure_projection
from peftbench.config.schema import Run, TaskKind, Unfreeze, has_modification, list_modifications, name_module
from peftbench.modification.composition import Add, Gated, Multiply, Scaled
from peftbench.modification.edit import Edit
from peftbench.modification.functional_form import Bottleneck, Constant, OwnForm
from peftbench.modification.head_attention import HeadModification, Prefix
from peftbench.modification.insertion import parallel
from peftbench.modification.merge import list_edits_after, list_edits_before
from peftbench.modification.peft_files import make_peft_files
from peftbench.modification.prompt import DecoderPrompt, Prompt, PromptKeys, has_positions_below_zero
from peftbench.utils.errors import UserError

ROOT = "base_model.model."  # before the name of each module in peft's files
LORA, IA3 = "LORA", "IA3"


@dataclass(frozen=True)
class PeftAdapter:
    """The content of a folder that `PeftModel.from_pretrained` reads.

    Args:
        config: of adapter_config.json; keys that are left out have peft's defaults.
        tensors: of adapter_model.safetensors.
        notes: a sentence for each thing that a user may not expect.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, run: Run, untrained: Collection[str] = ()) -> PeftAdapter:
        """Return the adapter of a model to which the run's modifications are attached. Works on the meta device.

        Args:
            untrained: names of parameters that came with no weights, as `attach` takes them.

        Raises:
            UserError: there is no such form in peft, with the reason.
        """
        _require_form(model, run)
        edited = _list_edited(model)
        saved = list_saved_modules(model, untrained)
        notes: tuple[str, ...] = ()
        if run.peft:
            config, tensors = _read_method(model, str(run.model.path or run.model.hub_id))
        elif not edited:
            config, tensors = _make_prompt(model, run)
        elif _name_form(edited[0].edits[0]) == LORA:
            config, tensors, notes = _make_lora(model, edited, run)
        else:
            config, tensors = _make_ia3(model, edited)
        for name in saved:
            state = model.get_submodule(name).state_dict()
            tensors |= {f"{ROOT}{name}.{key}": tensor for key, tensor in state.items()}
        config = {
            **config,
            "task_type": _name_task(run, model),
            "base_model_name_or_path": run.model.path or run.model.hub_id,
            "revision": None if run.model.path else run.model.revision,
            "inference_mode": True,
            "modules_to_save": saved or None,
        }
        return cls(config, {name: tensor.detach() for name, tensor in tensors.items()}, notes)


@dataclass(frozen=True)
class _Edited:
    """A projection and the edits of its output, or of its input."""

    name: str  # path from the top of the model
    module: nn.Module
    edits: list[Edit]
    at: str

    @property
    def widths(self) -> tuple[int, int]:
        widths = measure_projection(self.module)
        assert widths is not None
        return widths


def list_saved_modules(model: PreTrainedModel, untrained: Collection[str] = ()) -> list[str]:
    """Return the paths of the modules that are stored whole: the task head, and others that came with no weights."""
    heads = find_family(model.config.model_type).task_head
    found = [name for name in heads if isinstance(getattr(model, name, None), nn.Module)]
    for name in sorted(untrained):
        if name.split(".")[0] not in heads:
            module = name.split(".pooler.")[0] + ".pooler" if ".pooler." in name else name.rpartition(".")[0]
            found.append(module)
    return list(dict.fromkeys(found))


def _require_form(model: PreTrainedModel, run: Run) -> None:
    """Raise UserError if the run is no adapter of peft, with the reason for each of its modifications."""
    if run.unfreeze is not Unfreeze.none or not has_modification(run):
        what = "it trains parameters of the backbone" if run.unfreeze is not Unfreeze.none else "it adds no modules"
        raise UserError(
            f"method={run.method} has no form in peft: {what}; peftbench merge RUN --out FOLDER writes the whole "
            "model, which plain transformers loads."
        )
    found: dict[str, str] = {}
    forms: dict[str, str] = {}
    for module in model.modules():
        for name, child in module.named_children():
            if reason := _find_obstacle_of_child(child, model, run):
                found.setdefault(name, reason)
            elif isinstance(child, Prompt):
                forms[name] = "a prompt"
        before, after = list_edits_before(module), list_edits_after(module)
        for edit in before + after:
            name = next(path for path, child in module.named_modules() if child is edit).rpartition(".")[2]
            if reason := _find_obstacle(edit, module, edit in after):
                found.setdefault(name, reason)
            else:
                forms[name] = _name_form(edit)
        if before and after and not found:
            name = next(path for path, child in module.named_modules() if child is after[0]).rpartition(".")[2]
            found[name] = "another modification changes the input of the same projection"
    if found:
        why = "; ".join(found[n] if n == name_module("") else f"mix.{n}: {found[n]}" for n in sorted(found))
        raise UserError(f"method={run.method} has no form in peft: {why}.")
    if len(set(forms.values())) > 1 or list(forms.values()).count("a prompt") > 1:
        several = " and ".join(sorted(set(forms.values()))) if len(set(forms.values())) > 1 else "several prompts"
        raise UserError(f"method={run.method} has no form in peft: one adapter of peft cannot be {several}.")


def _find_obstacle_of_child(child: nn.Module, model: PreTrainedModel, run: Run) -> str | None:
    """Return why a module that is no edit has no form in peft; None if it has one, or is no modification."""
    if isinstance(child, HeadModification):
        return "it changes single heads inside the attention"
    if isinstance(child, Prefix) and not isinstance(child.function, PromptKeys):
        return (
            "its prefix vectors have no positions, and peft's prefixes shift the positions of the text, so that no "
            "prefix there computes the same"
        )
    return find_obstacle_of_prompt(child, model, run) if isinstance(child, Prompt) else None


def find_obstacle_of_prompt(prompt: Prompt, model: PreTrainedModel, run: Run) -> str | None:
    """Return why peft's prompts compute something else than a prompt of this model; None if they compute the same."""
    config = model.config
    if run.task.kind is not TaskKind.text_to_text:
        return "peft's task heads read other positions of a text after a prompt"
    if not isinstance(prompt, DecoderPrompt):
        relative = find_family(config.model_type).counts_keys
        return None if relative else "peft's prompts shift the positions of the text, ours do not"
    if not has_positions_below_zero(model.base_model):
        return "peft's prompts shift the positions of the text, ours do not"
    kinds = getattr(config, "layer_types", None) or ["full_attention" if _get_window(config) is None else "sliding"]
    if set(kinds) != {"full_attention"}:
        return "this backbone's attention has a window, which peft's prompts leave as the text grows, and ours do not"
    return None


def _get_window(config: Any) -> int | None:
    """Return how many tokens every attention of a backbone sees; None for all, or if layers differ."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


def _find_obstacle(edit: Edit, module: nn.Module, after: bool) -> str | None:
    """Return why an edit is neither LoRA nor IA3; None if it is one of them."""
    function, composition = edit.function, edit.composition
    if isinstance(composition, Gated):
        return "peft has no gate"
    if isinstance(function, OwnForm):
        return "peft has no such form"
    if isinstance(function, Constant):
        if not isinstance(composition, Multiply):
            return "peft has no vector that is added to a representation"
        return None if measure_projection(module) else f"it follows a {type(module).__name__}, and not a projection"
    if not isinstance(function.f, nn.Identity):
        return "its functional form is not linear"
    if not isinstance(function.norm_in, nn.Identity) or not isinstance(function.norm_out, nn.Identity):
        return "peft's LoRA has no LayerNorm"
    if not isinstance(composition, Add | Scaled):
        return "peft's LoRA is added, and does not multiply"
    if measure_projection(module) is None or not after or edit.insertion is not parallel or not edit.own_input:
        return "peft's LoRA reads the input of the projection whose output it changes, and this one does not"
    if function.up_bias is not None and module.bias is None:
        return "it has biases, and the projection has none that could take them"
    return None


def _name_form(edit: Edit) -> str:
    return IA3 if isinstance(edit.function, Constant) else LORA


def _list_edited(model: PreTrainedModel) -> list[_Edited]:
    found = []
    for name, module in model.named_modules():
        for at, edits in (("input", list_edits_before(module)), ("output", list_edits_after(module))):
            if edits:
                found.append(_Edited(name, module, edits, at))
    return found


TASK_TYPES = {
    TaskKind.classification: "SEQ_CLS",
    TaskKind.regression: "SEQ_CLS",
    TaskKind.token_classification: "TOKEN_CLS",
    TaskKind.question_answering: "QUESTION_ANS",
}


def _name_task(run: Run, model: PreTrainedModel) -> str:
    if run.task.kind is not TaskKind.text_to_text:
        return TASK_TYPES[run.task.kind]
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


# ---- LoRA ----


def _make_lora(
    model: PreTrainedModel, edited: list[_Edited], run: Run
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    scales = {_read_scale(edit) for one in edited for edit in one.edits}
    s = scales.pop() if len(scales) == 1 else None  # None: they differ or are learned, and are made part of B
    s, notes = (1.0, ("The scales s are a part of B: lora_alpha/r is 1.",)) if s is None else (s, ())
    inside = bool(notes)
    biased = any(_biases(edit) for one in edited for edit in one.edits)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for one in edited:
        down, up, bias = _join(one, inside)
        tensors[f"{ROOT}{one.name}.lora_A.weight"], tensors[f"{ROOT}{one.name}.lora_B.weight"] = down, up
        if biased:
            tensors[f"{ROOT}{one.name}.lora_B.bias"] = bias
        ranks[one.name] = len(down)
    r = Counter(ranks.values()).most_common(1)[0][0]
    names = [name for name, _ in model.named_modules()]
    other = {rank: [name for name in ranks if ranks[name] == rank] for rank in set(ranks.values()) - {r}}
    rank_pattern = {key: rank for rank, group in other.items() for key in shorten_names(group, names)}
    transposed = {type(one.module).__name__ == "Conv1D" for one in edited}
    config = {
        "peft_type": LORA,
        "r": r,
        "lora_alpha": s * r,
        "target_modules": shorten_names(ranks, names),
        "rank_pattern": rank_pattern,
        "alpha_pattern": {key: s * rank for key, rank in rank_pattern.items()},
        "lora_dropout": max(m.input_dropout for m in list_modifications(run).values()),
        "fan_in_fan_out": transposed == {True},
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        **({"lora_bias": True} if biased else {}),
    }
    return config, tensors, notes


def _read_scale(edit: Edit) -> float | None:
    """Return s of an edit, or None if it is learned."""
    scale = edit.composition.scale if isinstance(edit.composition, Scaled) else 1.0
    return None if isinstance(scale, nn.Parameter) else scale


def _biases(edit: Edit) -> bool:
    assert isinstance(edit.function, Bottleneck)
    return edit.function.up_bias is not None


def _join(one: _Edited, inside: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (r, in), B (out, r) and the bias (out,) of a projection's edits; with `inside`, B has the scales."""
    downs, ups, bias = [], [], torch.zeros(one.widths[1], device=_device(one))
    for edit in one.edits:
        function = edit.function
        assert isinstance(function, Bottleneck)
        down, up = (weight[0] for weight in function.weights())
        scale = edit.composition.scale if inside and isinstance(edit.composition, Scaled) else 1.0
        up = up * scale
        downs.append(down)
        ups.append(_spread(edit, up.T, one.widths[1]).T)
        if function.up_bias is not None and function.down_bias is not None:
            own = up @ function.down_bias[0, 0] + scale * function.up_bias[0, 0]
            bias = bias + _spread(edit, own, one.widths[1])
    return torch.cat(downs), torch.cat(ups, dim=1), bias


def _device(one: _Edited) -> torch.device:
    return next(one.edits[0].parameters()).device


def _spread(edit: Edit, columns: Tensor, width: int, fill: float = 0.0) -> Tensor:
    """Return columns (..., part) as columns of the whole projection (..., width), filled elsewhere."""
    if edit.part is None:
        return columns
    return edit.part.put(columns.new_full((*columns.shape[:-1], width), fill), columns)


# ---- IA3 and prompts ----


def _make_ia3(model: PreTrainedModel, edited: list[_Edited]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for one in edited:
        width = one.widths[1] if one.at == "output" else one.widths[0]
        vector = torch.ones(width, device=_device(one))
        for edit in one.edits:
            assert isinstance(edit.function, Constant)
            vector = vector * _spread(edit, 1 + edit.function.vector[0, 0], width, fill=1.0)
        tensors[f"{ROOT}{one.name}.ia3_l"] = vector.unsqueeze(1 if one.at == "output" else 0)
    names, targets = [name for name, _ in model.named_modules()], [one.name for one in edited]
    inner = [one.name for one in edited if one.at == "input"]
    ends = shorten_names(
        inner, names, lambda name, end: name.endswith(end) if name in targets else is_ending(name, end)
    )
    config = {
        "peft_type": IA3,
        "target_modules": [*shorten_names(set(targets) - set(inner), names), *ends],
        "feedforward_modules": ends,  # which peft matches without regard to dots
        "fan_in_fan_out": {type(one.module).__name__ == "Conv1D" for one in edited} == {True},
        "init_ia3_weights": True,
    }
    return config, tensors


def _make_prompt(model: PreTrainedModel, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (prompt,) = (module for module in model.modules() if isinstance(module, Prompt))
    length, width = prompt.vectors.shape
    config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,  # of an encoder-decoder, only the encoder has the prompt
        "num_attention_heads": model.config.num_attention_heads,
        "num_layers": model.config.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }
    return config, {"prompt_embeddings": prompt.vectors}


# ---- methods of peft ----


def _read_method(model: PreTrainedModel, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of the method of peft that is attached to a model."""
    config, tensors = make_peft_files(model, base)
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets := config.get("target_modules"), list):
        chosen = [name for name in names if any(is_ending(name, end) for end in targets)]
        config["target_modules"] = shorten_names(chosen, names)
    return config, tensors


# ---- names ----


def is_ending(name: str, end: str) -> bool:
    """Return whether peft's target `end` names the module at path `name`."""
    return name == end or name.endswith(f".{end}")


def shorten_names(
    wanted: Iterable[str], names: Iterable[str], matches: Callable[[str, str], bool] = is_ending
) -> list[str]:
    """Return the shortest ends of paths that match all `wanted` paths, and no other one of `names`: q_proj for all of
    them, if every q_proj is wanted."""
    chosen, left = set(wanted), set(wanted)
    others = [name for name in names if name not in chosen]
    ends: list[str] = []
    longest = max((name.count(".") + 1 for name in chosen), default=0)
    for parts in range(1, longest + 1):
        for end in sorted({".".join(name.split(".")[-parts:]) for name in left}):
            if not any(matches(name, end) for name in others):
                ends.append(end)
                left = {name for name in left if not matches(name, end)}
    return [*ends, *sorted(left)]


def describe_targets(config: Mapping[str, Any]) -> str:
    """Return what an adapter changes, for a person."""
    targets = config.get("target_modules")
    if targets is None:
        return f"{config['num_virtual_tokens']} vectors before the input"
    shown = [re.sub(r"^.*\.layers?\.", "", name) for name in targets]
    return ", ".join(dict.fromkeys(shown))
