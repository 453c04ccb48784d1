"""A finished run as it lies on disk: its record, its config, its predictions. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from peftbench.config import Run
from peftbench.errors import UserError
from peftbench.results.record import FILE, Record, finished
from peftbench.results.run_files import predictions_file


def saved_record(folder: Path) -> Record:
    """The record of a run that is done. Raises UserError where `folder` holds none."""
    record = finished(folder)
    if record is None:
        there = "holds no run" if not (folder / FILE).is_file() else "holds a run that is not done"
        raise UserError(f"{folder} {there}; give the folder that peftbench train named at the end of a run.")
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
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        raise UserError(f"{file} is missing; a run that is done keeps its predictions there.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
