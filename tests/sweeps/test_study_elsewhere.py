"""A study that a scheduler stops on one machine goes on on another one, with what scripts/keep_records.py has kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from peftbench.records.record import Record, load_records
from tests.sweeps.test_workers import started, until

KEEP = Path(__file__).resolve().parents[2] / "scripts" / "keep_records.py"
TRIALS = 6


def type_line(outputs: Path) -> list[str]:
    words = ["task=doctopic", "debug=smoke", "task.baselines=[]", "trainer.keep=best", "trainer.evaluate_every=1"]
    words += ["search=optuna", f"search.trials={TRIALS}", "search.sampler=random", "budget=2%"]
    return [*words, "search.seed=42", "seed=1,2", f"output_dir={outputs}"]


def keep(outputs: Path, kept: Path) -> str:
    done = subprocess.run(
        [sys.executable, KEEP, outputs, kept, "--shared", "/nowhere"], check=True, capture_output=True, text=True
    )
    return done.stdout


def read(folder: Path) -> dict[str, Record]:
    return {record.run: record for record in load_records(folder)[0]}


@pytest.mark.slow
def test_no_trial_is_lost_and_none_is_trained_twice(tmp_path: Path) -> None:
    """Except the one that is chosen, whose adapter is not kept, so that it could be scored."""
    first, other, kept = (tmp_path / name for name in ("first", "other", "kept"))
    process = started(type_line(first))
    try:
        until(lambda: first.is_dir() and sum(one.has_ended or one.unreported for one in read(first).values()) >= 2)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert keep(first, kept).rstrip().endswith(", and 1 journals of studies")
    before = read(kept)
    assert 2 <= len(before) < TRIALS
    assert str(tmp_path) not in next(kept.rglob("*.study.jsonl")).read_text()
    shutil.rmtree(first)

    shutil.copytree(kept, other)
    again = started(type_line(other))
    output, _ = again.communicate(timeout=280)
    assert again.returncode == 0, output
    after = read(other)
    trials = {run for run, record in after.items() if record.seed == 42}
    assert len(trials) == TRIALS and len(after) == TRIALS + 2
    final = [one for one in after.values() if one.search is not None and one.search.role == "final"]
    for run, record in before.items():
        attempts = after[run].attempts
        assert attempts[0].started == record.created and len(attempts) == (2 if after[run] in final else 1)
    assert {one.status for one in final} == {"done"}
    assert sorted(one.seed for one in final) == [1, 2, 42]
    started_again = started(type_line(other))
    output, _ = started_again.communicate(timeout=120)
    assert started_again.returncode == 0 and read(other).keys() == after.keys(), output
    assert {run: one.created for run, one in read(other).items()} == {run: one.created for run, one in after.items()}

    keep(other, kept)
    found = read(kept)
    assert found.keys() == after.keys()
    (best,) = (one for one in final if one.seed == 42)
    assert (kept / best.folder.relative_to(other) / "config.yaml").is_file()
    beaten = [one for one in after.values() if one.seed == 42 and one.selection != best.selection]
    for one in beaten:
        assert [file.name for file in (kept / one.folder.relative_to(other)).iterdir()] == ["record.json"]
