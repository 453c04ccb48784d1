"""Load a finished run: its model with the adapter, and its scores on any split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.backbones.load import Backbone, load_backbone
from peftbench.backbones.precision import choose_device, resolve_dtype
from peftbench.backbones.unpacking import unpack_backbone
from peftbench.config.idle import describe_idle
from peftbench.config.overrides import FILES, apply_override, describe_error, parse_overrides, quote_path
from peftbench.config.own_parts import FORM, METRIC, TASK
from peftbench.config.roles import assign_roles, is_reported, list_splits
from peftbench.config.schema import Run, Task, has_modification, list_files, list_task_files, resolve_config
from peftbench.config.stamps import stamp_content
from peftbench.config.unread import EVALUATE, LOAD_RUN, find_unread_keys
from peftbench.config.validity import find_faults
from peftbench.evaluation.evaluator import Evaluator
from peftbench.modification.attach import attach_run
from peftbench.modification.merge import find_obstacles
from peftbench.modification.state import FILE_NAME
from peftbench.modification.state import load as load_adapter
from peftbench.records.earlier import check_backbone
from peftbench.records.record import Record, find_record
from peftbench.records.recording import describe_changed_code
from peftbench.records.saved import find_run_folder, read_saved_config, read_saved_record
from peftbench.tasks.load import list_dealt, load_task, restrict_to_reported
from peftbench.tasks.prepare import prepare_data
from peftbench.utils.errors import UserError, describe_unknown, warn
from peftbench.utils.files import expand_home, write_lines
from peftbench.utils.progress import Display
from peftbench.utils.quiet import silence_libraries

GROUPS = ("task", "trainer", "model")  # may be changed, and the run is still the same


def read_changed_run(folder: Path, record: Record, overrides: Sequence[str]) -> Run:
    """Return the run that is stored in `folder`, with overrides, which are checked as `peftbench train` checks them.

    Of the run's own files, those that will be read must exist.
    """
    run = _override_run(folder, record, overrides, EVALUATE)
    task = restrict_to_reported(set_saved_labels(run.task, record), list_dealt(read_trained_task(folder)))
    if found := [*_find_unread_files(overrides, task), *find_faults(replace(run, task=task))]:
        raise UserError(*found)
    return run


def _find_unread_files(overrides: Sequence[str], task: Task) -> Iterator[str]:
    """Yield a sentence for each file that was typed and is of a split that is not scored."""
    read = {file for files in list_task_files(task).values() for file in files}
    for typed, override in zip(overrides, parse_overrides(list(map(quote_path, overrides))), strict=True):
        key = override.key_or_group
        if key not in FILES and not key.startswith("task.data_files."):
            continue
        if (named := list_files(override.value())) and not read & {*named}:
            scored = ", ".join(split for role, (split, _) in assign_roles(task).items() if is_reported(role))
            yield describe_idle(typed, f"where {scored} is scored, and no other split; leave it out")


def read_saved_run(folder: Path, record: Record, overrides: Sequence[str] = (), command: str = LOAD_RUN) -> Run:
    """Return the same as `read_changed_run`, with the labels that the data had.

    Only the backbone must exist; the data may have been deleted.

    Args:
        command: what reads the run (`config.unread`): it is refused a key that it would not read.
    """
    run = _override_run(folder, record, overrides, command)
    run.task = set_saved_labels(run.task, record)
    return run


def _override_run(folder: Path, record: Record, overrides: Sequence[str], command: str) -> Run:
    config = read_saved_config(folder)
    parsed = parse_overrides(
        [re.sub(r"^task\.split=", "task.report_split=", quote_path(override)) for override in overrides]
    )
    found = []
    for typed, override in zip(overrides, parsed, strict=True):
        if override.key_or_group.split(".")[0] not in GROUPS or "." not in override.key_or_group:
            keys = ", ".join(f"{group}.KEY" for group in GROUPS)
            found.append(f"{override.input_line}: a saved run takes {keys} only, such as task.split=test.")
        elif override.is_delete():
            found.append(f"{typed}: a saved run loses no key; give it another value.")
        elif override.is_sweep_override():
            found.append(f"{typed} names several values, and a saved run takes one; type a line for each of them.")
        elif sentence := apply_override(config, override):
            is_split = typed.startswith("task.split=")
            found.append(sentence.replace("task.report_split", "task.split") if is_split else sentence)
    if found:
        raise UserError(*found)
    try:
        run = resolve_config(config)
    except OmegaConfBaseException as error:  # what was typed refers to something else
        raise UserError(describe_error(error)) from error
    given = zip(overrides, (override.key_or_group for override in parsed), strict=True)
    if unread := list(find_unread_keys(given, run, command)):
        raise UserError(*unread)
    run.task = _report_on(run.task, read_trained_task(folder))
    if run.model.path and not expand_home(run.model.path).is_dir():
        raise UserError(f"model.path={run.model.path} is not a folder; give the path of an existing one.")
    check_backbone(run, record)
    if "labels" in record.data and run.task.labels not in ([], record.data["labels"]):
        raise UserError(
            f"task.labels=[{','.join(run.task.labels)}]: the run was trained on the labels "
            f"{', '.join(record.data['labels'])}, in this order; leave task.labels out."
        )
    return run


def set_saved_labels(task: Task, record: Record) -> Task:
    """Return the task with the labels that the run was trained on, if it names none."""
    return replace(task, labels=task.labels or record.data.get("labels", []))


def read_trained_task(folder: Path) -> Task:
    """Return the task of the run in `folder` as it was trained."""
    task = OmegaConf.to_object(read_saved_config(folder).task)
    assert isinstance(task, Task)
    return task


def _report_on(task: Task, trained: Task) -> Task:
    """Return the task, whose files belong to the same splits as before even if another split is reported on now.

    Files of splits that the task no longer has are left out.
    """
    gone = set(list_splits(trained)) - set(list_splits(task))
    task = replace(task, data_files={split: file for split, file in task.data_files.items() if split not in gone})
    if task.report_split == trained.report_split:
        return task
    files = list_task_files(replace(task, report_split=trained.report_split))
    known = list(dict.fromkeys([*list_splits(trained), *files]))
    if files and not any((task.data_dir, task.packages, task.hub_id)) and task.report_split not in known:
        raise UserError(describe_unknown("task.split", task.report_split, known))
    # Only task.test_file now belongs to another split. The other files keep the keys by which messages name them,
    # because a value that is given for a key in a message must take precedence.
    moved = {} if task.test_file is None else {trained.report_split: task.test_file}
    files = {split: file for split, file in {**task.data_files, **moved}.items() if split in list_splits(task)}
    return replace(task, data_files=files, test_file=None)


def restore_backbone(
    folder: Path, run: Run, task: Task, device: torch.device | None = None, *, unpacked: bool = False
) -> Backbone:
    """Return the backbone of the run in `folder` with its adapter; `task` is the run's, with the data's labels.

    Args:
        device: where a quantised backbone is packed, see `load_backbone`.
        unpacked: give a quantised backbone weights that are no longer packed, with the values that the packed ones had.
    """
    backbone = load_backbone(run.model, task, device)
    if unpacked:
        unpack_backbone(backbone.model)
    attach_run(backbone.model, run, backbone.untrained)
    record = find_record(folder)
    if record is not None:
        _check_adapter(folder, record)
        for sentence in describe_changed_code(run, record, FORM):
            warn(sentence)
    load_adapter(backbone.model, folder / "adapter", backbone.untrained)
    return backbone


def _check_adapter(folder: Path, record: Record) -> None:
    """Raise UserError if the trained tensors of the run in `folder` are not those that it stored. Records of earlier
    versions do not say."""
    file = folder / "adapter" / FILE_NAME
    if record.adapter_stamp is None or not file.is_file():
        return
    if stamp_content(file.parent) != record.adapter_stamp:
        raise UserError(
            f"{file} is not as the run stored it; restore the file, or train the run again with rerun=true."
        )


def read_otherwise(before: dict[str, Any], reading: dict[str, Any]) -> str | None:
    """Return a sentence if texts were read in another way when the run was trained; `before` is its record's `data`."""
    now, then = (
        {key: value for key, value in of.items() if key != "cut_targets"} for of in (reading, before.get("reading", {}))
    )
    if now == then:
        return None
    told = ", ".join(f"{key} {json.dumps(value)}" for key, value in sorted((now | then).items()))
    return (
        f"The run was trained on texts that were read in another way ({told}): its score is another one now; train it "
        "again."
    )


def evaluate_run(folder: Path, run: Run, console: Console, predictions: Path | None = None) -> list[dict[str, Any]]:
    """Return the scores of each split, in the form of `rescore`.

    Args:
        predictions: the file to which the predictions on the report split are written. Texts that were written to
            FILE.partial before the command was interrupted are not generated again.
    """
    found: list[dict[str, Any]] = []
    with Display(console) as display:
        with display.stage("prepare"):
            dealt, labels = list_dealt(read_trained_task(folder)), read_saved_record(folder).data.get("labels", [])
            loaded = load_task(run.task, training=False, dealt=dealt, labels=labels)
            run = resolve_dtype(run)
            backbone = restore_backbone(folder, run, loaded.task, choose_device(run.trainer))
            data = prepare_data(loaded, backbone.tokenizer, backbone.model)
            backbone.model.to(choose_device(run.trainer))
            evaluator = Evaluator(backbone.model, data, run)
        record = read_saved_record(folder)
        changed = [line for key in (TASK, METRIC) for line in describe_changed_code(run, record, key)]
        for note in (*backbone.notes, *data.notes, *changed):
            display.console.print(note, highlight=False, soft_wrap=True)
        before = record.data
        if other := read_otherwise(before, data.reading()):
            display.console.print(other, highlight=False, soft_wrap=True)
        if before["splits"]["report"] == data.splits["report"] and before["scored_on"] != data.scored_on:
            split = data.splits["report"]["split"]
            display.console.print(f"These are other rows of the {split} split than the run was scored on.")
        kept = None if predictions is None else predictions.with_name(f"{predictions.name}.partial")
        partial = None if kept is None else evaluator.partial(kept, folder / "adapter")
        for role, split in data.splits.items():
            with display.stage(f"evaluate {split['split']}", len(getattr(data, role))) as stage:
                metrics, decoded = evaluator.score(role, stage.advance, partial if role == "report" else None)
            found.append({"of": None, "role": role, **split, "metrics": metrics, "signatures": data.signatures})
            if role in evaluator.cut_off:
                found[-1]["cut_off"] = evaluator.cut_off[role]
            if role == "report" and predictions is not None:
                write_lines(predictions, data.records(decoded, data.report_rows))
    if partial is not None:
        partial.remove()
    return found


def load_run(folder: str | Path, *overrides: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the backbone with the run's adapter attached, on the CPU and in evaluation mode, and its tokenizer.

    The model is one of transformers' own classes, and is called and generates like it. Its input has the same form as
    in the run: for a task with `task.prompt`, a source is put into that prompt. The run's data is not needed.
    `deepcopy`, pickle and `state_dict` keep the adapter. `save_pretrained` and `push_to_hub` raise a UserError if plain
    transformers would read the model back without the adapter; `peftbench merge` writes a model that it can read. A run
    that attached nothing, such as `full` or `bitfit`, is saved as it was trained.

    Args:
        folder: of the run, as `peftbench train` prints it at its end, or the first digits of its name below `outputs`.
        overrides: what has changed since, such as `model.path=FOLDER` for a backbone that has moved.

    Raises:
        UserError: there is no finished run, or not the backbone that it was trained on.
    """
    silence_libraries()  # which tell of the task head as missing, though the adapter brings it
    folder = find_run_folder(str(folder))
    return restore_run(folder, read_saved_run(folder, read_saved_record(folder), overrides))


def restore_run(folder: Path, run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what `load_run` returns for the run in `folder`; `run` is of `read_saved_run`."""
    backbone = restore_backbone(folder, run, run.task)
    if has_modification(run):
        keep_from_saving(backbone.model, folder)
    return backbone.model.eval(), backbone.tokenizer


def keep_from_saving(model: PreTrainedModel, folder: Path) -> None:
    """Make `save_pretrained` and `push_to_hub` of a model refuse to write it without its modifications.

    Args:
        folder: of the run, where they are stored.
    """
    instead = (
        ""
        if find_obstacles(model)
        else f"write the weights with it inside by peftbench merge {folder} --out FOLDER, or "
    )
    for method in ("save_pretrained", "push_to_hub"):
        sentence = (
            f"{method} would write the model without its adapter, which from_pretrained has no place for; {instead}"
            f"keep the run, which has it in {folder / 'adapter' / FILE_NAME}, for peftbench.load_run."
        )
        setattr(model, method, partial(_refuse, sentence))


def _refuse(sentence: str, *_: object, **__: object) -> NoReturn:
    """Raise a UserError. This is a module-level function, so that the model can be pickled."""
    raise UserError(sentence)
