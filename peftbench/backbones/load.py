"""The frozen backbone: a model and its tokenizer, from a local folder or the hub, for a kind of task.

Everything that can be wrong with the place (no folder, no config, no network) is found before weights are read.
For counting there is the same model on the meta device, which has shapes and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from peftbench.backbones.hub import hub_missing
from peftbench.backbones.sites import family_of
from peftbench.backbones.special_tokens import settle
from peftbench.config.schema import DType, Model, Task, TaskKind
from peftbench.utils.errors import UserError, meant

T = TypeVar("T")
# Files that hold a tokenizer; the first one holds all of it, whatever its class.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
BYTE_LEVEL = ("vocab.json", "merges.txt")  # of which neither is any use without the other
BRING = "put there what save_pretrained of the model's tokenizer writes."
NOWHERE = "model.hub_id and model.path are both null; give one, or take a preset such as model=mini."


@dataclass(frozen=True)
class Backbone:
    """A loaded model with its tokenizer. `untrained` names the parameters of its head that came with no weights, and
    `notes` says, a sentence each, where the files of the backbone differ and what was chosen."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    untrained: frozenset[str]
    notes: tuple[str, ...] = ()


def load_backbone(model: Model, task: Task) -> Backbone:
    """Load the backbone for a task, on the CPU, in `model.dtype`, where `auto` is float32.

    Its attention is what transformers takes by itself: SDPA, but eager for T5 in the versions that have no other.

    Raises:
        UserError: the place holds no model or no tokenizer, cannot be reached, or its architecture has no family or no
            such head; or its weights are not those of the backbone that its config.json describes.
    """
    source, options = _source(model)
    config = load_config(model)
    auto = _auto_class(model, task, config)
    tokenizer = load_tokenizer(model)
    loaded, report = _explained(
        model,
        lambda: auto.from_pretrained(
            source,
            **options,
            config=config,
            dtype=torch.bfloat16 if model.dtype is DType.bfloat16 else torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a folder tuned for other labels: its head is made anew, and trained
        ),
    )
    untrained = _new_head(model, loaded, report)
    notes = settle(loaded, tokenizer, writes=task.kind is TaskKind.text_to_text)
    _pad_on_the_right(loaded, tokenizer, task)
    return Backbone(loaded, tokenizer, untrained, tuple(notes))


# What old checkpoints have of a backbone that is no weight: positions, masks and frequencies, which are computed now.
_COMPUTED = (".position_ids", ".inv_freq", ".masked_bias", ".attn.bias")


def _new_head(model: Model, loaded: PreTrainedModel, report: Mapping[str, Any]) -> frozenset[str]:
    """The names of the parameters that were drawn anew: those of a head, which is to be trained.

    Args:
        report: what transformers says of the loading.

    Raises:
        UserError: others were drawn anew, or the place has weights of a backbone that is another one. What it has of
            the heads of other tasks is passed over.
    """

    def in_head(name: str) -> bool:  # the pooler, which a masked language model lacks, is one of the classifier's
        return name.split(".")[0] in family_of(loaded.config.model_type).task_head or ".pooler." in f".{name}"

    def in_backbone(name: str) -> bool:
        return name.removeprefix(f"{loaded.base_model_prefix}.").split(".")[0] in parts

    parts = {name for name, _ in loaded.base_model.named_children()}
    missing, other_shapes = set(report["missing_keys"]), {entry[0]: entry[1:] for entry in report["mismatched_keys"]}
    absent = sorted(name for name in missing if not in_head(name))
    misshapen = sorted(name for name in other_shapes if not in_head(name))
    left_over = [name for name in report["unexpected_keys"] if not name.endswith(_COMPUTED)]
    if not absent:  # else it tells most what the place has in their stead
        left_over = [name for name in left_over if in_backbone(name) and not in_head(name)]
    shapes = [f"{name}: {_shape(other_shapes[name][0])}, not {_shape(other_shapes[name][1])}" for name in misshapen]
    found = [
        _counted(absent, "is missing", "are missing"),
        _counted(shapes, "has another shape", "have other shapes"),
        _counted(sorted(left_over), "has no place in it", "have no place in it"),
        *report.get("error_msgs", ()),
    ]
    if absent or misshapen or left_over or report.get("error_msgs"):
        raise UserError(
            f"{_place(model)} does not hold the weights of the backbone that its config.json describes: "
            f"{'; '.join(filter(None, found))}. Nothing but a task head is made anew."
        )
    return frozenset({*missing, *other_shapes})


def _counted(names: Sequence[str], one: str, several: str) -> str:
    """How many tensors there are, and some names; nothing without any."""
    if not names:
        return ""
    listed = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
    return f"{len(names)} tensors {several} ({listed})" if len(names) > 1 else f"1 tensor {one} ({listed})"


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _pad_on_the_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Padding comes after a text, whatever the tokenizer prefers: positions are counted from the first token on, a
    decoder's mask is the causal one alone, and a classifier on a decoder alone reads the last token that is no padding.
    A text that a decoder alone goes on with is padded by `tasks.completion`.
    """
    if task.kind is not TaskKind.text_to_text or model.config.is_encoder_decoder:
        tokenizer.padding_side = "right"


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path` or `model.hub_id`.

    Of files that are missing transformers may make up a vocabulary without words, or leave a part of the rules out.

    Raises:
        UserError: it is missing, in whole or in part, or cannot be reached.
    """
    source, options = _source(model)

    def is_there(name: str) -> bool:
        lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        return cached_file(source, name, **options, **lenient) is not None

    try:
        tokenizer: PreTrainedTokenizerBase = _explained(model, lambda: AutoTokenizer.from_pretrained(source, **options))
    except UserError:
        _whole(model, is_there)
        if not any(map(is_there, VOCABULARIES)):
            raise UserError(f"{_place(model)} has no tokenizer: {VOCABULARIES[0]} is missing; {BRING}") from None
        raise
    if "merges_file" in tokenizer.vocab_files_names:
        _whole(model, is_there)
    if _has_words(tokenizer):
        return tokenizer
    parts = [name for key, name in tokenizer.vocab_files_names.items() if key != "tokenizer_file"]
    if not any(map(is_there, (VOCABULARIES[0], *parts))):
        names = f"{VOCABULARIES[0]} is missing, or in its place {' and '.join(parts)}"
        raise UserError(f"{_place(model)} has no tokenizer: {names}; {BRING}")
    raise UserError(
        f"{_place(model)} has a tokenizer whose vocabulary is special tokens alone; put the files of the one that the "
        "model was pretrained with there."
    )


def _whole(model: Model, is_there: Callable[[str], bool]) -> None:
    """Raises UserError where one of the two files of a byte-level tokenizer is missing."""
    missing = [name for name in BYTE_LEVEL if not is_there(name)]
    if len(missing) == 1 and not is_there(VOCABULARIES[0]):
        raise UserError(
            f"{_place(model)} has a part of a tokenizer: {missing[0]} or {VOCABULARIES[0]} is missing; {BRING}"
        )


def _has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabulary has more than special tokens and the mark of a word's beginning."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return bool(tokenizer.get_vocab().keys() - added - {*tokenizer.all_special_tokens, "\u2581"})


def meta_backbone(model: Model, task: Task, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """The model for a task on the meta device: modules and shapes, tied weights once, no weights, no network.

    It is built from `config`, by default from the config.json in `model.path`, or else from `model.architecture`.

    Raises:
        UserError: neither says how the model is built, or the architecture has no family or no such head.
    """
    logging.set_verbosity_error()  # hints on generation settings, which nothing uses of a model without weights
    if config is None:
        config = load_config(model) if model.path is not None else _described(model)
    config = deepcopy(config)  # the model writes in its own
    auto = _auto_class(model, task, config)
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        place = "model.architecture" if model.path is None else f"model.path={model.path}"
        raise UserError(f"{place} describes no model that can be built: {' '.join(str(error).split())}") from error


def load_config(model: Model) -> PretrainedConfig:
    """The config.json of `model.path` or `model.hub_id`.

    Raises:
        UserError: there is none, or it cannot be reached.
    """
    source, options = _source(model)
    config: PretrainedConfig = _explained(model, lambda: AutoConfig.from_pretrained(source, **options))
    return config


def _described(model: Model) -> PretrainedConfig:
    """The config that `model.architecture` spells out."""
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
    family_of(model_type)
    known = AutoConfig.for_model(model_type)
    if wrong := [key for key in values if not hasattr(known, key)]:
        choices = known.to_dict()
        raise UserError(
            *(f"model.architecture.{key} is no key of {model_type}'s config{meant(key, choices)}" for key in wrong)
        )
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.architecture does not fit {model_type}: {' '.join(str(error).split())}") from error


def _auto_class(model: Model, task: Task, config: PretrainedConfig) -> Any:
    """Which of transformers' Auto classes has the head for the task; a classifier's `config` is told the labels.

    Raises:
        UserError: the architecture has no family, or cannot do the task.
    """
    family_of(config.model_type)
    if task.kind is TaskKind.classification:
        if task.labels:  # none: a budget is solved before data is read, whatever the size of the head
            config.num_labels = len(task.labels)
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: code for code, label in enumerate(task.labels)}
        return AutoModelForSequenceClassification
    if task.kind is TaskKind.regression:
        config.num_labels = 1
        config.problem_type = "regression"
        return AutoModelForSequenceClassification
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if set(family_of(config.model_type).stacks) == {"decoder"}:
        return AutoModelForCausalLM
    raise UserError(
        f"task={task.name} writes text and model={model.name} is an encoder alone ({config.model_type}): take one with "
        "a decoder such as model=bart_large or model=mini."
    )


def _source(model: Model) -> tuple[str, dict[str, Any]]:
    """Where to load from, and with which options of `from_pretrained`."""
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if not folder.is_dir():
            raise UserError(f"model.path={model.path} is no folder; give one with config.json and the weights.")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.path={model.path} has no config.json; give a folder that save_pretrained wrote, with "
                "config.json, model.safetensors and the tokenizer's files."
            )
        return str(folder), {"local_files_only": True}
    if model.hub_id is None:
        raise UserError(NOWHERE)
    options: dict[str, Any] = {"revision": model.revision} if model.revision else {}
    return model.hub_id, {**options, "local_files_only": hub_missing() is not None}


def _explained(model: Model, load: Callable[[], T]) -> T:
    """Run `load`; what transformers says of a place that holds no model becomes one sentence."""
    try:
        return load()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        torn = isinstance(error, SafetensorError)
        if model.path is None and not torn and (reason := hub_missing()):
            raise UserError(
                f"model.hub_id={model.hub_id} is not in this machine's cache and {reason}; bring its folder "
                "(config.json, model.safetensors, the tokenizer's files) and give it as model.path=FOLDER, set HF_HOME "
                "to a copy of the cache of a machine that has loaded it, or take the embedded model=mini."
            ) from error
        raise UserError(f"{_place(model)} cannot be loaded: {' '.join(str(error).split())}") from error


def _place(model: Model) -> str:
    return f"model.hub_id={model.hub_id}" if model.path is None else f"model.path={model.path}"
