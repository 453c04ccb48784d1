"""What `peftbench status` says of sweeps, from their plans and records alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from peftbench.cli.status import main
from peftbench.records.lock import hold_run
from peftbench.records.record import Failure
from peftbench.sweeps.plan import Member, Plan, PlannedRun
from peftbench.sweeps.status import State, estimate_seconds_left, summarise_states
from peftbench.utils.errors import UserError
from tests.live_files import refuse_scan
from tests.records.test_record import RUN
from tests.tables.test_table import record, saved

NOW = datetime(2025, 1, 1, 0, 1, tzinfo=timezone.utc)  # a minute after the records of `test_table` were created


def state(method: str, status: str, total_s: float | None = None, **changes: Any) -> State:
    point = PlannedRun(f"{method}/{status}", method, {"method": method})
    if status == "missing":
        return State(point, None)
    timings = {} if total_s is None else {"total_s": total_s}
    return State(point, record(None, method=method, status=status, timings=timings, **changes))


def test_no_time_is_promised_before_a_run_is_done() -> None:
    assert estimate_seconds_left([state("lora", "running"), state("lora", "missing")]) is None


@pytest.mark.parametrize(
    ("states", "seconds"),
    [
        ([("lora", "done", 100.0), ("lora", "missing")], 100),
        ([("lora", "done", 100.0), ("lora", "done", 200.0), ("lora", "interrupted")], 150),
        ([("lora", "done", 100.0), ("mam", "done", 300.0), ("mam", "missing"), ("full", "missing")], 300 + 200),
        ([("lora", "done", 100.0), ("lora", "running"), ("lora", "missing")], 40 + 100),  # has run for 60 s
        ([("lora", "done", 100.0), ("lora", "running"), ("lora", "running"), ("lora", "missing")], 100),
        ([("lora", "done", 30.0), ("lora", "running")], 0),
        ([("lora", "done", 100.0), ("lora", "failed")], 0),
    ],
)
def test_time_left(states: list[tuple[str, str, float]], seconds: float) -> None:
    assert estimate_seconds_left([state(*one) for one in states], NOW) == pytest.approx(seconds)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A sweep over five runs, of which one is done, one runs, one died, one failed and one has not begun."""
    now = datetime.now(timezone.utc)
    runs = [(["method=lora", f"seed={seed}"], replace(RUN, seed=seed, output_dir=str(tmp_path))) for seed in range(5)]
    plan = Plan.of([Member(*one) for one in runs], ["-m", "method=lora", "seed=0,1,2,3,4"])
    plan.save(tmp_path)
    kinds: list[dict[str, Any]] = [
        {"status": "done", "timings": {"total_s": 3600.0}},
        {"status": "running", "created": (now - timedelta(minutes=10)).isoformat()},
        {"status": "running", "created": (now - timedelta(days=10)).isoformat()},
        {"status": "failed", "error": Failure("OutOfMemoryError", "CUDA"), "timings": {"total_s": 5.0}},
    ]
    for point, kind in zip(plan.points, kinds, strict=False):
        saved(record(None, folder=tmp_path / point.folder, **kind))
    return tmp_path


def test_what_is_deleted_meanwhile_is_passed_over(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a checkpoint."""
    (outputs / "gone" / "checkpoint-33").mkdir(parents=True)
    refuse_scan("checkpoint-33", FileNotFoundError(2, "No such file or directory"), monkeypatch)
    assert main([str(outputs)]) == 1 and "1 failed" in capsys.readouterr().out


def test_every_run_of_a_sweep_is_counted(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = outputs.rglob("*.sweep.json")
    second = Plan.load(file).points[1]
    with hold_run(outputs / second.folder):
        assert main([str(outputs)]) == 1
        printed = capsys.readouterr().out
        assert main([str(outputs), "--json"]) == 1
        (sweep,) = json.loads(capsys.readouterr().out)
    printed = " ".join(printed.split())
    assert re.search("5 runs: 1 done, 1 running, 1 interrupted, 1 failed, 1 missing; about 2:(49|50):.. left", printed)
    assert "failed: OutOfMemoryError" in printed and "10:0" in printed and "peftbench train -m method=lora" in printed
    assert [run["settings"] for run in sweep["runs"]] == [{"seed": str(seed)} for seed in range(5)]
    assert sweep["counts"]["interrupted"] == 1


def test_what_was_typed_is_shown_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [f"mix=[{name}] trainer.learning_rate=0.1 task.prompt=:smile:{name}" for name in ("prefix", "ia3_ffn")]
    runs = [(line.split(), replace(RUN, seed=seed, output_dir=str(tmp_path))) for seed, line in enumerate(typed)]
    Plan.of([Member(*one) for one in runs], ["-m", "mix=[prefix],[ia3_ffn]"]).save(tmp_path)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "'mix=[prefix],[ia3_ffn]'" in printed
    assert re.search(r"\[prefix\] +:smile:prefix", printed)


def test_runs_of_a_debug_preset_say_so() -> None:
    assert summarise_states([state("lora", "done", 9.0, debug="smoke"), state("mam", "missing")]).startswith(
        "2 runs (debug=smoke): 1 done, 1 missing"
    )
    assert summarise_states([state("lora", "done", 9.0)]) == "1 run: 1 done"


def test_several_sweeps_share_a_line_of_what_they_have_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["-m", "task=text_classification", "task.train_file=a b.csv"]
    for seed, own in ((1, ["method=lora"]), (2, ["method=mam", "bottleneck=4"])):
        member = Member([], replace(RUN, seed=seed, output_dir=str(tmp_path)))
        Plan.of([member], [*shared, *own]).save(tmp_path)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Each sweep: peftbench train -m task=text_classification 'task.train_file=a b.csv'"
    assert [line for line in lines if line.startswith("...")] == ["... method=lora", "... method=mam bottleneck=4"]


def test_done_runs_are_listed_where_asked(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(outputs)])
    assert "1:00:00" not in capsys.readouterr().out
    main([str(outputs), "--all"])
    assert "1:00:00" in capsys.readouterr().out


def test_a_torn_plan_is_named_and_left_out(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outputs / ".sweeps" / "torn.sweep.json").write_text('{"arguments": [')
    others = ['{"a": 1}', "[]", '{"arguments": [], "points": [{"folder": 3, "method": "lora", "settings": {}}]}']
    for number, text in enumerate(others):
        (outputs / ".sweeps" / f"other{number}.sweep.json").write_text(text)
    main([str(outputs)])
    captured = capsys.readouterr()
    assert "points[0].folder is '3'" in captured.err
    assert captured.err.count("is left out") == 4 and "5 runs" in captured.out


def test_a_plan_that_is_there_is_not_written_again(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a sweep that has filled the disk still ends with its table."""
    (file,) = outputs.rglob("*.sweep.json")
    plan = Plan.load(file)

    def disk_full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", disk_full)
    plan.save(outputs)
    with pytest.raises(OSError, match="no space"):
        replace(plan, arguments=["-m", "other"]).save(outputs)


def test_without_a_sweep_the_way_to_one_is_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no sweep; make one with: peftbench train -m"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="is not a folder"):
        main([str(tmp_path / "nowhere")])
