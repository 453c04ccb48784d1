"""Compute any metric of a finished run from its saved predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftbench.config.own_parts import is_own, resolve_own
from peftbench.config.roles import is_reported
from peftbench.config.schema import Task
from peftbench.config.task_validity import METRIC_NAMES, find_label_faults
from peftbench.metrics.measure import measure
from peftbench.records.run_files import name_predictions_file
from peftbench.records.saved import read_saved_config, read_saved_record, read_scored_predictions
from peftbench.utils.errors import UserError, describe_unknown


def rescore(folder: Path, metric: str | None = None) -> list[dict[str, Any]]:
    """Return `{"role", "split", "examples", "metrics", "signatures"}` for each split that the run reported on.

    If the record has it, "cut_off" is included.

    Raises:
        UserError: there are no such predictions, or the metric does not fit the task.
    """
    record = read_saved_record(folder)
    task: Task = read_saved_config(folder).task
    metric = metric or record.metric
    if metric not in METRIC_NAMES[task.kind] and not is_own(metric := resolve_own("task.metric", metric)):
        raise UserError(describe_unknown("metric", metric, METRIC_NAMES[task.kind]))
    labels = record.data.get("labels", ())
    if faults := list(find_label_faults("metric", metric, labels)):
        raise UserError(*faults)
    found = []
    for role, score in record.scores.items():
        if not is_reported(role):
            continue
        rows = read_scored_predictions(record, role)
        predictions, references = [row["prediction"] for row in rows], [row["reference"] for row in rows]
        try:
            scores, signatures = measure(metric, predictions, references, labels)
        except (TypeError, ValueError, AttributeError) as error:
            file = folder / name_predictions_file(role)
            raise UserError(f"{file} holds values that are no predictions of this task ({error}).") from error
        found.append(
            {
                "role": role,
                "split": score.split,
                "examples": len(rows),
                "of": score.of,
                "metrics": scores,
                "signatures": signatures,
            }
        )
        if role in record.cut_off:
            found[-1]["cut_off"] = record.cut_off[role]
    return found
