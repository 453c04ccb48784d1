"""A training that has ended: its cost is stored with its adapter until the run is done.

If the evaluation is then interrupted, only the evaluation is repeated. For long texts it takes as long as the training.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from peftbench.training.fit import Fitted
from peftbench.utils.files import replace_file


def save_ended(file: Path, stamp: str, fitted: Fitted) -> None:
    """Note that a training has ended and did not diverge; `stamp` states all that must be the same to use it again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as written:
        json.dump({"stamp": stamp, "fitted": asdict(fitted)}, written)


def load_ended(file: Path, stamp: str) -> Fitted | None:
    """Return what `save_ended` noted; None if the training has not ended, or has another stamp."""
    try:
        noted = json.loads(file.read_text(encoding="utf-8"))
        return Fitted(**noted["fitted"]) if noted["stamp"] == stamp else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
