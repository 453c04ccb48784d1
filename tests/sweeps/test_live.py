"""A sweep on a terminal: what its table shows comes from the records, and fits the screen."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import peftbench.sweeps.live
from peftbench.records.lock import hold_run
from peftbench.records.record import Failure
from peftbench.sweeps.live import READ_EVERY, LiveSweep, read_progress
from peftbench.sweeps.plan import Sweep
from peftbench.sweeps.status import State
from peftbench.utils.progress import Display, is_live
from tests.records.test_record import RUN
from tests.tables.test_table import FFN, record

NOW = datetime(2025, 1, 1, tzinfo=timezone.utc)


def begin(folder: Path, seeds: int) -> Sweep:
    runs = [replace(RUN, seed=seed, output_dir=str(folder)) for seed in range(1, seeds + 1)]
    return Sweep([([f"seed={run.seed}", "task=doctopic"], run) for run in runs], ["-m", "seed=..."])


def put(sweep: Sweep, seed: int, score: float | None = None, **changes: Any) -> Path:
    """The record of a run that ended `seed` minutes after the first one began, or that has not ended."""
    folder = sweep.root / sweep.plan.points[seed - 1].folder
    folder.mkdir(parents=True, exist_ok=True)
    ended = None if score is None else (NOW + timedelta(minutes=seed)).isoformat()
    record(score, FFN, **{"seed": seed, "folder": folder, "finished": ended, **changes}).save()
    return folder


def terminal(width: int = 80, height: int = 25) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ={})


def screen(live: LiveSweep, width: int = 80, height: int = 25) -> list[str]:
    """The lines of the display as they would stand on a terminal of this size."""
    console = terminal(width, height)
    with console.capture() as captured:
        console.print(live)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", captured.get()).rstrip().splitlines()
    assert max(map(len, lines)) <= width and len(lines) < height
    return [line.rstrip() for line in lines]


def test_the_table_grows_with_the_records(tmp_path: Path) -> None:
    sweep = begin(tmp_path, 4)
    put(sweep, 1, 61.5)
    sweep = begin(tmp_path, 4)  # which finds the first one done
    live = LiveSweep(sweep, terminal())
    first = screen(live)
    assert first[0] == "4 runs: 1 done, 3 missing; about 4:37 left"
    assert first[1].split() == ["seed", "status", "accuracy", "↑", "time"]
    assert first[3].split() == ["1", "done", "before", "61.50", "1:32"]
    put(sweep, 2, 62.5)
    put(sweep, 3, status="failed", score=None, error=Failure("OutOfMemoryError", "CUDA"))
    running = put(sweep, 4, trainer={"max_steps": 200}, created=datetime.now(timezone.utc).isoformat(), timings={})
    (running / "metrics.jsonl").write_text(json.dumps({"stage": "train mam", "step": 90, "loss": 1.0}) + "\n")
    assert screen(live) == first  # it is not read again for every picture
    live.read_at -= READ_EVERY
    with hold_run(running):
        grown = screen(live)
    assert grown[0].startswith("4 runs: 2 done, 1 running, 1 failed; about 1:3")
    rows = [line.split() for line in grown[3:7]]
    assert rows[1] == ["2", "done", "62.50", "1:32"]
    assert rows[2] == ["3", "failed:", "OutOfMemoryError", "1:32"]
    assert rows[3][:3] == ["4", "running", "45%"]
    live.read_at -= READ_EVERY
    assert "interrupted" in screen(live)[6]  # nobody holds it any more


def test_a_slow_file_system_is_asked_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading of 2 s: not again in the next 20 s."""
    live = LiveSweep(begin(tmp_path, 1), terminal())
    now, read = [100.0], list[float]()

    def slow() -> list[State]:
        read.append(now[0])
        now[0] += 2.0
        return []

    monkeypatch.setattr(peftbench.sweeps.live.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live, "_read", slow)
    for seconds in (0.0, 1.0, 15.0, 5.0):
        now[0] += seconds
        screen(live)
    assert read == [100.0, 123.0]


def test_a_tall_sweep_fits_the_screen(tmp_path: Path) -> None:
    """What runs is there, then what ended last; the others are counted."""
    sweep = begin(tmp_path, 9)
    running = put(sweep, 1, created=datetime.now(timezone.utc).isoformat(), timings={})
    for seed in range(2, 9):
        put(sweep, seed, 50.0 + seed / 100)
    with hold_run(running):
        lines = screen(LiveSweep(sweep, terminal()), 40, height=12)
    assert [line.split()[0] for line in lines[3:]] == ["1", "6", "7", "8", "not"]
    assert lines[-1] == "not shown: 4 done"


def test_a_value_takes_one_line_however_long_it_is(tmp_path: Path) -> None:
    runs = [replace(RUN, seed=seed, output_dir=str(tmp_path)) for seed in (1, 2)]
    layers = ["modified_representation.layers=[" + ",".join("0" * n) + "]" for n in (100, 120)]
    sweep = Sweep([([layer], run) for layer, run in zip(layers, runs, strict=True)], [])
    put(sweep, 1, 61.5)
    put(sweep, 2, 62.5)
    lines = screen(LiveSweep(sweep, terminal()), 60)
    assert len(lines) == 5 and all("…" in line and "done" in line for line in lines[3:])


def test_scores_of_several_metrics_are_named(tmp_path: Path) -> None:
    sweep = begin(tmp_path, 2)
    put(sweep, 1, 61.5)
    put(sweep, 2, 20.25, metric="rouge2")
    text = "\n".join(screen(LiveSweep(sweep, terminal())))
    assert "accuracy 61.50" in text and "rouge2 20.25" in text


@pytest.mark.parametrize(
    ("trainer", "lines", "expected"),
    [
        ({"max_steps": 200}, ['{"stage": "train mam", "step": 50}'], "25%"),
        ({"max_steps": 200}, ['{"stage": "train mam", "step": 50}', '{"stage": "tra'], "25%"),
        ({"max_steps": None, "epochs": 4.0}, ['{"stage": "train mam", "step": 9, "epoch": 3.0}'], "75%"),
        ({"max_steps": 200}, ['{"stage": "train the head alone", "step": 20}'], "10% of the head alone"),
        ({"max_steps": 200}, [], ""),
        ({"max_steps": 200}, ["[1]", "torn"], ""),
        ({}, ['{"stage": "train mam", "step": 9, "epoch": 3.0}'], ""),
    ],
)
def test_how_far_a_run_has_come(trainer: dict[str, Any], lines: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_progress(record(None, FFN, folder=tmp_path, trainer=trainer)) == expected
    assert read_progress(record(None, FFN, folder=tmp_path / "nowhere", trainer=trainer)) == ""


def test_a_run_within_a_sweep_prints_nothing_and_its_bar_stands_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = terminal()
    display = Display(console, within_another=True)
    live = LiveSweep(begin(tmp_path, 2), console, below=display.progress)
    with display, display.stage("train lora", 10) as stage:
        stage.advance(4)
        stage.say("loss 0.123")
        display.console.print("a note")
        lines = screen(live)
        assert "train lora" in lines[-1] and "4/10" in lines[-1] and "loss 0.123" in lines[-1]
    assert "train lora" not in "\n".join(screen(live))
    assert "".join(capsys.readouterr()) == "" == console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def test_where_nobody_watches_lines_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    assert is_live(Console(force_terminal=True, _environ={"TERM": "xterm"}))
    assert not is_live(Console(force_terminal=True, _environ={"TERM": "dumb"}))
    assert not is_live(Console(file=io.StringIO(), _environ={"TERM": "xterm"}))
    monkeypatch.setenv("CI", "true")
    assert not is_live(Console(force_terminal=True, _environ={"TERM": "xterm"}))


def test_the_cursor_comes_back_whatever_ends_the_display(tmp_path: Path) -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), LiveSweep(begin(tmp_path, 2), console):
        raise KeyboardInterrupt
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "2 missing" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
