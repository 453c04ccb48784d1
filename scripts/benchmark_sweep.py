"""Compares one sweep with `jobs=` to single `peftbench train` commands for the same runs: times and scores.

    python scripts/benchmark_sweep.py --model FOLDER --data FOLDER [--jobs 8] [--mps both] [--all] [--out FILE]
                                      [KEY=VALUE ...]

24 runs on webnlg: 4 methods x 3 learning rates x 2 seeds, 300 steps each. Only some single commands are timed, one of
each method, and their mean is used for all; --all times every one. The first is also run once in advance, untimed,
which fills the caches and gives the noise from run to run. --mps both sweeps twice, without and with `mps=true`, and
compares both with the same single commands. --model is the backbone's folder, as in `model.path`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from itertools import product
from math import prod
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from peftbench.records.record import Record, load_records

AXES = {
    "method": ["lora", "prefix", "adapter", "mam"],
    "trainer.learning_rate": ["3e-4", "1e-3", "3e-3"],
    "seed": ["1", "2"],
}
TARGET = 1 / 3
MPS = {"false": ["false"], "true": ["true"], "both": ["false", "true"]}


def main() -> int:
    arguments = _arguments()
    fixed = [
        f"task={arguments.task}",
        f"task.data_dir={arguments.data.resolve()}",
        "model=mini",  # for its sizes
        f"model.path={arguments.model.resolve()}",
        "trainer=quick",
        f"trainer.max_steps={arguments.steps}",
        *arguments.overrides,
    ]
    points = [[f"{key}={value}" for key, value in zip(AXES, values, strict=True)] for values in product(*AXES.values())]
    timed = points if arguments.all else points[:: len(points) // len(AXES["method"])]
    root = arguments.outputs or Path(tempfile.mkdtemp(prefix="benchmark_sweep-"))

    again = root / "again"
    _train(root, "again", [*fixed, *timed[0]])
    singles_s = [_train(root, "singles", [*fixed, *point]) for point in timed]
    alone = _by_run(root / "singles")
    first = next(iter(_by_run(again).items()))
    single_s = mean(singles_s) * len(points)
    example = next(iter(alone.values()))
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": example.device,
        "versions": example.versions,
        "git": example.git,
        "arguments": fixed,
        "runs": len(points),
        "jobs": arguments.jobs,
        "singles_s": singles_s,
        "singles_in_all_s": single_s,
        "run_alone_s": median(record.timings["total_s"] for record in alone.values()),
        "metric": example.metric,
        "run_to_run_difference": abs(_score(first[1]) - _score(alone[first[0]])),
        "sweeps": [_sweep(root, fixed, arguments.jobs, mps, single_s, alone) for mps in MPS[arguments.mps]],
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    _show(found, len(timed))
    return 0


def _sweep(
    root: Path, fixed: list[str], jobs: str, mps: str, single_s: float, alone: Mapping[str, Record]
) -> dict[str, Any]:
    """Train all runs as one sweep.

    Args:
        single_s: their time as single commands.
        alone: the records of the timed single commands.
    """
    folder = f"sweep-mps-{mps}"
    swept = [f"{key}={','.join(values)}" for key, values in AXES.items()]
    sweep_s = _train(root, folder, ["-m", *fixed, *swept, f"jobs={jobs}", f"mps={mps}"])
    beside = _by_run(root / folder)
    assert len(beside) == prod(map(len, AXES.values())) and alone.keys() <= beside.keys()
    return {
        "mps": mps,
        "at_once": len(list((root / folder / ".sweeps").rglob("worker-*.log"))) or 1,
        "sweep_s": sweep_s,
        "ratio": sweep_s / single_s,
        "run_beside_s": median(record.timings["total_s"] for record in beside.values()),
        "largest_score_difference": max(abs(_score(beside[run]) - _score(record)) for run, record in alone.items()),
        "peak_memory_bytes": max((record.peak_memory_bytes or 0 for record in beside.values()), default=0),
        "scores": {
            run: {
                "settings": record.overrides,
                "sweep": record.score,
                "single": alone[run].score if run in alone else None,
            }
            for run, record in beside.items()
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of every run")
    parser.add_argument("--model", type=Path, required=True, help="folder of the backbone")
    parser.add_argument("--data", type=Path, required=True, help="folder of the task's data")
    parser.add_argument("--task", default="webnlg", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of each run; default: %(default)s")
    parser.add_argument("--jobs", default="auto", help="runs at once; default: %(default)s")
    parser.add_argument("--mps", default="false", choices=MPS, help="the sweep's mps=; both: one after the other")
    parser.add_argument("--all", action="store_true", help="time all single commands instead of one of each method")
    parser.add_argument("--outputs", type=Path, help="an empty folder for the runs; default: a temporary one")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_intermixed_args()
    if arguments.outputs is not None and arguments.outputs.is_dir() and any(arguments.outputs.iterdir()):
        parser.error(f"--outputs {arguments.outputs} is not empty: finished runs in it would take no time.")
    return arguments


def _train(root: Path, folder: str, words: list[str]) -> float:
    """Seconds of one `peftbench train`, whose output goes to a file. Ends the script if the command fails."""
    root.mkdir(parents=True, exist_ok=True)
    log = root / f"{folder}.log"
    began = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "peftbench", "train", *words, f"output_dir={root / folder}"]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - began
    if code:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-20:])
        sys.exit(f"{tail}\nbenchmark_sweep: exit code {code} of peftbench train {' '.join(words)}; see {log}.")
    print(f"{seconds:6.1f} s  {folder}: {' '.join(words[-3:])}", flush=True)
    return seconds


def _by_run(folder: Path) -> dict[str, Record]:
    return {record.run: record for record in load_records(folder)[0]}


def _score(record: Record) -> float:
    assert record.score is not None
    return record.score


def _show(found: dict[str, Any], timed: int) -> None:
    console = Console()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    console.print(f"\n{found['device']}, {versions}; {' '.join(found['arguments'])}", highlight=False)
    counted = "all timed" if timed == found["runs"] else f"{timed} timed, their mean x {found['runs']}"
    table = Table("", "seconds", "ratio", title=f"{found['runs']} runs", title_justify="left")
    table.add_row(f"single commands ({counted})", f"{found['singles_in_all_s']:.1f}", "1.000")
    for sweep in found["sweeps"]:
        table.add_row(
            f"one sweep, {sweep['at_once']} at once (jobs={found['jobs']} mps={sweep['mps']})",
            f"{sweep['sweep_s']:.1f}",
            f"{sweep['ratio']:.3f}",
        )
    table.add_row("target", f"{found['singles_in_all_s'] * TARGET:.1f}", f"{TARGET:.3f}")
    table.add_row("one run alone, without its start", f"{found['run_alone_s']:.1f}", "")
    for sweep in found["sweeps"]:
        table.add_row(f"one run together with others (mps={sweep['mps']})", f"{sweep['run_beside_s']:.1f}", "")
    console.print(table)
    for sweep in found["sweeps"]:
        console.print(
            f"{found['metric']}: sweep (mps={sweep['mps']}) and single differ by at most "
            f"{sweep['largest_score_difference']:.4f} over {timed} runs; one run twice alone by "
            f"{found['run_to_run_difference']:.4f}",
            highlight=False,
        )


if __name__ == "__main__":
    sys.exit(main())
