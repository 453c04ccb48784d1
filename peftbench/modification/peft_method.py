"""Methods of the peft library: attach one to a backbone, list what it added, merge it.

peft puts its layers in the place of the projections that a run names; the model stays a transformers model of its own
class, so that training, evaluation and saving are those of our modifications. What peft creates at random, among it
frozen matrices that some methods multiply by, comes from the run's seed: attaching again gives the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftbench.backbones.sites import Layer, find_sites
from peftbench.config.peft_methods import (
    TYPE,
    find_alpha_key,
    find_dropout_key,
    get_method,
    list_options,
    name_library_type,
)
from peftbench.config.schema import Composition, Run
from peftbench.modification.representation import REPRESENTATIONS, choose_sites
from peftbench.utils.errors import UserError

ADAPTER = "default"  # peft's name of the one adapter of a model
ADDED = "peft_added"  # an attribute of the model: the names of the tensors that peft added


def attach_peft(model: PreTrainedModel, run: Run) -> None:
    """Put the layers of the run's peft method into `model`, in place; what was trainable before stays so.

    Raises:
        UserError: peft refuses the method on this backbone, or the representation is not a projection there.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    typed = f"peft.type={run.peft[TYPE]}"
    on_meta = model.device.type == "meta"
    settings = build_settings(model, run, measuring=on_meta)
    before = set(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices):
            warnings.simplefilter("ignore")  # on layouts, which peft then sets right
            torch.manual_seed(run.seed)
            _inject(tuner, model, settings)
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{typed} on {model.config.model_type}: peft says: {' '.join(str(error).split())}") from error
    added = (name for name in _list_stored(model) if name.replace(".base_layer.", ".") not in before)
    vars(model)[ADDED] = frozenset(added)
    _check_places(model, typed)
    for name, parameter in model.named_parameters():
        if name.replace(".base_layer.", ".") in trained:
            parameter.requires_grad_(True)
    _compute_in_float32(model)


def _inject(tuner: Any, model: PreTrainedModel, settings: Any) -> None:
    if model.device.type != "meta":
        tuner(model, settings, adapter_name=ADAPTER)
        return
    try:
        with torch.device("meta"):
            tuner(model, settings, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except (RuntimeError, NotImplementedError):  # it looks at values, which memory that is never read can stand for
        for module in [module for module in model.modules() if hasattr(module, "base_layer")]:
            module.requires_grad_(False)
        if any(hasattr(module, "base_layer") for module in model.modules()):
            raise
        model.to_empty(device="cpu")
        tuner(model, settings, adapter_name=ADAPTER)
        model.to("meta")


def build_settings(model: PreTrainedModel, run: Run, *, measuring: bool = False) -> Any:
    """Return peft's config of a run's method.

    Args:
        measuring: the model has no weights: leave out an initialisation that would decompose them.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    method, library_type = get_method(run), name_library_type(run)
    options = list_options(library_type)
    values = {**method.settings, **{key: value for key, value in run.peft.items() if key != TYPE}}
    if run.bottleneck is not None and method.size:
        values[method.size] = run.bottleneck
    if library_type == "ADALORA":
        _set_adaptive_ranks(values, options)
    alpha, rank = find_alpha_key(options), values.get("init_r", run.bottleneck)
    if alpha is not None and alpha not in values and rank and run.composition_function.name is Composition.scaled:
        product = run.composition_function.scale * rank
        values[alpha] = round(product) if product == round(product) else product
    if (dropout := find_dropout_key(options, library_type)) is not None and dropout not in values:
        values[dropout] = run.input_dropout
    if "target_modules" not in values and "target_modules" in options:
        values["target_modules"] = _list_targets(model, run)
    if "random_seed" in options:  # of places that no file holds
        values.setdefault("random_seed", run.seed)
    if library_type == "IA3":
        values.setdefault("feedforward_modules", [])
    if measuring and "init_lora_weights" in values:
        values["init_lora_weights"] = True
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[library_type]](**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft.type={run.peft[TYPE]}: peft says: {' '.join(str(error).split())}") from error


def _set_adaptive_ranks(values: dict[str, Any], options: dict[str, Any]) -> None:
    """AdaLoRA starts with more than the target rank, 1.5 times it as in its paper, and prunes to the target."""
    rank = values.pop("r", None)
    if rank is not None:
        values["target_r"] = rank
        values.setdefault("init_r", -(-3 * rank // 2))
    ends = (values.get(key, options[key]) for key in ("tinit", "tfinal"))
    values["total_step"] = sum(ends) + 1  # the number of steps is known only when it is trained


def _list_targets(model: PreTrainedModel, run: Run) -> list[str] | None:
    """Return the paths of the projections that `modified_representation` names; None: peft's own choice.

    Raises:
        UserError: a projection is only a part of a module, which peft changes as a whole.
    """
    name = run.modified_representation.name.name
    if name == "none":
        return None
    sites = find_sites(model)
    names = {module: path for path, module in model.named_modules()}
    found: dict[str, set[str]] = {}
    whole: dict[str, set[str]] = {}
    for layer, attentions in choose_sites(sites, run, ""):
        for place in REPRESENTATIONS[name](layer, attentions):
            path = names[place.target]
            found.setdefault(path, set())
            if place.part is not None:
                found[path].add(place.part.name)
                whole[path] = _list_parts(layer, place.target)
    for path, parts in found.items():
        if path in whole and parts != whole[path]:
            last = path.rpartition(".")[2]
            raise UserError(
                f"modified_representation={name} with peft.type={run.peft[TYPE]}: {model.config.model_type} computes "
                f"{', '.join(sorted(whole[path]))} by one projection, {last}, which peft changes as a whole; use "
                f"peft.target_modules=[{last}], or modified_representation=all_linear."
            )
    return list(found)


def _list_parts(layer: Layer, module: nn.Module) -> set[str]:
    """Return the names of all parts that one module computes."""
    parts = {name for attention in layer.attentions for name in attention.parts if getattr(attention, name) is module}
    if layer.dense is not None:
        parts |= {name for name in layer.dense.parts if layer.dense.first.get(name) is module}
    return parts


def _check_places(model: PreTrainedModel, typed: str) -> None:
    added = [name for name in vars(model)[ADDED] if name in dict(model.named_parameters())]
    if not any(model.get_parameter(name).requires_grad for name in added):
        raise UserError(f"{typed} adds nothing to train to {model.config.model_type}; name other peft.target_modules.")
    factors = {len(model.get_parameter(name)) for name in added if ".boft_R." in name}
    if factors and factors != {typed_factors := get_settings(model).boft_n_butterfly_factor}:
        raise UserError(
            f"peft.boft_n_butterfly_factor={typed_factors}: peft has more than one factor only with its CUDA "
            "extension, which needs a GPU, nvcc and ninja; use peft.boft_n_butterfly_factor=1."
        )
    heads = find_sites(model).family.task_head
    if wrong := next((name for name in sorted(added) if name.split(".")[0] in heads), None):
        raise UserError(f"{typed} would modify the task head ({wrong}), which is trained itself; leave it out.")


def _compute_in_float32(model: PreTrainedModel) -> None:
    """Keep in float32 what peft added, next to a bfloat16 backbone; its layers cast their inputs."""
    for name in vars(model)[ADDED]:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            tensor.data = tensor.data.float()


def _list_stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers, each once."""
    kept = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def list_added(model: nn.Module) -> dict[str, Tensor]:
    """Return what peft added to a model, by name: what is trained, and what is frozen beside it."""
    names: Collection[str] = vars(model).get(ADDED, ())
    return {name: tensor for name, tensor in _list_stored(model).items() if name in names} if names else {}


class PeftPlace(NamedTuple):
    """What peft added at one module."""

    name: str  # path of the module; "" for what several modules share
    tensors: dict[str, tuple[int, ...]]  # trained tensors, by peft's names without the adapter's


def list_peft_places(model: PreTrainedModel) -> Iterator[PeftPlace]:
    """Yield the trained tensors of each module that peft changed, in the order of the model."""
    layers = {path for path, module in model.named_modules() if hasattr(module, "base_layer")}
    places: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in list_added(model).items():
        if not tensor.requires_grad:
            continue
        owner = name
        while owner and owner not in layers:
            owner = owner.rpartition(".")[0]
        rest = name.removeprefix(f"{owner}.").replace(f".{ADAPTER}", "")
        places.setdefault(owner, {})[rest] = tuple(tensor.shape)
    for owner, tensors in places.items():
        yield PeftPlace(owner, tensors)


def get_settings(model: nn.Module) -> Any:
    """Return peft's config of the method that is attached to a model, or None."""
    return vars(model).get("peft_config", {}).get(ADAPTER) if vars(model).get(ADDED) else None


def find_peft_obstacle(model: nn.Module) -> str | None:
    """Return why the layers of peft cannot be merged into the weights, or None if they can be or there are none."""
    for module in model.modules():
        if hasattr(module, "base_layer") and not hasattr(module, "get_delta_weight") and not hasattr(module, "merge"):
            return f"peft's {type(module).__name__} has no merged form"
    return None


@torch.no_grad()
def merge_peft(model: nn.Module) -> float:
    """Put what peft added into the weights of the backbone, and its own modules back; return the relative rounding
    error, as `modification.merge.merge` does. It is computed in float64 and rounded once."""
    lost, changed = 0.0, 0.0
    for path, module in [(path, module) for path, module in model.named_modules() if hasattr(module, "base_layer")]:
        layer: Any = module
        before = layer.get_base_layer().weight.detach().clone()
        layer.double().merge(safe_merge=True)
        plain = layer.get_base_layer()
        exact = plain.weight.detach()
        plain.to(before.dtype)
        changed += float((exact - before.double()).square().sum())
        lost += float((exact - plain.weight.double()).square().sum())
        model.set_submodule(path, plain)
    vars(model).pop(ADDED, None)
    vars(model).pop("peft_config", None)
    return (lost / changed) ** 0.5 if changed else 0.0
