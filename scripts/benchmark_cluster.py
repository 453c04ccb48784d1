"""Measures what a sweep of ten thousand runs asks of a file system, and how long its commands take.

python scripts/benchmark_cluster.py [--runs 10000] [--folder FOLDER] [--out FILE]

The runs are made up: each has the record of a finished run. What composing and
writing cost is measured on 100 of them. Opened files and listed folders are counted by Python's audit events, since on
a shared file system these take the time: a millisecond each, or more if many nodes are busy. FOLDER may be on such a
file system; the default is a temporary one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from peftbench.cli import results, status
from peftbench.config.compose import TypedRun, compose_points
from peftbench.records.location import locate_run
from peftbench.records.lock import hold_run
from peftbench.records.record import RecordedCounts, Score, find_finished
from peftbench.records.recording import start_record
from peftbench.sweeps.live import LiveSweep
from peftbench.sweeps.plan import Plan, PlannedRun, Sweep

WORDS = ["task=doctopic", "debug=smoke"]
SAMPLE = 100  # runs of which composing and writing are measured
METHODS = ("lora", "mam", "prefix", "head", "bitfit", "adapter", "pfeiffer", "lora_ffn", "ia3", "parallel_adapter")
COUNTED = {"open": "opened", "os.listdir": "listed", "os.scandir": "listed", "os.rename": "renamed"}
MEASURES = ("seconds", "opened", "listed", "renamed")
counts: Counter[str] = Counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="an empty folder on the file system to measure")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    sys.addaudithook(_count)
    with contextlib.ExitStack() as stack:
        root = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        figures = list(_measure(root, arguments.runs))
        _show(figures, arguments.runs)
        if arguments.folder is not None:
            shutil.rmtree(root)
    if arguments.out is not None:
        stated = {"runs": arguments.runs, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        arguments.out.write_text(json.dumps({**stated, "figures": figures}, indent=1) + "\n")
    return 0


def _count(event: str, details: tuple[Any, ...]) -> None:
    if event in COUNTED:
        counts[COUNTED[event]] += 1


def _measure(root: Path, runs: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each step of a sweep, on a sample of its runs, and for what reads all records."""
    line = [*WORDS, f"method={','.join(METHODS)}", f"output_dir={root}"]
    line.append(f"seed={','.join(map(str, range(1, 1 + SAMPLE // len(METHODS))))}")
    sample: list[TypedRun] = []
    yield _take(f"{SAMPLE} runs are composed and checked", lambda: sample.extend(compose_points(line, multirun=True)))
    yield _take(f"{SAMPLE} runs get folders, locks and records", lambda: _write_records(sample))
    yield _take(f"the line of {SAMPLE} runs again: the plan, and what is done", lambda: Sweep(sample, line))
    point = sample[0][1]
    yield _take("one run: is it done?", lambda: find_finished(locate_run(point)))

    plan = Plan(line, [PlannedRun(str(folder), "lora", {}) for folder in _copy_records(root, sample, runs)], "all")
    yield _take(f"the plan of {runs:,} runs is written", lambda: plan.save(root))
    live = LiveSweep(cast(Sweep, SimpleNamespace(plan=plan, root=root)), Console(file=io.StringIO()))
    yield _take("the live table: the first picture", live._read)
    yield _take("the live table: a further picture", live._read)
    yield _take("peftbench status", lambda: _quietly(status.main, [str(root)]))
    yield _take("peftbench results --mean", lambda: _quietly(results.main, [str(root), "--mean"]))


def _write_records(points: Sequence[TypedRun]) -> None:
    """Write what a run writes that does nothing."""
    for number, (words, run) in enumerate(points):
        with hold_run(locate_run(run)):
            record = start_record(run, locate_run(run), words)
            record.score, record.counts = 50 + number % 400 / 10, RecordedCounts(4_737_408, 1000, 1000, 0, 1000)
            record.scores["report"] = Score("test", 16, {"accuracy": record.score})
            record.finish()


def _copy_records(root: Path, sample: Sequence[TypedRun], runs: int) -> list[Path]:
    """Copy the records of the sample, with seeds of their own, until there are as many; return all folders."""
    folders = [locate_run(run) for _, run in sample]
    for number in range(runs - len(folders)):
        folder, seed = folders[number % len(sample)], SAMPLE + number
        copy = folder.with_name(f"{number:08x}")
        copy.mkdir()
        values = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        (copy / "record.json").write_text(json.dumps({**values, "run": copy.name, "seed": seed}), encoding="utf-8")
        folders.append(copy)
    return [folder.relative_to(root) for folder in folders]


def _take(step: str, action: Callable[[], Any]) -> dict[str, Any]:
    counts.clear()
    began = time.perf_counter()
    action()
    return {"step": step, "seconds": round(time.perf_counter() - began, 3), **counts}


def _quietly(command: Callable[[list[str]], Any], arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        command(arguments)


def _show(figures: list[dict[str, Any]], runs: int) -> None:
    table = Table("step", title=f"{runs:,} runs")
    for name in MEASURES:
        table.add_column(name, justify="right")
    for row in figures:
        table.add_row(row["step"], *(f"{row[name]:,}" if name in row else "" for name in MEASURES))
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
