"""A finished run as it lies on disk: its record, its config, its predictions. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from peftbench.config.schema import Run
from peftbench.records.record import FILE, Record, finished, load_records
from peftbench.records.run_files import predictions_file
from peftbench.utils.errors import UserError

OUTPUTS = Path("outputs")  # the default output_dir


def run_folder(word: str) -> Path:
    """The folder of a run, from what stands for it on the command line: itself, or the first digits of its name where
    that is below `outputs`. Raises UserError where these are of several runs."""
    folder = Path(word).expanduser()
    if folder.exists() or not OUTPUTS.is_dir():
        return folder
    found = [record.folder for record in load_records(OUTPUTS)[0] if record.run.startswith(word)]
    if len(found) > 1:
        raise UserError(f"{word} stands for {len(found)} runs: {', '.join(map(str, found))}; give one.")
    return found[0] if found else folder


def saved_record(folder: Path) -> Record:
    """The record of a run that is done. Raises UserError where `folder` holds none."""
    record = finished(folder)
    if record is not None and record.diverged is not None:
        raise UserError(f"{folder} holds a run that diverged ({record.diverged.said}): there is nothing to score.")
    if record is None:
        there = "holds no run" if not (folder / FILE).is_file() else "holds a run that is not done"
        raise UserError(
            f"{folder} {there}; give the folder that peftbench train named at the end of a run, or the first digits of "
            f"the name of one below {OUTPUTS}."
        )
    return record


def saved_config(folder: Path) -> DictConfig:
    """The resolved config of a run, typed. Raises UserError where it is missing or of another version."""
    file = folder / "config.yaml"
    try:
        config = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.load(file))
    except Exception as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    assert isinstance(config, DictConfig)
    return config


def saved_predictions(folder: Path, role: str) -> list[dict[str, Any]]:
    """What `TaskData.records` gave, a dict for each example. Raises UserError where the file is missing or torn."""
    file = folder / predictions_file(role)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; a run that is done keeps its predictions there.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    return [_read(file, number, line) for number, line in enumerate(lines, start=1) if line]


def _read(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{file} cannot be read: line {number} is torn.") from error
    if not isinstance(found, dict) or not {"reference", "prediction"} <= found.keys():
        raise UserError(f"{file} cannot be read: line {number} has no reference and prediction.")
    return found
