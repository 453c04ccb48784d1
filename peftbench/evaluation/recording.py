"""What a run's record says of its data, its counts and its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from transformers import PreTrainedModel

from peftbench.backbones.chat_template import list_ends
from peftbench.backbones.load import Backbone
from peftbench.backbones.sites import find_sites
from peftbench.config.schema import LOSS, WITH_LABELS, Keep, Run, list_modifications
from peftbench.counts.shares import size_notes
from peftbench.evaluation.evaluator import Evaluator
from peftbench.metrics.statistics import References
from peftbench.modification.counting import count
from peftbench.modification.dead_parameters import count_dead
from peftbench.records.record import Record, RecordedCounts, Score, Selection
from peftbench.records.run_files import CHECKPOINTS, write_predictions
from peftbench.tasks.base import TaskData
from peftbench.tasks.docstrings import read_versions
from peftbench.tasks.text_to_text import TextToText
from peftbench.utils.errors import quote
from peftbench.utils.progress import Display
from peftbench.utils.team import ALONE, Team


def record_counts(record: Record, run: Run, backbone: Backbone) -> None:
    """Record the numbers of parameters of a backbone with the run's modifications, and notes on their sizes."""
    counts = count(backbone.model, backbone.untrained)
    dead = count_dead(backbone.model, list_modifications(run)) if run.fidelity.dead_parameters else 0
    record.counts = RecordedCounts(**asdict(counts), dead=dead)
    record.model.parameters = counts.backbone
    record.model.quantization = backbone.quantization
    record.notes = size_notes(run, counts, find_sites(backbone.model).width)


def record_data(record: Record, data: TaskData, backbone: Backbone) -> None:
    """Record what the run was trained and scored on, and what was decided about the backbone."""
    record.data = {
        "fingerprint": data.fingerprint,
        "scored_on": data.scored_on,
        "splits": data.splits,
        "notes": [*backbone.notes, *data.notes],
        "limits": data.limits(),
        "cut": data.cut,
    }
    if isinstance(data, TextToText):
        stops = data.tokenizer.convert_ids_to_tokens(list_ends(backbone.model))
        record.data["ends"] = {"taught": data.taught_ends(), "stops": stops}
    if data.unknown:
        record.data["unknown_tokens"] = data.unknown
    if reading := data.reading():
        record.data["reading"] = reading
    if data.task.kind in WITH_LABELS:
        record.data["labels"] = data.task.labels
    if data.groups is not None:
        record.data["groups"] = data.groups
    if data.task.packages is not None:
        record.data["packages"] = read_versions(data.task.packages)


def record_scores(
    run: Run,
    model: PreTrainedModel,
    data: TaskData,
    record: Record,
    display: Display,
    team: Team = ALONE,
    reporting: bool = True,
) -> None:
    """Score the model, write the predictions of the reported splits, and record the baselines next to the score.

    The selection split is scored too if it chose the state that is reported, unless the record has that score already.

    Args:
        reporting: false for a trial: no reported split is scored.
    """
    evaluator = Evaluator(model, data, run, team)
    selected = run.trainer.keep is Keep.best and data.splits.get("selection") not in (None, data.splits["report"])
    for role, split in data.splits.items():
        if role == "train" or role in record.scores or not (selected if role == "selection" else reporting):
            continue
        partial = None
        if team.leads:
            partial = evaluator.partial(record.folder / CHECKPOINTS / f"{role}.partial", record.folder / "adapter")
        with display.stage(f"evaluate {split['split']}", len(getattr(data, role))) as stage:
            metrics, decoded = evaluator.score(role, stage.advance, partial)
        record.scores[role] = Score(**split, metrics=metrics)
        record.cut_off |= evaluator.cut_off
        if role != "selection":
            rows = getattr(data, f"{role}_rows")
            _note_one_prediction(record, split["split"], decoded, data.references(rows), display)
            if team.leads:
                write_predictions(record.folder, data.records(decoded, rows), role)
    if not reporting:
        return
    record.score = record.scores["report"].metrics[run.task.metric]
    if data.signatures:
        record.data["signatures"] = data.signatures
    for dotted, value in data.baselines().items():
        name, metric = dotted.split(".", 1)
        record.scores.setdefault(name, Score(**data.splits["report"], metrics={})).metrics[metric] = value
        if metric == run.task.metric:
            record.baselines[name] = value


def _note_one_prediction(
    record: Record, split: str, decoded: Sequence[str], references: References, display: Display
) -> None:
    """Note that a model has predicted the same for all examples of a split, although their references differ."""
    if len(set(decoded)) > 1 or all(reference == references[0] for reference in references):
        return
    note = f"All {len(decoded):,} predictions on {split} are {quote(decoded[0])}: the model ignores its input."
    record.data["notes"].append(note)
    display.say(note)


def score_selection(
    run: Run, model: PreTrainedModel, data: TaskData, record: Record, display: Display, team: Team = ALONE
) -> Selection:
    """Return what a search, or a sweeper, compares. A score that `record_scores` has recorded is not computed again."""
    split, metric = data.splits["selection"], run.task.selection_metric or run.task.metric
    same = "report" if split == data.splits["report"] else "selection"
    if metric != LOSS and same in record.scores:
        value = record.scores[same].metrics[metric]
    else:
        with display.stage(f"evaluate {split['split']}"):
            value = Evaluator(model, data, run, team).selection()[metric]
    return Selection(**split, metric=metric, value=value if math.isfinite(value) else None)
