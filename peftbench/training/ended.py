"""A training that has ended: its cost is stored with its adapter until the run is done.

If the evaluation is then interrupted, only the evaluation is repeated. For long texts it takes as long as the training.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from peftbench.config.stamps import stamp_content
from peftbench.records.record import decode
from peftbench.training.fit import Fitted
from peftbench.utils.errors import UserError
from peftbench.utils.files import read_json, replace_file


def save_ended(file: Path, stamp: str, fitted: Fitted, adapter: Path) -> None:
    """Note that a training has ended and did not diverge; `stamp` states all that must be the same to use it again.

    Args:
        adapter: the folder with its trained tensors.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as written:
        json.dump({"stamp": stamp, "adapter": stamp_content(adapter), "fitted": asdict(fitted)}, written)


def load_ended(file: Path, stamp: str, adapter: Path) -> Fitted | None:
    """Return what `save_ended` noted; None if the training has not ended, or has another stamp, or if its tensors are
    damaged."""
    try:
        noted = read_json(file)
        is_ours = noted["stamp"] == stamp and noted["adapter"] == stamp_content(adapter)
        fitted: Fitted | None = decode(Fitted, noted["fitted"]) if is_ours else None
    except (OSError, ValueError, TypeError, KeyError, UserError):
        return None
    return fitted
