"""`peftbench evaluate RUN [KEY=VALUE ...]`: a finished run's adapter, loaded and scored again, on any split."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.console import Console

from peftbench.backbone import Backbone, load_backbone
from peftbench.config import Run, Task, resolve, task_files
from peftbench.errors import UserError, unknown
from peftbench.evaluate import Evaluator
from peftbench.modification.attach import attach_run
from peftbench.modification.state import load as load_adapter
from peftbench.overrides import apply_override
from peftbench.precision import chosen_device, with_dtype
from peftbench.progress import Display
from peftbench.results.earlier import check_backbone
from peftbench.results.record import Record
from peftbench.scoring.saved import run_folder, saved_config, saved_record
from peftbench.scoring.show import show_scores
from peftbench.tasks.load import homeless, load, reported_on
from peftbench.tasks.prepare import prepare
from peftbench.tasks.roles import splits
from peftbench.train import quiet_console
from peftbench.validity import faults
from peftbench.whole_files import dumped, write_lines

GROUPS = ("task", "trainer", "model")  # what may be changed of a run without making it another


def main(argv: list[str]) -> int:
    """Prints the scores and returns the exit code.

    Raises:
        UserError: there is no finished run, an override is wrong, or the backbone is not the one it was trained on.
    """
    parser = argparse.ArgumentParser(
        prog="peftbench evaluate",
        description="Load the adapter of a finished run and score it again.",
        epilog="task.split=SPLIT scores another split; other keys are those of peftbench train that begin with task., "
        "trainer. or model., such as task.generation.num_beams=1 or trainer.eval_batch_size=8.",
    )
    parser.add_argument("run", type=run_folder, help="its folder, or the first digits of its name")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="what to do otherwise than then")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object for each split")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write the predictions of the split there")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.predictions is not None and not arguments.predictions.parent.is_dir():
        raise UserError(f"--predictions {arguments.predictions}: {arguments.predictions.parent} is not a folder.")
    record = saved_record(arguments.run)
    run = changed_run(arguments.run, record, arguments.overrides)
    console = quiet_console(stderr=arguments.json)
    found = evaluate(arguments.run, run, console, arguments.predictions)
    if arguments.json:
        print(dumped(found, indent=2, ensure_ascii=True))
    else:
        show_scores(found, record, console)
    return 0


def changed_run(folder: Path, record: Record, overrides: Sequence[str]) -> Run:
    """The run that lies in `folder`, with overrides, checked as `peftbench train` checks them; of its own files those
    must be there that are read."""
    run = _overridden(folder, record, overrides)
    task = with_saved_labels(run.task, record)
    if found := faults(replace(run, task=reported_on(task, homeless(trained_task(folder))))):
        raise UserError(*found)
    return run


def saved_run(folder: Path, record: Record, overrides: Sequence[str] = ()) -> Run:
    """Like `changed_run`, with the labels that the data had. Nothing but the backbone must be there; the data may have
    gone."""
    run = _overridden(folder, record, overrides)
    run.task = with_saved_labels(run.task, record)
    return run


def _overridden(folder: Path, record: Record, overrides: Sequence[str]) -> Run:
    config = saved_config(folder)
    try:
        lines = [re.sub(r"^task\.split=", "task.report_split=", override) for override in overrides]
        parsed = OverridesParser.create().parse_overrides(lines)
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from error
    found = []
    for typed, override in zip(overrides, parsed, strict=True):
        if override.key_or_group.split(".")[0] not in GROUPS or "." not in override.key_or_group:
            keys = ", ".join(f"{group}.KEY" for group in GROUPS)
            found.append(f"{override.input_line}: evaluate takes {keys} only, such as task.split=test.")
        elif override.is_delete():
            found.append(f"{typed}: evaluate takes no key away; give it another value.")
        elif override.is_sweep_override():
            found.append(f"{typed} names several values, and evaluate takes one; type a line for each of them.")
        elif sentence := apply_override(config, override):
            found.append(sentence)
    if found:
        raise UserError(*found)
    run = resolve(config)
    run.task = _reporting(run.task, trained_task(folder))
    if run.model.path and not Path(run.model.path).expanduser().is_dir():
        raise UserError(f"model.path={run.model.path} is not a folder; give the path of an existing one.")
    check_backbone(run, record)
    if "labels" in record.data and run.task.labels not in ([], record.data["labels"]):
        raise UserError(
            f"task.labels=[{','.join(run.task.labels)}]: the run was trained on the labels "
            f"{', '.join(record.data['labels'])}, in this order; leave task.labels out."
        )
    return run


def with_saved_labels(task: Task, record: Record) -> Task:
    """The task with the labels that the run was trained on, where it names none."""
    return replace(task, labels=task.labels or record.data.get("labels", []))


def trained_task(folder: Path) -> Task:
    """The task of the run in `folder` as it was trained."""
    task = OmegaConf.to_object(saved_config(folder).task)
    assert isinstance(task, Task)
    return task


def _reporting(task: Task, trained: Task) -> Task:
    """The task, each of its files still that of the split that it was, though another split is reported on now; without
    those of splits that it no longer has."""
    gone = set(splits(trained)) - set(splits(task))
    task = replace(task, data_files={split: file for split, file in task.data_files.items() if split not in gone})
    if task.report_split == trained.report_split:
        return task
    files = task_files(replace(task, report_split=trained.report_split))
    known = list(dict.fromkeys([*splits(trained), *files]))
    if files and not any((task.data_dir, task.packages, task.hub_id)) and task.report_split not in known:
        raise UserError(unknown("task.split", task.report_split, known))
    # Only task.test_file is that of another split now. The others keep the keys by which a message names them: what is
    # given under a message's key must win.
    moved = {} if task.test_file is None else {trained.report_split: task.test_file}
    files = {split: file for split, file in {**task.data_files, **moved}.items() if split in splits(task)}
    return replace(task, data_files=files, test_file=None)


def restored(folder: Path, run: Run, task: Task) -> Backbone:
    """The backbone of the run in `folder` with its adapter; `task` is the run's, with labels that the data had."""
    backbone = load_backbone(run.model, task)
    attach_run(backbone.model, run, backbone.untrained)
    load_adapter(backbone.model, folder / "adapter", backbone.untrained)
    return backbone


def read_otherwise(before: dict[str, Any], reading: dict[str, Any]) -> str | None:
    """The sentence for a run whose texts were read otherwise when it was trained, given its record's `data`."""
    now, then = (
        {key: value for key, value in of.items() if key != "cut_targets"} for of in (reading, before.get("reading", {}))
    )
    if now == then:
        return None
    told = ", ".join(f"{key} {json.dumps(value)}" for key, value in sorted((now | then).items()))
    return (
        f"The run was trained on texts that were read otherwise ({told}): its score is another one now; train it again."
    )


def evaluate(folder: Path, run: Run, console: Console, predictions: Path | None = None) -> list[dict[str, Any]]:
    """The scores of each split, as `rescore` gives them.

    Args:
        predictions: the file to write the predictions on the report split to. Where text is generated, what was
            written to FILE.partial before the command was stopped is not generated again.
    """
    found: list[dict[str, Any]] = []
    with Display(console) as display:
        with display.stage("prepare"):
            dealt, labels = homeless(trained_task(folder)), saved_record(folder).data.get("labels", [])
            loaded = load(run.task, training=False, dealt=dealt, labels=labels)
            run = with_dtype(run)
            backbone = restored(folder, run, loaded.task)
            data = prepare(loaded, backbone.tokenizer, backbone.model)
            backbone.model.to(chosen_device(run.trainer))
            evaluator = Evaluator(backbone.model, data, run)
        for note in (*backbone.notes, *data.notes):
            display.console.print(note, highlight=False, soft_wrap=True)
        before = saved_record(folder).data
        if other := read_otherwise(before, data.reading()):
            display.console.print(other, highlight=False, soft_wrap=True)
        if before["splits"]["report"] == data.splits["report"] and before["scored_on"] != data.scored_on:
            split = data.splits["report"]["split"]
            display.console.print(f"These are other rows of the {split} split than the run was scored on.")
        kept = None if predictions is None else predictions.with_name(f"{predictions.name}.partial")
        partial = None if kept is None else evaluator.partial(kept, folder / "adapter")
        for role, split in data.splits.items():
            with display.stage(f"evaluate {split['split']}", split["examples"]) as stage:
                metrics, decoded = evaluator.score(role, stage.advance, partial if role == "report" else None)
            found.append({"of": None, "role": role, **split, "metrics": metrics, "signatures": data.signatures})
            if role in evaluator.cut_off:
                found[-1]["cut_off"] = evaluator.cut_off[role]
            if role == "report" and predictions is not None:
                write_lines(predictions, data.records(decoded, data.report_rows))
    if partial is not None:
        partial.remove()
    return found
