"""Adapters of other libraries as finished runs: the modifications that they are, their tensors, and their scores."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from peftbench.backbones.load import Backbone, build_meta_backbone, load_backbone, load_config
from peftbench.backbones.precision import choose_device, describe_device, resolve_dtype
from peftbench.config import schema
from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.config.idle import describe_idle
from peftbench.config.overrides import get_key
from peftbench.config.stamps import stamp_content
from peftbench.config.unread import IMPORT, explain_unread
from peftbench.config.validity import find_faults
from peftbench.evaluation.recording import record_counts, record_data, record_scores
from peftbench.exchange.export import compare_with_peft
from peftbench.exchange.foreign import ForeignAdapter, list_names
from peftbench.exchange.peft_form import find_obstacle_of_prompt
from peftbench.exchange.points import Cell, Piece, Placed, describe_adapter
from peftbench.modification.attach import attach_run
from peftbench.modification.functional_form import Bottleneck, Constant
from peftbench.modification.prompt import Prompt
from peftbench.modification.state import save
from peftbench.records.record import Record
from peftbench.records.recording import record_run
from peftbench.records.run_files import CHECKPOINTS
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.utils.errors import UserError
from peftbench.utils.files import expand_home
from peftbench.utils.progress import Display

GROUPS = ("task", "model", "trainer", "seed")
# The presets whose names an imported run can have, if it has their point; others are named by their kind.
PRESETS = {
    ("identity", "query_value"): "lora",
    ("identity", "ffn_weights"): "lora_ffn",
    ("identity", "all_linear"): "lora_all",
    ("softmax", "embedding"): "prompt",
}


@dataclass(frozen=True)
class Imported:
    """A run that was made of another library's files.

    Args:
        difference: the largest difference between peft's logits and ours; None if they were not compared.
    """

    record: Record
    difference: float | None


def compose_imported(adapter: ForeignAdapter, words: Sequence[str]) -> schema.Run:
    """Return the run of a command line, with the modifications that the adapter is.

    Args:
        words: overrides of the task, the model, the trainer and the seed. Without one of the model, the backbone is the
            one that the adapter's files name.

    Raises:
        UserError: a word is wrong, or the adapter has no form on the axes of this backbone.
    """
    keys = {word: get_key(word).split(".")[0] for word in words}
    if wrong := [word for word, group in keys.items() if group not in GROUPS]:
        instead = "import takes keys of task, model and trainer; the method is read from the file"
        raise UserError(*(f"{word}: {instead}." for word in wrong))
    unread = ((word, explain_unread(get_key(word), IMPORT)) for word in words)
    if idle := [describe_idle(word, why) for word, why in unread if why is not None]:
        raise UserError(*idle)
    found = list(words) if "model" in keys.values() else [*words, *_name_base(adapter)]
    run = compose_run(["method=lora", *found])
    unfreeze = schema.Unfreeze.bias if adapter.biases else schema.Unfreeze.none
    bare = build_meta_backbone(run.model, run.task, load_config(run.model))
    return _apply(replace(run, unfreeze=unfreeze), describe_adapter(bare, adapter))


def _name_base(adapter: ForeignAdapter) -> list[str]:
    """Return the words for the backbone that an adapter's files name."""
    base = adapter.base
    if base is not None and expand_home(base).is_dir():
        return [f"model.path={base}"]
    for file in sorted((schema.find_conf_dir() / "model").glob("*.yaml")):
        if base is not None and yaml.safe_load(file.read_text(encoding="utf-8")).get("hub_id") == base:
            return [f"model={file.stem}"]
    told = "does not name its backbone" if base is None else f"is for {base}, of which there is no preset"
    raise UserError(f"{adapter.source} {told}; give it by model.path=FOLDER, or by model=NAME model.hub_id=OWNER/NAME.")


def _apply(run: schema.Run, described: Placed) -> schema.Run:
    """Return the run with other modifications, and a method's name for them."""
    first = described.modifications[""]
    root = {item.name: getattr(first, item.name) for item in fields(schema.Modification)}
    mix = {prefix.split(".")[1]: m for prefix, m in described.modifications.items() if prefix}
    point = (first.functional_form.name, first.modified_representation.name.name)
    kind = "ia3" if point[0] == "constant" else "lora"
    run = replace(run, **root, mix=mix, size=None, sizes=None)
    run.method = kind if mix else PRESETS.get(point, kind)
    if found := find_faults(run):
        raise UserError(*found)
    return run


def import_adapter(
    adapter: ForeignAdapter,
    run: schema.Run,
    out: Path,
    words: Sequence[str],
    display: Display,
    folder: Path | None = None,
) -> Imported:
    """Write the run folder `out` of an adapter: its config, its tensors, its scores and its record.

    Args:
        run: of `compose_imported`.
        folder: of peft, with whose own logits ours are compared, if peft is installed. None: they are not compared.

    Raises:
        UserError: the files lack a tensor that the backbone has no weights for, or have one too many; the data cannot
            be read; or peft computes something else. Nothing is left in `out` then.
    """
    try:
        with record_run(run, out, words) as record:
            return _import(adapter, run, record, display, folder)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _import(
    adapter: ForeignAdapter, run: schema.Run, record: Record, display: Display, folder: Path | None
) -> Imported:
    with display:
        with display.stage("prepare"):
            loaded = load_task(run.task, training=False)
            placed = resolve_dtype(run)
            backbone = load_backbone(placed.model, loaded.task, choose_device(run.trainer))
            read, record.deviations = attach_run(backbone.model, placed, backbone.untrained)
            _require_equal_prompt(backbone.model, run)
            # again, because the meta backbone of `compose_imported` had no data's labels
            described = describe_adapter(build_meta_backbone(run.model, loaded.task, load_config(run.model)), adapter)
            put_tensors(backbone, adapter, described)
            record_counts(record, read, backbone)
        difference = None
        exact = placed.model.dtype is not schema.DType.bfloat16 and run.model.quantization is schema.Quantization.none
        if folder is not None and exact:
            with display.stage("compare with peft"):
                difference, _ = compare_with_peft(backbone, replace(placed, task=loaded.task), folder)
        save(backbone.model, record.folder / "adapter", backbone.untrained)
        record.adapter_bytes = sum(file.stat().st_size for file in (record.folder / "adapter").iterdir())
        data = prepare_data(loaded, backbone.tokenizer, backbone.model)
        record_data(record, data, backbone)
        for note in record.data["notes"]:
            display.say(note)
        device = choose_device(run.trainer)
        record.device = describe_device(device)
        backbone.model.to(device)
        (record.folder / CHECKPOINTS).mkdir()
        record_scores(placed, backbone.model.eval(), data, record, display)
        shutil.rmtree(record.folder / CHECKPOINTS)
        record.trainer = {}  # how it was trained is not known here
        record.notes.append(f"This run was not trained here: it is {adapter.source}.")
        # Not the name of the run that would be trained with this config.
        record.run, record.point = (
            hashlib.sha256(f"{name} {stamp_content(record.folder / 'adapter')}".encode()).hexdigest()[:8]
            for name in (hash_run(run), hash_run(replace(run, seed=0)))
        )
    return Imported(record, difference)


def _require_equal_prompt(model: PreTrainedModel, run: schema.Run) -> None:
    for module in model.modules():
        if isinstance(module, Prompt) and (why := find_obstacle_of_prompt(module, model, run)):
            raise UserError(f"A prompt of peft cannot be imported on {model.config.model_type}: {why}.")


@torch.no_grad()
def put_tensors(backbone: Backbone, adapter: ForeignAdapter, described: Placed) -> None:
    """Give a model, to which the described modifications are attached, the adapter's numbers.

    Raises:
        UserError: the adapter lacks a tensor that the backbone has no weights for, has one too many, or one of another
            shape.
    """
    model = backbone.model
    for prefix, pieces in described.pieces.items():
        for cell, piece in pieces.items():
            _put_piece(_find_function(model, cell, schema.name_module(prefix)), piece)
    if adapter.prompt is not None:
        (prompt,) = (module for module in model.modules() if isinstance(module, Prompt))
        if prompt.vectors.shape != adapter.prompt.shape:
            raise UserError(
                f"{adapter.source} has vectors of {adapter.prompt.shape[1]} numbers, and the backbone's have "
                f"{prompt.vectors.shape[1]}; give the backbone that it was trained on."
            )
        prompt.vectors.copy_(adapter.prompt)
    taken = set(_put_others(backbone, adapter))
    needed = {name for name in backbone.untrained if name not in taken}
    if adapter.biases:
        needed |= {name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")} - taken
        needed = {name for name in needed if ".modification." not in name}
    if needed:
        raise UserError(
            f"{adapter.source} has no {list_names(needed)}, for which the backbone has no weights either: it is an "
            "adapter for another task, or its task head was not saved."
        )


def _find_function(model: nn.Module, cell: Cell, name: str) -> nn.Module:
    path = ".".join(filter(None, (cell.path, cell.part, name, "function")))
    return model.get_submodule(path)


def _put_piece(function: nn.Module, piece: Piece) -> None:
    if isinstance(function, Constant):
        assert piece.vector is not None
        function.vector.copy_(piece.vector - 1)
        return
    assert isinstance(function, Bottleneck) and function.down is not None and function.up is not None
    assert piece.down is not None and piece.up is not None
    function.down.copy_(piece.down)
    function.up.copy_(piece.up)
    if function.up_bias is not None and piece.bias is not None:
        function.up_bias.copy_(piece.bias)


def _put_others(backbone: Backbone, adapter: ForeignAdapter) -> Iterator[str]:
    """Put the further tensors where the model has parameters that are trained; yield their names."""
    parameters = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    faults = []
    for given, tensor in adapter.others.items():
        name = next((n for n in (given, f"{backbone.model.base_model_prefix}.{given}") if n in parameters), None)
        if name is None:
            faults.append(given)
        elif parameters[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, and that of this task is {tuple(parameters[name].shape)}"
            raise UserError(f"{adapter.source}: {given} is {shapes}; give the task that the adapter was trained on.")
        else:
            parameters[name].copy_(tensor)
            yield name
    if faults:
        raise UserError(f"{adapter.source} has {list_names(faults)}, where the axes have no point.")
