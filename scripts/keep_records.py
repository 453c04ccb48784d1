#!/usr/bin/env python
"""Copies what is worth keeping of finished runs into a folder that is small enough for a repository.

    python scripts/keep_records.py OUTPUTS outputs/reference/grid --shared SHARED

Of each run that is done: its record and its config, in which the paths of this machine read SHARED and OUTPUTS, and of
its log every look at the selection split and each fifth line of training, to six digits. A run's name and its content
stamps are left as they are: they say what it was trained on, wherever that lay. Predictions are left out, since beside
them stand the references, which are the data's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peftbench.records.record import FILE, Record, load_records
from peftbench.records.run_files import METRICS, logged
from peftbench.utils.files import write_lines

EVERY = 5  # lines of the training's log
DIGITS = 6  # of its numbers


def keep(record: Record, target: Path, shared: str) -> None:
    """Writes what is kept of a run to the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    (outputs,) = {word.partition("=")[2] for word in record.overrides if word.startswith("output_dir=")}
    for name in (FILE, "config.yaml"):
        text = (record.folder / name).read_text(encoding="utf-8")
        (target / name).write_text(text.replace(shared, "SHARED").replace(outputs, "OUTPUTS"), encoding="utf-8")
    write_lines(target / METRICS, thinned(logged(record.folder)))


def thinned(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """The lines of a log that are kept, their numbers rounded."""
    looks = [any(key.startswith("eval_") for key in line) for line in lines]
    training = [index for index, look in enumerate(looks) if not look]
    kept = set(training[EVERY - 1 :: EVERY]) | set(training[-1:])
    return [
        {key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for key, value in line.items()}
        for index, line in enumerate(lines)
        if looks[index] or index in kept
    ]


def main() -> None:
    """Copies the runs and prints how many there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("outputs", type=Path, help="the folder of the runs")
    parser.add_argument("target", type=Path, help="where they are kept")
    parser.add_argument("--shared", required=True, help="the folder of data and backbones, as the configs name it")
    arguments = parser.parse_args()
    found, _ = load_records(arguments.outputs)
    done = [record for record in found if record.status == "done"]
    for record in done:
        target = arguments.target / record.folder.relative_to(arguments.outputs)
        keep(record, target, arguments.shared.rstrip("/"))
    print(f"{len(done)} of {len(found)} runs are kept in {arguments.target}")


if __name__ == "__main__":
    main()
