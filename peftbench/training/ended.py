"""A training that has ended: what it cost, beside its adapter until the run is done.

So an evaluation that is stopped, which for long texts takes as long as the training, is all that is done again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from peftbench.training.fit import Fitted
from peftbench.utils.files import replacing


def keep(file: Path, stamp: str, fitted: Fitted) -> None:
    """Note that it has ended, and did not diverge, with a stamp of all that must be the same to make use of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as written:
        json.dump({"stamp": stamp, "fitted": asdict(fitted)}, written)


def ended(file: Path, stamp: str) -> Fitted | None:
    """What `keep` noted; None where the training has not ended, or was another one."""
    try:
        noted = json.loads(file.read_text(encoding="utf-8"))
        return Fitted(**noted["fitted"]) if noted["stamp"] == stamp else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
