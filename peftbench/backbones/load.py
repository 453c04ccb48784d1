"""Load the frozen backbone for a kind of task: a model and its tokenizer, from a local folder or the hub.

Everything that can be wrong with the place (no folder, no config, no network) is found before weights are read.
Counting uses the same model on the meta device, which has shapes and no weights.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import cached_file, logging

from peftbench.backbones.chat_template import choose_template, stop_at_turns
from peftbench.backbones.hub import explain_missing_hub
from peftbench.backbones.quantisation import (
    PACKED,
    choose_loading,
    find_format,
    make_quantisation,
    require_package,
    settle_quantised,
)
from peftbench.backbones.sites import find_family
from peftbench.backbones.special_tokens import settle
from peftbench.backbones.unpacking import CannotUnpack, unpack_backbone
from peftbench.config.schema import WITH_LABELS, DType, Model, Quantization, Task, TaskKind
from peftbench.utils.errors import UserError, is_memory_error, suggest
from peftbench.utils.files import expand_home, read_json

T = TypeVar("T")
# Files of a tokenizer; the first one contains all of it, whatever its class.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
BYTE_LEVEL = ("vocab.json", "merges.txt")  # neither can be used without the other
BRING = "put there what save_pretrained of the model's tokenizer writes."
# The Python files of a folder or a repository are never run, and transformers does not ask whether to.
OWN_CODE_ONLY = {"trust_remote_code": False}
# What transformers and torch raise for a config.json, or a tokenizer's files, that describe nothing.
NO_MODEL = (
    *(ValueError, TypeError, ZeroDivisionError, KeyError, AttributeError, IndexError, AssertionError),
    StrictDataclassError,
)
UNQUANTISED = "bring the unquantised model, with model.quantization=nf4 if it is large."
WEIGHTS = (".safetensors", ".bin")
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
NOWHERE = "model.hub_id and model.path are both null; give one, or take a preset such as model=mini."


@dataclass(frozen=True)
class Backbone:
    """A loaded model with its tokenizer.

    `untrained` contains the names of those parameters of its head for which there were no weights. `notes` contains a
    sentence for each disagreement between the backbone's files, with what was chosen. `quantization` is
    `model.quantization`, or the format of a place that is quantised already, even if its weights are unpacked now.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    untrained: frozenset[str]
    notes: tuple[str, ...] = ()
    quantization: str | None = None


def load_language_model(model: Model, task: Task, device: torch.device | None = None) -> Backbone:
    """Load the backbone with the language-modelling head of its own files, whatever the task's head is.

    Raises:
        UserError: as `load_backbone`; the architecture, or the files, have no such head.
    """
    config = load_config(model)
    if config.is_encoder_decoder or set(find_family(config.model_type).stacks) == {"decoder"}:
        plain = replace(task, kind=TaskKind.text_to_text, chat=False, messages_column=None, tools_column=None)
        return load_backbone(model, plain, device)
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise UserError(f"model={model.name} ({config.model_type}) has no language model in transformers.")
    return load_backbone(model, task, device, auto=AutoModelForMaskedLM)


def load_backbone(model: Model, task: Task, device: torch.device | None = None, *, auto: Any = None) -> Backbone:
    """Load the backbone for a task, on the CPU, in `model.dtype`, where `auto` means float32.

    One that bitsandbytes has packed, or packs, is loaded straight to `device`. The attention is transformers' default:
    SDPA, but eager for T5 in the versions that have no other.

    Args:
        auto: transformers' Auto class; None: that of the task.

    Raises:
        UserError: the place contains no model or no tokenizer, or cannot be reached; the architecture has no family or
            no head for the task; the weights are not those of the backbone that config.json describes.
    """
    source, options = _find_source(model)
    config = load_config(model)
    auto = auto or _choose_auto_class(model, task, config)
    tokenizer = load_tokenizer(model)
    dtype = torch.bfloat16 if model.dtype is DType.bfloat16 else torch.float32
    attention = _choose_attention(model, auto, config)
    form = "gguf" if "gguf_file" in options else _find_packing(model, config)
    packing = _plan_packing(model, task, config, form, dtype, device)
    loaded, report = _load_or_explain(
        model,
        lambda: auto.from_pretrained(
            source,
            **options,
            **packing,
            **({} if attention is None else {"attn_implementation": attention}),
            config=config,
            dtype=dtype,
            key_mapping=_rename_base(auto, config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a folder tuned for other labels: its head is initialised anew, and trained
        ),
        form,
    )
    untrained = _find_new_head(model, loaded, report)
    notes = settle(loaded, tokenizer, writes=task.kind is TaskKind.text_to_text)
    if packing:
        notes = [*_settle_packed(model, loaded, form, dtype, report["missing_keys"]), *notes]
    _require_start(model, loaded)
    if (template := choose_template(task, loaded, tokenizer)) is not None:
        stop_at_turns(loaded, template)
    _pad_on_the_right(loaded, tokenizer, task)
    named = model.quantization.name if model.quantization is not Quantization.none else form
    return Backbone(loaded, tokenizer, untrained, tuple(notes), named)


def _rename_base(auto: Any, config: PretrainedConfig) -> dict[str, str] | None:
    """Return how the tensors of a checkpoint are renamed if the class with the head calls the backbone otherwise than
    the others of its family do, as LlamaForQuestionAnswering does; None if it does not."""
    usual = AutoModel._model_mapping[type(config)].base_model_prefix
    own = auto._model_mapping[type(config)].base_model_prefix
    return None if own == usual or not usual else {rf"^{usual}\.": f"{own}."}


def _choose_attention(model: Model, auto: Any, config: PretrainedConfig) -> str | None:
    """Return how attention is computed: `model.attn_implementation`, or None, which leaves it to transformers.

    Raises:
        UserError: the backbone cannot have what was chosen. No weights are read before.
    """
    chosen = model.attn_implementation
    caps = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if caps and chosen == "sdpa":
        raise UserError(
            f"model.attn_implementation=sdpa: {config.model_type} caps its attention scores; sdpa cannot. Use eager."
        )
    if caps and chosen is None:
        return "eager"  # some versions of transformers take sdpa, and leave out the cap without a word
    if chosen is None:
        return None
    try:
        with torch.device("meta"):
            auto.from_config(deepcopy(config), attn_implementation=chosen)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"model.attn_implementation={chosen}: {' '.join(str(error).split())}") from error
    return chosen


def _find_packing(model: Model, config: PretrainedConfig) -> str | None:
    """Return the format in which the place is quantised already; None: it is not.

    Raises:
        UserError: it is not read, its package is missing, or the place is to be quantised once more.
    """
    form = find_format(config)
    if form is None:
        return None
    if model.quantization is not Quantization.none:
        raise UserError(
            f"model.quantization={model.quantization.name}: {_place(model)} is quantised already ({form}); leave "
            "model.quantization out."
        )
    require_package(_place(model), form)
    return form


def _plan_packing(
    model: Model,
    task: Task,
    config: PretrainedConfig,
    form: str | None,
    dtype: torch.dtype,
    device: torch.device | None,
) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a quantised backbone; none for another. `config` is changed.

    Raises:
        UserError: a package is missing, or the backbone has nothing to pack.
    """
    cpu = torch.device("cpu")
    if form is not None:
        # torchao has layouts for GPUs alone. What else is unpacked can be unpacked anywhere.
        placed = {"device_map": {"": device or cpu if form in (PACKED, "torchao") else cpu}}
        return {**placed, **choose_loading(config, form)}
    if model.quantization is Quantization.none:
        return {}
    bare = build_meta_backbone(model, task, config)
    return {"device_map": {"": device or cpu}, "quantization_config": make_quantisation(model, bare, dtype)}


def _settle_packed(
    model: Model, loaded: PreTrainedModel, form: str | None, dtype: torch.dtype, missing: Iterable[str]
) -> list[str]:
    """Unpack what does not stay packed while modifications are trained. Return what there is to say about it.

    Args:
        missing: names of tensors that came with no weights.

    Raises:
        UserError: it cannot be unpacked.
    """
    vars(loaded).pop("hf_device_map", None)  # it is on one device; accelerate refuses to train what it calls offloaded
    try:
        if form in (None, PACKED):
            settle_quantised(loaded, _place(model), dtype, tuple(missing))
            return []
        unpack_backbone(loaded, tuple(missing))
    except CannotUnpack as error:
        raise UserError(f"{_place(model)} is quantised as {form}: {error}; {UNQUANTISED}") from error
    return [
        f"{_place(model)} is quantised as {form}: its weights are unpacked to {str(dtype).removeprefix('torch.')}, and "
        "activations are not quantised."
    ]


# Tensors in old checkpoints that are not weights: positions, masks and frequencies, which are computed now.
_COMPUTED = (".position_ids", ".inv_freq", ".masked_bias", ".attn.bias")


def _find_new_head(model: Model, loaded: PreTrainedModel, report: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the parameters that were initialised anew: those of a head, which is to be trained.

    Args:
        report: transformers' report on the loading.

    Raises:
        UserError: other parameters were initialised anew, or the place contains weights of another backbone. Weights of
            the heads of other tasks are ignored.
    """

    def in_head(name: str) -> bool:  # includes the pooler, which a masked language model lacks
        return name.split(".")[0] in find_family(loaded.config.model_type).task_head or ".pooler." in f".{name}"

    def in_backbone(name: str) -> bool:
        return name.removeprefix(f"{loaded.base_model_prefix}.").split(".")[0] in parts

    parts = {name for name, _ in loaded.base_model.named_children()}
    missing, other_shapes = set(report["missing_keys"]), {entry[0]: entry[1:] for entry in report["mismatched_keys"]}
    absent = sorted(name for name in missing if not in_head(name))
    misshapen = sorted(name for name in other_shapes if not in_head(name))
    left_over = [name for name in report["unexpected_keys"] if not name.endswith(_COMPUTED)]
    if not absent:  # otherwise the message also names heads: they show what the place contains instead
        left_over = [name for name in left_over if in_backbone(name) and not in_head(name)]
    shapes = [
        f"{name}: {_format_shape(other_shapes[name][0])}, not {_format_shape(other_shapes[name][1])}"
        for name in misshapen
    ]
    found = [
        _describe_names(absent, "is missing", "are missing"),
        _describe_names(shapes, "has another shape", "have other shapes"),
        _describe_names(sorted(left_over), "has no place in it", "have no place in it"),
        *report.get("error_msgs", ()),
    ]
    if absent or misshapen or left_over or report.get("error_msgs"):
        raise UserError(
            f"{_place(model)} does not hold the weights of the backbone that its config.json describes: "
            f"{'; '.join(filter(None, found))}. Only a task head may be missing."
        )
    return frozenset({*missing, *other_shapes})


def _describe_names(names: Sequence[str], one: str, several: str) -> str:
    """Return the number of tensors with some of their names, or an empty text if there are none."""
    if not names:
        return ""
    listed = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
    return f"{len(names)} tensors {several} ({listed})" if len(names) > 1 else f"1 tensor {one} ({listed})"


def _format_shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _pad_on_the_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Put padding after a text, whatever the tokenizer prefers.

    Positions are counted from the first token, a decoder's mask is only the causal one, and a classifier on a decoder
    alone reads the last token that is not padding. `tasks.completion` pads a text that a decoder alone continues.
    """
    if task.kind is not TaskKind.text_to_text or model.config.is_encoder_decoder:
        tokenizer.padding_side = "right"


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `model.path` or `model.hub_id`.

    If files are missing, transformers may invent a vocabulary without words, or omit a part of the rules.

    Raises:
        UserError: it is missing, in whole or in part, or cannot be reached.
    """
    source, options = _find_source(model)

    def is_there(name: str) -> bool:
        lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        places = {key: value for key, value in options.items() if key not in (*OWN_CODE_ONLY, "gguf_file")}
        return cached_file(source, name, **places, **lenient) is not None

    try:
        places = _read_beside(source, options, VOCABULARIES)
        tokenizer: PreTrainedTokenizerBase = _load_or_explain(
            model, lambda: AutoTokenizer.from_pretrained(source, **places)
        )
    except UserError:
        _require_tokenizer_files(model, is_there)
        if not any(map(is_there, VOCABULARIES)):
            raise UserError(f"{_place(model)} has no tokenizer: {VOCABULARIES[0]} is missing; {BRING}") from None
        raise
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(model.chat_template)
    if "merges_file" in tokenizer.vocab_files_names:
        _require_tokenizer_files(model, is_there)
    if _has_words(tokenizer):
        return tokenizer
    parts = [name for key, name in tokenizer.vocab_files_names.items() if key != "tokenizer_file"]
    if not any(map(is_there, (VOCABULARIES[0], *parts))):
        names = f"{VOCABULARIES[0]} is missing, or in its place {' and '.join(parts)}"
        raise UserError(f"{_place(model)} has no tokenizer: {names}; {BRING}")
    raise UserError(
        f"{_place(model)} has a tokenizer whose vocabulary has only special tokens; put the files of the tokenizer "
        "with which the model was pretrained there."
    )


def _read_template(path: str) -> str:
    try:
        return expand_home(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template={path} cannot be read: {error}.") from error


def _require_tokenizer_files(model: Model, is_there: Callable[[str], bool]) -> None:
    """Raise a UserError if one of the two files of a byte-level tokenizer is missing."""
    missing = [name for name in BYTE_LEVEL if not is_there(name)]
    if len(missing) == 1 and not is_there(VOCABULARIES[0]):
        raise UserError(
            f"{_place(model)} has only part of a tokenizer: {missing[0]} or {VOCABULARIES[0]} is missing; {BRING}"
        )


def _has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the vocabulary has more than special tokens and the mark at the beginning of a word."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return bool(tokenizer.get_vocab().keys() - added - {*tokenizer.all_special_tokens, "\u2581"})


def build_meta_backbone(model: Model, task: Task, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """Return the model for a task on the meta device: modules and shapes, tied weights once, no weights, no network.

    It is built from `config`, by default from the config.json in `model.path`, or else from `model.architecture`.

    Raises:
        UserError: neither describes the model, or the architecture has no family or no head for the task.
    """
    logging.set_verbosity_error()  # it hints at generation settings, which a model without weights does not use
    if config is None:
        config = load_config(model) if model.path is not None else _build_described_config(model)
    config = deepcopy(config)  # the model changes its config
    auto = _choose_auto_class(model, task, config)
    try:
        with torch.device("meta"), no_init_weights():  # which takes longer than all the rest
            built: PreTrainedModel = auto.from_config(config)
    except NO_MODEL as error:
        place = "model.architecture" if model.path is None else f"model.path={model.path}"
        raise UserError(f"{place} describes no model that can be built: {' '.join(str(error).split())}") from error
    for module in reversed(list(built.modules())):  # without initialisation, transformers has tied nothing
        if isinstance(module, PreTrainedModel):
            module.tie_weights()
    if _is_untied(model):
        _untie_output(built)
    return built


def load_config(model: Model) -> PretrainedConfig:
    """Return the config.json of `model.path` or `model.hub_id`.

    Raises:
        UserError: there is none, or it cannot be reached.
    """
    source, options = _find_source(model)
    places = _read_beside(source, options, ["config.json"])
    config: PretrainedConfig = _load_or_explain(model, lambda: AutoConfig.from_pretrained(source, **places))
    return config


def _build_described_config(model: Model) -> PretrainedConfig:
    """Return the config that `model.architecture` specifies."""
    values = dict(model.architecture)
    described = values.pop("name_or_path", None)
    if not values and model.hub_id is None:
        raise UserError(NOWHERE)
    if not values or (None not in (described, model.hub_id) and described != model.hub_id):
        why = f"model.architecture is that of {described}" if values else "model.architecture is empty"
        raise UserError(
            f"How model.hub_id={model.hub_id} is built is not known without loading it: {why}. Give a folder with its "
            "config.json as model.path=FOLDER, or take a preset such as model=bart_large."
        )
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError("model.architecture has no model_type; give the one of the model's config.json, such as bart.")
    find_family(model_type)
    known = AutoConfig.for_model(model_type)
    if wrong := [key for key in values if not hasattr(known, key) and not _is_read(known, key)]:
        choices = known.to_dict()
        raise UserError(
            *(f"model.architecture.{key} is no key of {model_type}'s config{suggest(key, choices)}" for key in wrong)
        )
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.architecture does not fit {model_type}: {' '.join(str(error).split())}") from error


def _is_read(config: PretrainedConfig, key: str) -> bool:
    """Return whether the model's class reads a key that its config does not declare, such as DeBERTa's
    position_buckets."""
    module = AutoModel._model_mapping[type(config)].__module__
    return f'getattr(config, "{key}"' in inspect.getsource(importlib.import_module(module))


def _is_untied(model: Model) -> bool:
    """Return whether the config.json says that the output embedding has weights of its own.

    transformers' T5 configs drop that key and tie; weights that it then finds in a checkpoint, it keeps apart.
    """
    if model.path is None:
        return model.architecture.get("tie_word_embeddings") is False
    file = expand_home(model.path) / "config.json"
    if not file.exists():  # a GGUF file
        return False
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return said.get("tie_word_embeddings") is False


def _untie_output(model: PreTrainedModel) -> None:
    """Give the output layer of a model on the meta device a weight of its own, if it has that of the embedding."""
    output = model.get_output_embeddings()
    if isinstance(output, nn.Linear) and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(torch.empty_like(output.weight))


def _choose_auto_class(model: Model, task: Task, config: PretrainedConfig) -> Any:
    """Return transformers' Auto class with the head for the task; set the labels in a classifier's `config`.

    Raises:
        UserError: the architecture has no family, or cannot do the task.
    """
    find_family(config.model_type)
    if task.kind is not TaskKind.text_to_text:
        return _choose_head(model, task, config)
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if set(find_family(config.model_type).stacks) == {"decoder"}:
        return AutoModelForCausalLM
    raise UserError(
        f"task={task.name} writes text and model={model.name} is an encoder alone ({config.model_type}): take one with "
        "a decoder such as model=bart_large or model=mini."
    )


HEADS = {
    TaskKind.classification: (AutoModelForSequenceClassification, "a classifier"),
    TaskKind.regression: (AutoModelForSequenceClassification, "a classifier"),
    TaskKind.token_classification: (AutoModelForTokenClassification, "a classifier of tokens"),
    TaskKind.question_answering: (AutoModelForQuestionAnswering, "a head that finds answers"),
}


def _choose_head(model: Model, task: Task, config: PretrainedConfig) -> Any:
    """Return transformers' Auto class for a task with a head of its own; set the head's size and labels in `config`."""
    auto, name = HEADS[task.kind]
    # T5's classifier of tokens is its encoder alone
    lacks = task.kind is TaskKind.token_classification and config.is_encoder_decoder
    if lacks or type(config) not in auto._model_mapping:
        others = "an encoder such as model=roberta_base" if lacks else "a task that writes text, or another backbone"
        raise UserError(
            f"task={task.name} needs {name} and transformers has none on model={model.name} ({config.model_type}): "
            f"take {others}."
        )
    if task.kind in WITH_LABELS:
        if task.labels:  # empty if a budget is solved, before data is read; it does not depend on the size of the head
            config.num_labels = len(task.labels)
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: code for code, label in enumerate(task.labels)}
        config.problem_type = "single_label_classification"  # whatever the folder's own head was for
    elif task.kind is TaskKind.regression:
        config.num_labels = 1
        config.problem_type = "regression"
    else:
        config.num_labels = 2  # the scores of a token as the first and as the last one
    return auto


def _find_source(model: Model) -> tuple[str, dict[str, Any]]:
    """Return the place to load from, and options of `from_pretrained`."""
    if model.path is not None:
        folder = expand_home(model.path)
        if not folder.is_dir():
            raise UserError(f"model.path={model.path} is not a folder; give one with config.json and the weights.")
        packed = _find_gguf(model, folder)
        if packed is None and not (folder / "config.json").is_file():
            raise UserError(
                f"model.path={model.path} has no config.json; give a folder that save_pretrained wrote, with "
                "config.json, model.safetensors and the tokenizer's files."
            )
        _check_files(model, folder)
        only = {} if packed is None else {"gguf_file": packed}
        return str(folder), {"local_files_only": True, **OWN_CODE_ONLY, **only}
    if model.hub_id is None:
        raise UserError(NOWHERE)
    options: dict[str, Any] = {"revision": model.revision} if model.revision else {}
    return model.hub_id, {**options, **OWN_CODE_ONLY, "local_files_only": explain_missing_hub() is not None}


def _find_gguf(model: Model, folder: Path) -> str | None:
    """Return the name of the GGUF file of a folder without other weights; None: it has none, or has others.

    Raises:
        UserError: it has several, or its package is missing.
    """
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if not found or any(file.suffix in WEIGHTS for file in folder.iterdir()):
        return None
    if len(found) > 1:
        raise UserError(
            f"{_place(model)} has {len(found)} GGUF files ({', '.join(found[:3])}); give a folder with one."
        )
    require_package(_place(model), "gguf")
    return found[0]


def _read_beside(source: str, options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the options with which one of the files `names` is read if a GGUF file has it beside it: what a GGUF file
    says itself is read differently by versions of transformers."""
    if "gguf_file" in options and any((Path(source) / name).is_file() for name in names):
        return {key: value for key, value in options.items() if key != "gguf_file"}
    return options


def _check_files(model: Model, folder: Path) -> None:
    """Raise UserError for files in a folder that transformers would not understand, or would read in place of the
    backbone."""
    for name in JSON_FILES:
        if not (folder / name).exists():
            continue
        try:
            values = read_json(folder / name)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"model.path={model.path}: its {name} is damaged ({reason}).") from error
        if not isinstance(values, dict):
            raise UserError(f"model.path={model.path}: its {name} is damaged: it holds no object.")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"model.path={model.path} has an adapter of peft beside the weights (adapter_config.json), which would be "
            "loaded into them; merge it with peft's merge_and_unload and save that, or move its files elsewhere."
        )


def _require_start(model: Model, loaded: PreTrainedModel) -> None:
    """Raise UserError if an encoder-decoder does not say with which token its output begins."""
    if loaded.config.is_encoder_decoder and getattr(loaded.config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"{_place(model)}: decoder_start_token_id is missing in its config.json, the token with which what is "
            "written begins; for T5 it is the pad_token_id, for BART the eos_token_id."
        )


def _load_or_explain(model: Model, load: Callable[[], T], form: str | None = None) -> T:
    """Run `load`; turn transformers' error for a place without a model into one sentence.

    Args:
        form: in which the place is quantised, whose package may raise anything.
    """
    expected = (*NO_MODEL, OSError, ImportError, SafetensorError, RecursionError)
    try:
        return load()
    except Exception as error:
        if (form is None and not isinstance(error, expected)) or is_memory_error(error):
            raise
        if form == PACKED and _fails_to_initialise(error):
            raise UserError(
                f"{_place(model)} is quantised as {form} and has no weights of the task head, and transformers would "
                f"pack the new one, which has to be trained; {UNQUANTISED}"
            ) from error
        if form is not None:
            raise UserError(
                f"{_place(model)} is quantised as {form}, and transformers cannot load it here "
                f"({type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}); {UNQUANTISED}"
            ) from error
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{_place(model)} can only be read with Python code of its own (auto_map in its config.json), which "
                "peftbench never runs; take a backbone whose model_type transformers has."
            ) from error
        torn = isinstance(error, SafetensorError)
        if model.path is None and not torn and (reason := explain_missing_hub()):
            raise UserError(
                f"model.hub_id={model.hub_id} is not in this machine's cache and {reason}; bring its folder "
                "(config.json, model.safetensors, the tokenizer's files) and give it as model.path=FOLDER, set HF_HOME "
                "to a copy of the cache of a machine that has loaded it, or take the embedded model=mini."
            ) from error
        raise UserError(f"{_place(model)} cannot be loaded: {' '.join(str(error).split())}") from error


def _fails_to_initialise(error: Exception) -> bool:
    """Return whether torch says that it has no random numbers of a packed weight's type: those of new weights."""
    return isinstance(error, RuntimeError) and re.search("not implemented for '(Byte|Char)'", str(error)) is not None


def _place(model: Model) -> str:
    return f"model.hub_id={model.hub_id}" if model.path is None else f"model.path={model.path}"
