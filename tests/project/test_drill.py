"""The drill of scripts/drill.py in short: a round of its trials, none of which loses anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DRILL = Path(__file__).resolve().parents[2] / "scripts" / "drill.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the drill forks")
def test_a_round_of_the_drill_loses_nothing() -> None:
    kinds = ["kill", "signal", "words", "records"]
    done = subprocess.run(
        [sys.executable, str(DRILL), "--minutes", "0", "--only", *kinds], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and ", 0 lost" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
