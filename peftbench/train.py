"""The single entrypoint of training: one run, from its config to its record.

Read `train` and `_run` as the description of a run; each line is one file of the package.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed

from peftbench.backbones.load import Backbone, load_backbone
from peftbench.backbones.precision import (
    choose_autocast_dtype,
    choose_device,
    describe_device,
    identify_gpu,
    resolve_dtype,
)
from peftbench.config.axes import find_steep_starts
from peftbench.config.own_parts import METRIC
from peftbench.config.schema import (
    Run,
    Sharding,
    Unfreeze,
    has_modification,
    list_modifications,
)
from peftbench.config.stamps import stamp_content
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.finished import restore_backbone
from peftbench.evaluation.measures import lacks_measures, measure_backbone, measure_trained
from peftbench.evaluation.recording import record_counts, record_data, record_scores, score_selection
from peftbench.modification.attach import attach, attach_run
from peftbench.modification.peft_files import write_peft_files
from peftbench.modification.prefix_start import NEAR_START, find_near_starts, record_activations, start_prefixes
from peftbench.modification.state import fold, save, size
from peftbench.modification.state import load as load_adapter
from peftbench.records.location import locate_run
from peftbench.records.lock import hold_run
from peftbench.records.noted import is_cleared, is_noted, lacks_selection
from peftbench.records.record import FILE as RECORD
from peftbench.records.record import (
    Divergence,
    Record,
    Score,
    Searched,
    describe_damage,
    detect_divergence,
    find_finished,
    find_record,
    find_trained,
    refuse_newer,
)
from peftbench.records.recording import describe_changed_code, describe_run, forget_refused, record_axes, record_run
from peftbench.records.run_files import (
    CHECKPOINTS,
    ENDED,
    append_metrics,
    clear_checkpoints,
    clear_leftovers,
    has_leftovers,
    rewind_metrics,
)
from peftbench.records.wording import format_settings
from peftbench.tasks.base import TaskData
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.training.batching import count_steps
from peftbench.training.callbacks import build_callbacks
from peftbench.training.checkpoint import Checkpoints
from peftbench.training.class_weights import describe_class_weights, scale_class_weights
from peftbench.training.devices import form_team
from peftbench.training.divergence import are_finite
from peftbench.training.ended import load_ended
from peftbench.training.ended import save_ended as keep_ended
from peftbench.training.fit import Criterion, Fitted, Monitor, Recipe, Resuming, fit_model, require_optimizer
from peftbench.training.looks import find_judge
from peftbench.training.outline import describe_reported_choice, describe_training
from peftbench.training.probe import find_unreached, make_no_gradient_error
from peftbench.training.sharding import is_sharded, shard_layers
from peftbench.training.trackers import Trackers, follow_run
from peftbench.utils.environment import run_alone
from peftbench.utils.errors import LostProcess, UserError
from peftbench.utils.progress import Display, hide_progress
from peftbench.utils.quiet import silence_libraries
from peftbench.utils.stopping import heed_signals, stop_if_asked
from peftbench.utils.team import Team


def train(
    run: Run,
    overrides: Sequence[str] = (),
    *,
    display: Display,
    search: Searched | None = None,
    keep_failed: bool = False,
    wait: bool = False,
    selecting: bool = False,
    reporting: bool = True,
) -> Record:
    """Train, evaluate and record one run; return its record.

    A run that is done, or has diverged, is not trained again unless `rerun=true`: its record is returned. One that was
    interrupted resumes from its last checkpoint.

    Args:
        run: a final run: validated, with its sizes resolved (`sweeps.resolve`) and its search settled
            (`records.choice.settle_search`).
        overrides: what was typed, for the record.
        display: shows the progress of the run.
        search: what the run is in a search, for the record.
        keep_failed: the run is one of a sweep: refuse it if it failed before, unless `retry=true`, and keep its record
            if it is refused while it is prepared.
        wait: if another process is at this run, wait until it has ended.
        selecting: the caller will choose among runs: score the selection split too, for `Record.selection`.
        reporting: score the report split. If not, the run is a trial, which is trained and not done; the same call with
            true goes on with it from its adapter.

    Raises:
        Busy: another process is at this run, and we do not wait.
        Pruned: a judge (`training.looks`) gave the training up.
        Stopped: a scheduler asked this process to end; the same call goes on with the run.
        UserError: for everything else that a user can mend.
    """
    run_alone()
    silence_libraries()
    is_trial = search is not None and search.role == "trial"
    if search is not None and is_trial:
        display.say(f"a trial: {format_settings(search.chosen)}")
    selecting = selecting or is_trial
    folder = locate_run(run)
    record = None if run.rerun or has_leftovers(folder) else find_finished(folder)
    if record is not None and is_noted(record, search, selecting) and not lacks_measures(run, record):
        return _report_ended(run, record, display)
    if not (reporting or run.rerun) and (record := find_trained(folder)) is not None and is_cleared(record):
        return _report_ended(run, record, display)
    with heed_signals(), hold_run(folder, wait):
        refuse_newer(folder)
        if damage := describe_damage(folder):
            display.say(f"{folder / RECORD} cannot be read ({damage}): this run is trained again.")
        before = find_record(folder)
        if not run.rerun and before is not None:
            if before.has_ended:
                clear_leftovers(folder)  # if the process died before it did so itself
                _complete_ended(before, search, selecting, run, display)
                return _report_ended(run, before, display)
            if before.unreported and not reporting:  # another process has trained the trial, while we waited, or died
                if not is_cleared(before):
                    clear_leftovers(folder, trained=True)
                return _report_ended(run, before, display)
            if before.status == "failed" and before.error and keep_failed and not run.retry:
                raise UserError(f"This run failed before ({before.error.said}); retry=true trains it again.")
        if run.rerun:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        try:
            asked = _Scoring(selecting or search is not None, reporting)
            record = _run(run, folder, overrides, search, asked, display)
        except UserError:
            if not keep_failed and (before is None or (before.status == "failed" and not before.unreported)):
                forget_refused(folder)
            raise
        clear_checkpoints(folder, trained=record.unreported)
    return record


def _report_ended(run: Run, record: Record, display: Display) -> Record:
    if record.diverged is None:
        what = "trial is trained" if record.unreported else "run is done"
        display.say(f"This {what} already; rerun=true trains it again.")
    for sentence in describe_changed_code(run, record, METRIC):  # other code of other parts is another run
        display.say(f"{sentence} peftbench rescore {record.folder} computes the score anew.")
    return record


@dataclass(frozen=True)
class _Scoring:
    """Which splits of a run are scored; see `train`."""

    selecting: bool
    reporting: bool


@dataclass(frozen=True)
class _Prepared:
    """All that a run needs to be trained."""

    run: Run  # with the dtype of its backbone decided, read as its `fidelity` says
    backbone: Backbone  # with the run's modifications attached
    data: TaskData


def _run(
    run: Run,
    folder: Path,
    overrides: Sequence[str],
    search: Searched | None,
    asked: _Scoring,
    display: Display,
) -> Record:
    """The run itself, while no other process is at it."""
    with (
        record_run(run, folder, overrides, asked.reporting) as record,
        form_team(run.trainer) as team,
        display,
        follow_run(run, record, display.say) as trackers,
    ):
        record.search = search
        measure_backbone(run, record, display)  # first, because it may be refused
        with team.together():
            team.decide(lambda: (run, folder, asked, record))  # an order, see `obey`
            _train_and_score(run, record, asked, display, team, trackers)
        if asked.reporting:
            measure_trained(run, record, display)
    return record


def obey(team: Team) -> None:
    """Take part in the trainings of a leader, as one of several processes, until the leader orders to end.

    An error is raised in the leader too, which then goes on with its next run or not.

    Raises:
        LostProcess: the leader has ended.
    """
    silence_libraries()
    while (order := team.decide(lambda: None)) is not None:
        run, folder, asked, leaders = order
        record = describe_run(run, folder, ())
        if leaders.unreported:
            record.take_up(leaders)
        try:
            with team.together():
                _train_and_score(run, record, asked, hide_progress(), team)
        except LostProcess:
            raise
        except (Exception, KeyboardInterrupt):  # the leader has it
            gc.collect()  # its traceback held the model


def _train_and_score(
    run: Run, record: Record, asked: _Scoring, display: Display, team: Team, trackers: Trackers | None = None
) -> None:
    """What all processes of a run do together. The leader's `record`, and what it writes, is that of the run; it alone
    has `trackers`."""
    device = choose_device(run.trainer)
    name = describe_device(device)
    record.device = name if team.size == 1 else f"{team.size} x {name}"
    if team.leads:
        record.attempts[-1].gpu = identify_gpu(device)
    with _record_time(record, "prepare_s"), display.stage("prepare"):
        prepared = _prepare(run, record, display, team)
    head_too = asked.reporting and "head" in run.task.baselines and not _is_head_alone(run)
    if record.counts is not None:
        display.say(describe_training(prepared.run, record.counts, prepared.data, head_too))
    model = prepared.backbone.model
    _place_model(model, run, team)
    with _record_time(record, "probe_s"), team.lockstep() if is_sharded(model) else nullcontext():
        _probe(prepared, record)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the probe, and a sweep's earlier runs, had their own

    with _record_time(record, "train_s"):
        fitted, diverged = _train_or_load(prepared, record, display, team, trackers)
        _record_fit(record, fitted)
    stop_if_asked()  # the adapter is saved
    if diverged is None:
        with _record_time(record, "evaluate_s"):
            if (as_trial := record.timings.get("select_s")) is not None:
                _count_earlier(record, as_trial)
            record_scores(prepared.run, model, prepared.data, record, display, team, asked.reporting)
            if asked.selecting and record.selection is None:
                record.selection = score_selection(prepared.run, model, prepared.data, record, display, team)
        if (seen := detect_divergence(record)) is not None:
            record.diverge(replace(seen, step=fitted.steps))
    else:
        record.diverge(diverged)
    if device.type == "cuda":
        taken = (torch.cuda.max_memory_allocated(), fitted.replay_bytes, record.peak_memory_bytes or 0)  # as a trial
        (record.peak_memory_bytes,) = team.find_highest(max(taken))
    if record.diverged is None and head_too:
        with _record_time(record, "baseline_s"):
            score = _score_head_alone(prepared.run, prepared.data, record, display, team)
        if score is not None:
            record.baselines["head"] = score


def _prepare(run: Run, record: Record, display: Display, team: Team) -> _Prepared:
    """Load the data and the backbone, attach the modifications, and note what they are."""
    require_optimizer(run.trainer.optimizer)
    if run.model.attn_implementation == "flex_attention" and choose_device(run.trainer).type == "cpu":
        raise UserError("model.attn_implementation=flex_attention has no gradients on a CPU; use sdpa or a GPU.")
    set_seed(run.seed)
    with team.leader_first():
        loaded = load_task(run.task)
    placed = resolve_dtype(run)
    backbone = load_backbone(placed.model, loaded.task, choose_device(run.trainer))
    starts = find_near_starts(backbone.model, list_modifications(placed))
    activations = record_activations(backbone.model, set(starts.values()), run.seed)
    read, record.deviations = attach_run(backbone.model, placed, backbone.untrained)
    start_prefixes(backbone.model, starts, activations)
    record.axes = record_axes(read)
    record_counts(record, read, backbone)
    if starts:
        record.notes.append(NEAR_START)
    record.notes.extend(note for prefix, m in list_modifications(read).items() for note in find_steep_starts(prefix, m))
    for note in record.notes:
        display.say(note)
    with team.leader_first():
        data = prepare_data(loaded, backbone.tokenizer, backbone.model)
    record_data(record, data, backbone)
    if run.trainer.class_weights is not None:
        weights = scale_class_weights(run.trainer.class_weights, data.label_codes(), data.task.labels)
        record.data["notes"].append(describe_class_weights(weights, data.task.labels))
    if (sentence := describe_reported_choice(run)) is not None:
        record.data["notes"].append(sentence)
    for note in record.data["notes"]:
        display.say(note)
    return _Prepared(read, backbone, data)


def _place_model(model: PreTrainedModel, run: Run, team: Team) -> None:
    """Move the model to the device of this process, or what it has of it if its layers are sharded."""
    device = choose_device(run.trainer)
    if run.trainer.sharding is Sharding.full:
        shard_layers(model, team, device)
    model.to(device)


def _probe(prepared: _Prepared, record: Record) -> None:
    """Refuse to train tensors on which the loss does not depend, unless `allow_unused` permits it."""
    run, data = prepared.run, prepared.data
    batch = data.collator([data.train[0]])
    model = prepared.backbone.model
    record.unused = find_unreached(model, batch, choose_autocast_dtype(run.trainer, run.model, model))
    if record.unused and not run.allow_unused:
        raise make_no_gradient_error(record.unused)


def _train_or_load(
    prepared: _Prepared, record: Record, display: Display, team: Team, trackers: Trackers | None
) -> tuple[Fitted, Divergence | None]:
    """Train, fold and save the adapter; or load that of an earlier attempt, whose evaluation was stopped.

    Nothing is saved of a training that diverged.

    Returns:
        What the training cost, and where it diverged.
    """
    run, backbone, data = prepared.run, prepared.backbone, prepared.data
    name, adapter, noted = f"train {run.method}", record.folder / "adapter", record.folder / CHECKPOINTS / ENDED
    stamp = _make_stamp(data, record)
    earlier = team.decide(lambda: load_ended(noted, stamp, adapter))
    if earlier is None:
        if record.unreported:
            display.say("The adapter of this trial is gone, or its data or packages are others: it is trained again.")
        if team.leads:
            noted.unlink(missing_ok=True)
        callbacks = [*build_callbacks(run.callbacks), *([] if trackers is None else trackers.begin())]
        fitted = _fit_model(run, backbone, data, record, display, name, team, callbacks)
        fold(backbone.model)
        record.forget_trial()
    else:
        fitted = earlier
        load_adapter(backbone.model, adapter, backbone.untrained)
        if record.unreported and record.adapter_stamp != stamp_content(adapter):
            record.forget_trial()  # it was trained again since, by a process that was then killed
        if team.leads:
            record.attempts[-1].step = fitted.steps
        _count_earlier(record, fitted.seconds)
        display.say(f"{name}: has ended before")
    _note_early_stop(run, data, record, display, name, fitted)
    diverged = _find_divergence(fitted, backbone.model)
    if not team.leads:
        return fitted, diverged
    if diverged is not None:
        shutil.rmtree(adapter, ignore_errors=True)  # of an earlier training
        return fitted, diverged
    if earlier is None:
        save(backbone.model, adapter, backbone.untrained)
        if run.peft:
            write_peft_files(backbone.model, adapter, run.model.path or str(run.model.hub_id), backbone.untrained)
        keep_ended(noted, stamp, fitted, adapter)
    record.adapter_bytes, record.adapter_stamp = size(adapter), stamp_content(adapter)
    return fitted, None


def _find_divergence(fitted: Fitted, model: PreTrainedModel) -> Divergence | None:
    """Return where a finished training diverged: where it was stopped, or its end if the weights are not finite now."""
    if fitted.diverged is None and not are_finite(model):
        return Divergence("weights", fitted.steps)
    return fitted.diverged


def _make_stamp(data: TaskData, record: Record) -> str:
    """Return what, in addition to the run, must be the same for an earlier try to be continued."""
    return json.dumps([data.fingerprint, record.versions, *filter(None, [data.reading()])])


def _count_earlier(record: Record, seconds: float) -> None:
    record.timings["earlier_s"] = round(record.timings.get("earlier_s", 0.0) + seconds, 3)


def _fit_model(
    run: Run,
    backbone: Backbone,
    data: TaskData,
    record: Record,
    display: Display,
    name: str,
    team: Team,
    callbacks: Sequence[TrainerCallback] = (),
) -> Fitted:
    """Train what is trainable in the backbone's model, from the last checkpoint if there is one; log to the folder."""
    evaluator = Evaluator(backbone.model, data, run, team)
    folder = record.folder / CHECKPOINTS / name
    checkpoints = Checkpoints(folder, run.trainer.checkpoint_minutes, _make_stamp(data, record))
    resume = team.decide(lambda: checkpoints.take_up(display.say))
    if team.leads:
        rewind_metrics(record.folder, name, resume.step if resume else 0)
    if resume is not None:
        display.say(f"{name}: goes on from step {resume.step}")
        if name == f"train {run.method}" and team.leads:
            record.attempts[-1].step = resume.step
            record.save()

    judge = find_judge() if name == f"train {run.method}" and team.size == 1 else None  # others have no part in it

    def log(values: dict[str, Any]) -> None:
        append_metrics(record.folder, {"stage": name, **values})

    with display.stage(name, count_steps(data, run.trainer)) as stage:
        fitted = fit_model(
            backbone.model,
            data,
            Recipe(run.trainer, run.seed, choose_autocast_dtype(run.trainer, run.model, backbone.model)),
            Criterion(evaluator.selection, run.task.selection_metric or run.task.metric, judge),
            Resuming(checkpoints, resume),
            Monitor(stage, log if team.leads else lambda values: None, callbacks),
            team,
        )
    if resume is not None:
        _count_earlier(record, fitted.earlier_seconds)
    return fitted


def _note_early_stop(run: Run, data: TaskData, record: Record, display: Display, name: str, fitted: Fitted) -> None:
    """Note that a training was ended by `trainer.early_stopping`, or by a callback of the user's own."""
    steps = count_steps(data, run.trainer)
    by_callback = bool(run.callbacks) and fitted.steps < steps and fitted.diverged is None
    if fitted.stopped_early or by_callback:
        why = (
            f"after {run.trainer.early_stopping} evaluations without a better one (trainer.early_stopping)"
            if fitted.stopped_early
            else "by a callback"
        )
        note = f"{name}: ended at step {fitted.steps} of {steps}, {why}."
        display.say(note)
        record.data["notes"].append(note)


def _complete_ended(record: Record, search: Searched | None, selecting: bool, run: Run, display: Display) -> None:
    """Write into the record of a run that has ended what it is in a search; score the selection split, and measure, if
    asked."""
    if is_noted(record, search, selecting) and not lacks_measures(run, record):  # by another process, while we waited
        return
    if search is None or search.role == "final":
        record.search = search
    if lacks_selection(record, selecting):
        with display:
            with display.stage("prepare"):
                loaded, placed = load_task(run.task), resolve_dtype(run)
                backbone = restore_backbone(record.folder, placed, loaded.task, choose_device(run.trainer))
                data = prepare_data(loaded, backbone.tokenizer, backbone.model)
                backbone.model.to(choose_device(run.trainer))
            finite = are_finite(backbone.model)  # an earlier version may have called a diverged run done
            if finite:
                record.selection = score_selection(placed, backbone.model, data, record, display)
            if (seen := detect_divergence(record) if finite else Divergence("weights")) is not None:
                record.status = "diverged"
                record.diverge(seen)
    if lacks_measures(run, record):
        with display:
            measure_trained(run, record, display)
    record.save()


def _score_head_alone(run: Run, data: TaskData, record: Record, display: Display, team: Team) -> float | None:
    """Return the score of the task head trained alone, in the same way, on the unmodified backbone; None if it
    diverged."""
    set_seed(run.seed)
    backbone = load_backbone(run.model, data.task, choose_device(run.trainer))
    attach(backbone.model, {}, untrained=backbone.untrained)
    data = data.serving(backbone.model)
    _place_model(backbone.model, run, team)
    name = "train the head alone"
    fitted = _fit_model(run, backbone, data, record, display, name, team)
    _note_early_stop(run, data, record, display, name, fitted)
    if (diverged := _find_divergence(fitted, backbone.model)) is not None:
        note = f"The head alone diverged ({diverged.said}): there is no baseline of it."
        display.say(note)
        record.data["notes"] = [*record.data["notes"], note]
        return None
    metrics, _ = Evaluator(backbone.model, data, run, team).score("report")
    record.scores["head"] = Score(**data.splits["report"], metrics=metrics)
    return metrics[run.task.metric]


def _is_head_alone(run: Run) -> bool:
    return not has_modification(run) and run.unfreeze is Unfreeze.none


def _record_fit(record: Record, fitted: Fitted) -> None:
    record.steps, record.tokens_per_s = fitted.steps, fitted.tokens_per_s
    record.step_s, record.tflops = fitted.step_s, fitted.tflops
    record.micro_batch, record.fast_paths = fitted.micro_batch, fitted.fast_paths
    if fitted.replay_failure is not None:
        record.notes = [*record.notes, f"Steps were not replayed as CUDA graphs to the end: {fitted.replay_failure}"]


@contextmanager
def _record_time(record: Record, name: str) -> Iterator[None]:
    """Record the seconds that the block takes, and those of earlier tries that it counts."""
    began, earlier = time.perf_counter(), record.timings.get("earlier_s", 0.0)
    yield
    passed = time.perf_counter() - began + record.timings.get("earlier_s", 0.0) - earlier
    record.timings[name] = round(passed, 3)


if __name__ == "__main__":
    from peftbench.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
