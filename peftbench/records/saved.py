"""A finished run on disk: its record, its config, its predictions."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from peftbench.config.schema import Run
from peftbench.config.yaml_files import parse_config, read_yaml_text
from peftbench.records.record import FILE, Record, find_finished, find_trained, load_records
from peftbench.records.run_files import name_predictions_file
from peftbench.utils.errors import UserError
from peftbench.utils.files import expand_home, parse_json

OUTPUTS = Path("outputs")  # the default output_dir


def find_run_folder(word: str) -> Path:
    """Return the folder of a run from the word for it on the command line: the folder itself, or the first digits of
    its name if it is below `outputs`. Raises UserError if several runs have names with these digits."""
    folder = expand_home(word)
    if folder.exists() or not OUTPUTS.is_dir():
        return folder
    found = [record.folder for record in load_records(OUTPUTS)[0] if record.run.startswith(word)]
    if len(found) > 1:
        raise UserError(f"{word} matches {len(found)} runs: {', '.join(map(str, found))}; give one.")
    return found[0] if found else folder


def read_saved_record(folder: Path) -> Record:
    """Return the record of a run that is done. Raises UserError if `folder` has none."""
    record = find_finished(folder)
    if record is not None and record.diverged is not None:
        raise UserError(f"{folder} has a run that diverged ({record.diverged.said}): there is nothing to score.")
    if record is None and find_trained(folder) is not None:
        raise UserError(
            f"{folder} has a trial of a search, which is trained and has no score on the report split; type its search "
            "with search.report=trials, or the words of the trial without a search, to score it."
        )
    if record is None:
        there = "has no run" if not (folder / FILE).is_file() else "has a run that is not done"
        raise UserError(
            f"{folder} {there}; give the folder that peftbench train named at the end of a run, or the first digits of "
            f"the name of a run below {OUTPUTS}."
        )
    return record


def read_saved_config(folder: Path) -> DictConfig:
    """Return the resolved config of a run, typed. Raises UserError if it is missing or of another version."""
    file = folder / "config.yaml"
    text = read_yaml_text(file)
    try:
        config = OmegaConf.merge(pickle.loads(_pickle_schema()), parse_config(text))
        OmegaConf.resolve(config)  # nothing that a run has written refers to anything
        missing = sorted(OmegaConf.missing_keys(config)) if isinstance(config, DictConfig) else []
    except Exception as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig) or missing:
        lacking = f"it lacks {', '.join(missing)}" if isinstance(config, DictConfig) else "it has no keys"
        raise UserError(f"{file} is not the config of a run: {lacking}; restore the file.")
    return config


@cache
def _pickle_schema() -> bytes:
    """Return the schema of a run, of which pickle makes a copy faster than OmegaConf makes a new one."""
    return pickle.dumps(OmegaConf.structured(Run))


def read_saved_predictions(folder: Path, role: str) -> list[dict[str, Any]]:
    """Return the dicts of `TaskData.records`, one per example. Raises UserError if the file is missing or broken."""
    file = folder / name_predictions_file(role)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; it should contain the predictions of the run.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    return [_parse_prediction(file, number, line) for number, line in enumerate(lines, start=1) if line]


def read_scored_predictions(record: Record, role: str) -> list[dict[str, Any]]:
    """Return the same, of which each can be scored, and as many as the run made.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = record.folder / name_predictions_file(role)
    rows = read_saved_predictions(record.folder, role)
    made = record.scores[role].examples
    if len(rows) != made:
        raise UserError(f"{file} holds {len(rows)} predictions, and the run made {made}; restore the file.")
    labels = record.data.get("labels", ())
    if odd := [number for number, row in enumerate(rows, start=1) if not _is_scorable(row, labels)]:
        raise UserError(f"{file} holds values that are no predictions of this task (row {odd[0]}); restore the file.")
    return rows


def _is_scorable(row: dict[str, Any], labels: Sequence[str]) -> bool:
    """Return whether a prediction is a text, and a reference one or several; of a classifier both are labels, or one
    for each word."""
    prediction, reference = row["prediction"], row["reference"]
    texts = [prediction, *(reference if isinstance(reference, list) and reference else [reference])]
    if not all(isinstance(text, str) for text in texts):
        return False
    return not labels or all(text in labels or set(text.split()) <= set(labels) for text in texts)


def _parse_prediction(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = parse_json(line)
    except ValueError as error:
        raise UserError(f"{file} cannot be read: line {number} is incomplete.") from error
    if not isinstance(found, dict) or not {"reference", "prediction"} <= found.keys():
        raise UserError(f"{file} cannot be read: line {number} has no reference and prediction.")
    return found
