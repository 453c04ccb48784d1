"""A sweep: the plan of its runs, which is stored next to them, and the table at its end."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from filelock import FileLock

from peftbench.config.compose import TypedRun as TypedRun
from peftbench.config.schema import Run, get_value, index_by_key
from peftbench.config.search import has_open_search, is_unreported, list_further_trials
from peftbench.records.choice import Compared, NoChoice, describe_search_choice, settle_search, try_settle
from peftbench.records.location import locate_run
from peftbench.records.record import FILE, Record, decode, find_finished, find_record
from peftbench.records.recording import describe_run
from peftbench.records.wording import format_value
from peftbench.tables.terminal import show_records
from peftbench.utils.console import make_console
from peftbench.utils.differences import find_distinctive
from peftbench.utils.errors import UserError
from peftbench.utils.files import clear_unfinished, expand_home, read_json, refuse_links, replace_file

FOLDER = ".sweeps"  # below the output_dir
SUFFIX = ".sweep.json"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep. `settings` are the values of the keys that the sweep goes over."""

    folder: str  # below the folder in which `FOLDER` lies
    method: str
    settings: dict[str, str]
    unreported: bool = False  # a trial of which the report split is not scored
    follows_trial: bool = False  # it will go on from the trial that its search chooses, which is yet to be chosen


class Member:
    """A run of a sweep as it was typed, and what it becomes: with a search, another run once its trials are done."""

    def __init__(self, overrides: Sequence[str], run: Run, compared: Compared | None = None) -> None:
        self.compared = compared or Compared()  # what the sweep knows of trials
        self.overrides, self.run, self.comes_to = overrides, run, run
        self.asked = self.folder = locate_run(run, self.compared.stamp)
        self.settle()

    @property
    def is_further(self) -> bool:
        """Whether it is the trial of a further value of a search, which the records of other trials call for."""
        return self.run.search is not None and bool(self.run.search.further)

    @property
    def follows_trial(self) -> bool:
        """Whether the run is that of a search's trials with the best values, and the search has not chosen them."""
        search = self.comes_to.search
        return has_open_search(self.comes_to) and search is not None and search.seed in (None, self.run.seed)

    def settle(self) -> None:
        """Check whether the search of the run can be settled now, and to what: a trial may have been trained again."""
        if self.run.search is not None:
            self.comes_to = try_settle(self.run, self.compared)
            self.folder = (
                self.asked if self.comes_to.search is not None else locate_run(self.comes_to, self.compared.stamp)
            )

    def settings(self) -> dict[str, str]:
        """Return what was typed, by key, and what a search has chosen."""
        words = index_by_key(self.overrides)
        search = self.run.search
        if search is None:
            return words
        words = {key: value for key, value in words.items() if not key.startswith("search.")}
        if self.comes_to.search is None:
            words |= {key: _format_typed(get_value(self.comes_to, key)) for key in search.keys}
        return {**words, "search": search.name if search.trial is None else f"{search.name} trial"}


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep as its file stores them: `OUTPUT_DIR/.sweeps/NAME.sweep.json`."""

    arguments: list[str]  # what was typed after `peftbench train`
    points: list[PlannedRun]
    name: str = ""  # of its file

    @classmethod
    def of(cls, members: Sequence[Member], arguments: Sequence[str]) -> Plan:
        """Return the plan of a sweep's runs and of the trials before them."""
        root = expand_home(members[0].run.output_dir)
        asked = {relate_path(root, member.asked) for member in members if not member.is_further}
        name = hashlib.sha256("\n".join(sorted(asked)).encode())
        given = [member.settings() for member in members]
        keys = find_distinctive(given)
        runs = {
            member.folder: PlannedRun(
                relate_path(root, member.folder),
                member.run.method,
                {key: values[key] for key in keys if key in values},
                unreported=is_unreported(member.run),
                follows_trial=member.follows_trial,
            )
            for values, member in zip(given, members, strict=True)
        }
        return cls(list(arguments), list(runs.values()), name.hexdigest()[:8])

    def save(self, root: Path) -> None:
        """Write the file. The same runs have the same file, however they were typed and whatever searches choose."""
        path = root / FOLDER / f"{self.name}{SUFFIX}"
        with suppress(OSError, ValueError):
            if Plan.load(path) == self:  # nothing new: a sweep shows its table even if the disk is full
                os.utime(path)  # `peftbench status` has the latest sweep last
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_links(root / FOLDER)
        with FileLock(path.with_name(f"{self.name}.lock")):  # two processes may be at the same sweep
            clear_unfinished(path.parent, f"{path.name}.")
            with replace_file(path) as file:
                file.write(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read what `save` wrote. Raise ValueError for anything else."""
        values = read_json(file)
        if not isinstance(values, dict):
            raise ValueError("it is not the plan of a sweep")
        plan: Plan = decode(cls, {**values, "name": file.name.removesuffix(SUFFIX)})
        return plan


def find_plans(folder: Path) -> list[Path]:
    """Return the files of the plans anywhere below a folder, the latest last, without what is deleted meanwhile."""
    dated = []
    for place, below, names in os.walk(folder):
        if FILE in names:  # of a run, whose checkpoints come and go
            below.clear()
        elif Path(place).name == FOLDER:
            for file in (Path(place, name) for name in names if name.endswith(SUFFIX)):
                with suppress(FileNotFoundError):
                    dated.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(dated)]


def relate_path(root: Path, folder: Path) -> str:
    """Return the path of a folder from `root`, below which a plan stands; an absolute one for a folder elsewhere."""
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder.resolve())


def _explain_no_choice(run: Run, compared: Compared) -> str | None:
    """Return why the trials of a run's search leave nothing to choose, or None if they leave something."""
    try:
        settle_search(run, compared)
    except NoChoice as error:
        return str(error)
    except UserError:  # not done yet
        pass
    return None


def _format_typed(value: object) -> str:
    return value.name if isinstance(value, Enum) else format_value(value)


class Sweep:
    """A sweep that this process trains. `runs` are its own, without the trials of its searches."""

    def __init__(self, points: Sequence[TypedRun], arguments: Sequence[str], trials: Sequence[TypedRun] = ()) -> None:
        """Write the list of the sweep's runs, and of the trials before them, below their output_dir."""
        self.compared = Compared()
        self.members = [Member(*point, self.compared) for point in points]
        self.trials = [Member(*point, self.compared) for point in trials]
        self._further: dict[str, list[Member]] = {}  # of each search
        self._made: dict[tuple[str, ...], Member] = {}
        self.arguments = arguments
        self.root = expand_home(self.members[0].run.output_dir)  # below which the folders of the plan are
        self.done_before: set[Path] = set()
        self._seen: set[Path] = set()  # folders in the plan, now or before
        self._find_further(self.members)
        self.write_plan()

    @property
    def further(self) -> list[Member]:
        """The trials of the further values that are known to be needed."""
        return [trial for found in self._further.values() for trial in found]

    def settle(self) -> None:
        """Settle the searches whose trials are done by now, and write the plan."""
        self.compared.look_anew()
        self._settle(self.members)
        self.write_plan()

    def settle_members(self, members: Sequence[Member]) -> None:
        """Settle one search, of which these are all runs, if its trials are done by now. Other files than the records
        of its trials are not read, and the plan is not written."""
        self.compared.forget(members[0].run)
        self._settle(members)

    def _settle(self, members: Sequence[Member]) -> None:
        for member in members:
            member.settle()
        self._find_further(members)

    def _find_further(self, members: Sequence[Member]) -> None:
        for member in members:
            if has_open_search(member.run):
                self._further[self.compared.identify(member.run)] = self.list_further(member)

    def write_plan(self) -> None:
        """Write the list of the runs as they are settled now."""
        listed = [*self.trials, *self.further, *self.members]
        new = {member.folder for member in listed} - self._seen
        self.done_before |= {folder for folder in new if find_finished(folder) is not None}
        self._seen |= new
        self.runs = {member.folder: member.comes_to for member in self.members}
        self.scored = {member.folder for member in self.members if not is_unreported(member.run)}  # their report split
        self.plan = Plan.of(listed, self.arguments)
        for member in listed:  # for the workers, to which the runs go
            for run in (member.run, member.comes_to):
                run.trackers_group = run.trackers_group or self.plan.name
        self.plan.save(self.root)

    def list_further(self, member: Member) -> list[Member]:
        """Return the trials of the further values that a run's search is known to need, in their order.

        Runs that differ in their seed share them.
        """
        run = member.run
        if not has_open_search(run) or (followed := self.compared.follow(run).search) is None:
            return []
        shared = self.compared.identify(run)
        found = []
        for overrides, trial in list_further_trials((list(member.overrides), replace(run, search=followed))):
            assert trial.search is not None
            key = (shared, repr(trial.search.further))
            if key not in self._made:
                self._made[key] = Member(overrides, trial, self.compared)
            found.append(self._made[key])
        return found

    def show(self) -> int:
        """Print the table of the runs that have begun, with how each ended; return 0 if all have ended, else 1.

        One that has diverged has ended too: that is a finding, which the last line names.
        """
        self.settle()
        records = [self._record(folder, run) for folder, run in self.runs.items()]
        console = make_console()
        console.print()
        if begun := [record for record in records if record.status != "missing"]:
            show_records(begun, console, status=self._status)
            console.print()
        # Runs that differ only in their seed share one line on what was searched.
        for line in dict.fromkeys(
            describe_search_choice(record) for record in records if record.search and record.search.role == "final"
        ):
            console.print(line, highlight=False)
        lost = {folder: fault for folder, run in self.runs.items() if (fault := _explain_no_choice(run, self.compared))}
        for line in dict.fromkeys(lost.values()):
            console.print(line, highlight=False)
        console.print(self._summary(records, len(lost)), highlight=False)
        return 0 if all(record.has_ended or self._is_trained(record) for record in records) else 1

    def _is_trained(self, record: Record) -> bool:
        """Return whether a run is a trial that was typed as one and is trained, whatever came of it since."""
        return record.unreported and record.folder not in self.scored

    def was_done_before(self, folder: Path) -> bool:
        """Return whether the run in a folder was done when the sweep began, and is not trained again."""
        return folder in self.done_before and not any(
            member.run.rerun for member in [*self.trials, *self.further, *self.members] if member.folder == folder
        )

    def _record(self, folder: Path, run: Run) -> Record:
        return find_record(folder) or describe_run(run, folder, [], "missing")

    def _status(self, record: Record) -> str:
        if record.status == "done" and self.was_done_before(record.folder):
            return "done before"
        if self._is_trained(record):
            return "trained"
        return "unscored" if record.status == "trained" else record.outcome

    def _summary(self, records: Sequence[Record], lost: int) -> str:
        counted = Counter(self._status(record).partition(":")[0] for record in records)
        done = sum(record.status == "done" for record in records)
        sentences = [f"{done} of {len(records)} runs are done."]
        if counted["done before"]:
            sentences[0] = f"{done} of {len(records)} runs are done, {counted['done before']} of them before."
        if counted["trained"]:
            ones = "1 is a trained trial" if counted["trained"] == 1 else f"{counted['trained']} are trained trials"
            sentences.append(f"{ones}, without a score on the report split.")
        if counted["diverged"]:
            ones = "1 diverged and has" if counted["diverged"] == 1 else f"{counted['diverged']} diverged and have"
            sentences.append(f"{ones} no score; rerun=true trains again what is done or diverged.")
        if counted["failed"]:
            sentences.append(f"{counted['failed']} failed; retry=true trains failed ones again.")
        if lost:
            sentences.append(f"{lost} cannot run: no trial has a score; retry=true trains failed trials again.")
        ended = done + counted["trained"] + counted["diverged"] + counted["failed"]
        unfinished = len(records) - ended - lost
        if unfinished:
            sentences.append(f"{unfinished} unfinished; the same line goes on with them.")
        return " ".join(sentences)
