"""A sweep: the list of its runs, kept beside them, and the table at its end. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from peftbench.config import Run
from peftbench.results.identity import run_dir
from peftbench.results.record import Record, describe, differing, find, finished, replacing
from peftbench.results.table import show

FOLDER = ".sweeps"  # below the output_dir
SUFFIX = ".sweep.json"


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `settings` are the values of the keys that the sweep goes over."""

    folder: str  # below the folder in which `FOLDER` lies
    method: str
    settings: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep as its file keeps them: `OUTPUT_DIR/.sweeps/NAME.sweep.json`."""

    arguments: list[str]  # what was typed after `peftbench train`
    points: list[Point]

    @classmethod
    def of(cls, points: Sequence[tuple[list[str], Run]], arguments: Sequence[str]) -> Plan:
        """The plan of runs that are given with the overrides that make them."""
        root = Path(points[0][1].output_dir).expanduser()
        given = [dict(word.split("=", 1) for word in overrides if "=" in word) for overrides, _ in points]
        keys = differing(given)
        runs = {
            folder: Point(
                str(folder.relative_to(root) if folder.is_relative_to(root) else folder.resolve()),
                run.method,
                {key: values[key] for key in keys if key in values},
            )
            for values, (_, run) in zip(given, points, strict=True)
            for folder in [run_dir(run)]
        }
        return cls(list(arguments), list(runs.values()))

    def save(self, root: Path) -> None:
        """Write the file. The same runs have the same file, however they were typed."""
        name = hashlib.sha256("\n".join(sorted(point.folder for point in self.points)).encode()).hexdigest()[:8]
        folder = root / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{name}{SUFFIX}") as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read what `save` wrote. Raises ValueError for anything else."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(values["arguments"], [Point(**point) for point in values["points"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is not the plan of a sweep ({error})") from error


class Sweep:
    """A sweep that is under way in this process."""

    def __init__(self, runs: Sequence[Run], plan: Plan) -> None:
        self.plan = plan
        self.root = Path(runs[0].output_dir).expanduser()  # below which the folders of the plan are
        self.runs = {run_dir(run): run for run in runs}
        self.done_before = {folder for folder in self.runs if finished(folder) is not None}

    @classmethod
    def start(cls, points: Sequence[tuple[list[str], Run]], arguments: Sequence[str]) -> Sweep:
        """Write the list of the sweep's runs beside them."""
        sweep = cls([run for _, run in points], Plan.of(points, arguments))
        sweep.plan.save(sweep.root)
        return sweep

    def show(self) -> int:
        """Print the table of all runs with how each ended; returns 0 if every run is done, else 1."""
        records = [self._record(folder, run) for folder, run in self.runs.items()]
        console = Console()
        console.print()
        show(records, console, status=self._status)
        console.print()
        console.print(self._summary(records), highlight=False)
        return 0 if all(record.status == "done" for record in records) else 1

    def was_done_before(self, folder: Path) -> bool:
        """Whether the run in a folder was done when the sweep began, and is not trained again."""
        return folder in self.done_before and not self.runs[folder].rerun

    def _record(self, folder: Path, run: Run) -> Record:
        return find(folder) or describe(run, folder, [], "missing")

    def _status(self, record: Record) -> str:
        if record.error is not None:
            return f"{record.status}: {record.error.name}"
        return "done before" if self.was_done_before(record.folder) else record.status

    def _summary(self, records: Sequence[Record]) -> str:
        counted = Counter(self._status(record).partition(":")[0] for record in records)
        done = sum(record.status == "done" for record in records)
        sentences = [f"{done} of {len(records)} runs are done."]
        if counted["done before"]:
            sentences[0] = f"{done} of {len(records)} runs are done, {counted['done before']} of them before."
        if counted["failed"]:
            sentences.append(f"{counted['failed']} failed; retry=true trains failed ones again.")
        unfinished = len(records) - done - counted["failed"]
        if unfinished:
            sentences.append(f"{unfinished} unfinished; the same line goes on with them.")
        return " ".join(sentences)
