"""Measures how long peftbench's commands take to start: the median of a few tries, and the heavy libraries they import.

python scripts/benchmark_startup.py [--tries 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from joblib import cpu_count
from rich.console import Console
from rich.table import Table

HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib", "scipy", "sklearn", "evaluate")
SWEEP = "train -m method=lora,bitfit debug=smoke task.baselines=[] output_dir=TEMPORARY"
COMMANDS: dict[str, float | None] = {  # with their limits, in seconds on two cores
    "--help": 0.5,
    "ls": None,
    "ls axes": None,
    "train --help": None,
    "train --cfg job": None,
    "status TEMPORARY": None,
    "results TEMPORARY": None,
    "params method=mam model=bart_large": 5.0,
    "params -m method=lora,mam,prefix model=bart_large": None,
    "explain method=mam model=bart_large": None,
    "train method=lora debug=smoke task.baselines=[] rerun=true output_dir=TEMPORARY": None,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=5, help="of each command; default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        _run(SWEEP, folder)
        found = [_timed(command, folder, most, arguments.tries) for command, most in COMMANDS.items()]
    if arguments.out is not None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        values = {"date": date, "cores": cpu_count(), "python": sys.version.split()[0], "commands": found}
        arguments.out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{cpu_count()} cores", title_justify="left")
    table.add_column("peftbench")
    for name in ("seconds", "of CPU", "at most"):
        table.add_column(name, justify="right")
    table.add_column("imports")
    for row in found:
        most = "" if row["at_most_s"] is None else f"{row['at_most_s']:.1f}"
        table.add_row(row["command"], f"{row['seconds']:.2f}", f"{row['cpu_s']:.2f}", most, ", ".join(row["imports"]))
    Console().print(table)
    return int(any(row["at_most_s"] is not None and row["seconds"] > row["at_most_s"] for row in found))


def _timed(command: str, folder: str, most: float | None, tries: int) -> dict[str, Any]:
    """The figures of one command. An extra try, not timed, shows what it imports and warms the system's caches."""
    imports = _run(command, folder, "-X", "importtime")
    taken, worked = [], []
    for _ in range(tries):
        began, before = time.perf_counter(), os.times()
        _run(command, folder)
        after = os.times()
        taken.append(time.perf_counter() - began)
        worked.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return {
        "command": command,
        "seconds": median(taken),
        "cpu_s": median(worked),  # does not depend on other work of the machine
        "tries_s": taken,
        "at_most_s": most,
        "imports": [name for name in HEAVY if re.search(rf"\| +{name}$", imports, re.MULTILINE)],
    }


def _run(command: str, folder: str, *options: str) -> str:
    """What a command prints on stderr. Ends the script if the command fails."""
    words = command.replace("TEMPORARY", folder).split()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, *options, "-m", "peftbench", *words]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{done.stderr[-2000:]}\nbenchmark_startup: exit code {done.returncode} of peftbench {command}")
    return done.stderr


if __name__ == "__main__":
    sys.exit(main())
