#!/usr/bin/env python
"""Copies the records of finished runs into a folder that is small enough for a repository.

    python scripts/keep_records.py OUTPUTS outputs/reference/grid --shared SHARED

For each finished run it keeps the record and the config, in which the paths of this machine are replaced by SHARED and
OUTPUTS, and of the log every look at the selection split and every fifth line of training, to six digits. A run's name
and its content stamps stay: they say what it was trained on, wherever the data was stored. Predictions are left out,
since their file also contains the references, which belong to the data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peftbench.records.record import FILE, Record, load_records
from peftbench.records.run_files import METRICS_FILE, read_metrics
from peftbench.utils.files import write_lines

EVERY = 5  # every fifth line of the training log is kept
DIGITS = 6  # significant digits of its numbers


def keep(record: Record, target: Path, shared: str) -> None:
    """Write what is kept of a run to the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    (outputs,) = {word.partition("=")[2] for word in record.overrides if word.startswith("output_dir=")}
    for name in (FILE, "config.yaml"):
        text = (record.folder / name).read_text(encoding="utf-8")
        (target / name).write_text(text.replace(shared, "SHARED").replace(outputs, "OUTPUTS"), encoding="utf-8")
    write_lines(target / METRICS_FILE, thinned(read_metrics(record.folder)))


def thinned(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """The kept lines of a log, with rounded numbers."""
    looks = [any(key.startswith("eval_") for key in line) for line in lines]
    training = [index for index, look in enumerate(looks) if not look]
    kept = set(training[EVERY - 1 :: EVERY]) | set(training[-1:])
    return [
        {key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for key, value in line.items()}
        for index, line in enumerate(lines)
        if looks[index] or index in kept
    ]


def main() -> None:
    """Copy the runs and print their number."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("outputs", type=Path, help="the folder of the runs")
    parser.add_argument("target", type=Path, help="the folder to copy them to")
    parser.add_argument("--shared", required=True, help="the folder of data and backbones, as in the configs")
    arguments = parser.parse_args()
    found, _ = load_records(arguments.outputs)
    done = [record for record in found if record.status == "done"]
    for record in done:
        target = arguments.target / record.folder.relative_to(arguments.outputs)
        keep(record, target, arguments.shared.rstrip("/"))
    print(f"{len(done)} of {len(found)} runs are kept in {arguments.target}")


if __name__ == "__main__":
    main()
