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
from peftbench.results.choice import known, sentence
from peftbench.results.columns import text
from peftbench.results.identity import plain, run_dir
from peftbench.results.record import Record, describe, differing, find, finished, flatten, replacing
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
    name: str = ""  # of its file

    @classmethod
    def of(cls, points: Sequence[tuple[list[str], Run]], arguments: Sequence[str]) -> Plan:
        """The plan of runs that are given with the overrides that make them.

        A run with a search stands for what it comes to, as far as that is known yet.
        """
        root = Path(points[0][1].output_dir).expanduser()
        name = hashlib.sha256("\n".join(sorted(_below(root, run_dir(run)) for _, run in points)).encode())
        settled = [known(run) for _, run in points]
        given = [_given(overrides, run, comes_to) for (overrides, run), comes_to in zip(points, settled, strict=True)]
        keys = differing(given)
        runs = {
            folder: Point(
                _below(root, folder),
                run.method,
                {key: values[key] for key in keys if key in values},
            )
            for values, run in zip(given, settled, strict=True)
            for folder in [run_dir(run)]
        }
        return cls(list(arguments), list(runs.values()), name.hexdigest()[:8])

    def save(self, root: Path) -> None:
        """Write the file. The same runs have the same file, however they were typed, and whatever searches come to."""
        folder = root / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{self.name}{SUFFIX}") as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read what `save` wrote. Raises ValueError for anything else."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                values["arguments"], [Point(**point) for point in values["points"]], file.name.removesuffix(SUFFIX)
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is not the plan of a sweep ({error})") from error


def _below(root: Path, folder: Path) -> str:
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder.resolve())


def _given(overrides: Sequence[str], run: Run, comes_to: Run) -> dict[str, str]:
    """What was typed for a run, and what its search has set."""
    words = dict(word.split("=", 1) for word in overrides if "=" in word)
    if run.search is None:
        return words
    words = {key: value for key, value in words.items() if not key.startswith("search.")}
    is_trial = run.search.trial is not None
    chosen = {} if comes_to.search is not None else dict(flatten(plain(comes_to)))
    words |= {key: text(chosen[key]) for key in run.search.keys if key in chosen}
    return {**words, "search": f"{run.search.name} trial" if is_trial else run.search.name}


class Sweep:
    """A sweep that is under way in this process. `runs` are its own, without the trials of its searches."""

    def __init__(
        self,
        points: Sequence[tuple[list[str], Run]],
        arguments: Sequence[str],
        trials: Sequence[tuple[list[str], Run]],
    ) -> None:
        self.points, self.arguments, self.trials = points, arguments, trials
        self.runs: dict[Path, Run] = {}
        self.done_before = {folder for _, run in trials if finished(folder := run_dir(known(run))) is not None}
        self.settle()

    @classmethod
    def start(
        cls,
        points: Sequence[tuple[list[str], Run]],
        arguments: Sequence[str],
        trials: Sequence[tuple[list[str], Run]] = (),
    ) -> Sweep:
        """Write the list of the sweep's runs, and of the trials before them, beside them."""
        return cls(points, arguments, trials)

    def settle(self) -> None:
        """Take in what the searches have come to, and write the list of runs."""
        compared = {run_dir(known(run)) for _, run in self.trials}
        runs = {run_dir(run): run for run in (known(run) for _, run in self.points)}
        new = runs.keys() - self.runs.keys() - compared
        self.done_before |= {folder for folder in new if finished(folder) is not None}
        self.runs = runs
        Plan.of([*self.trials, *self.points], self.arguments).save(Path(self.points[0][1].output_dir).expanduser())

    def show(self) -> int:
        """Print the table of all runs with how each ended; returns 0 if every run is done, else 1."""
        self.settle()
        records = [self._record(folder, run) for folder, run in self.runs.items()]
        console = Console()
        console.print()
        show(records, console, status=self._status)
        console.print()
        # Of runs that differ in their seed one line says what was searched.
        for line in dict.fromkeys(
            sentence(record) for record in records if record.search and record.search.role == "final"
        ):
            console.print(line, highlight=False)
        console.print(self._summary(records), highlight=False)
        return 0 if all(record.status == "done" for record in records) else 1

    def _record(self, folder: Path, run: Run) -> Record:
        return find(folder) or describe(run, folder, [], "missing")

    def _status(self, record: Record) -> str:
        if record.error is not None:
            return f"{record.status}: {record.error.name}"
        earlier = record.folder in self.done_before and not self.runs[record.folder].rerun
        return "done before" if earlier else record.status

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
