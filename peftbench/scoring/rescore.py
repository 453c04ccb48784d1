"""`peftbench rescore RUN [METRIC]`: any metric of a finished run, from its predictions. Needs no model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peftbench.config import Task
from peftbench.errors import UserError, unknown
from peftbench.results.run_files import predictions_file
from peftbench.scoring.saved import run_folder, saved_config, saved_predictions, saved_record
from peftbench.scoring.show import show_scores
from peftbench.tasks.metrics import measure
from peftbench.tasks.roles import is_reported
from peftbench.terminal import terminal
from peftbench.validity import METRICS, label_faults
from peftbench.whole_files import dumped


def main(argv: list[str]) -> int:
    """Prints the scores and returns the exit code. Raises UserError for what is no finished run, or no metric of it."""
    parser = argparse.ArgumentParser(
        prog="peftbench rescore", description="Compute a metric of a finished run from its saved predictions."
    )
    parser.add_argument("run", type=run_folder, help="its folder, or the first digits of its name")
    parser.add_argument("metric", nargs="?", help="default: the metric of the run")
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object for each split")
    arguments = parser.parse_args(argv)
    found = rescore(arguments.run, arguments.metric)
    if arguments.json:
        print(dumped(found, indent=2, ensure_ascii=True))
    else:
        show_scores(found, saved_record(arguments.run), terminal())
    return 0


def rescore(folder: Path, metric: str | None = None) -> list[dict[str, Any]]:
    """`{"role", "split", "examples", "metrics", "signatures"}` for each split that the run reported on, and "cut_off"
    where its record has it.

    Raises:
        UserError: as `main`.
    """
    record = saved_record(folder)
    task: Task = saved_config(folder).task
    metric = metric or record.metric
    if metric not in METRICS[task.kind]:
        raise UserError(unknown("metric", metric, METRICS[task.kind]))
    labels = record.data.get("labels", ())
    if faults := list(label_faults("metric", metric, labels)):
        raise UserError(*faults)
    found = []
    for role, score in record.scores.items():
        if not is_reported(role):
            continue
        rows = saved_predictions(folder, role)
        if len(rows) != score.examples:
            file = folder / predictions_file(role)
            raise UserError(
                f"{file} holds {len(rows)} predictions, and the run made {score.examples}; restore the file."
            )
        predictions, references = [row["prediction"] for row in rows], [row["reference"] for row in rows]
        scores, signatures = measure(metric, predictions, references, labels)
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
