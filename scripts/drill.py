"""A drill of what can go wrong around a run: it kills, fills disks, tears files and types nonsense, and counts losses.

python scripts/drill.py [--minutes 60] [--only KIND ...] [--seed 0] [--keep FOLDER]

Kinds of trials, taken in turn until the time is over (docs/robustness.md says what each of them promises):

  kill         SIGKILL before the n-th change of a file, and in the middle of writing one; then the same line again
  moment       SIGKILL at a random moment
  signal       SIGINT or SIGTERM at a random moment
  twins        the same line in two processes at once, one of which may be killed
  disk         no space (a small tmpfs, for root) or a limit on the size of files; then the same line with space again
  torn         a file of a run, a sweep or a study, stopped or done, is cut short, empty, garbage, null, {} or a folder;
               then every command
  cache        the same for each file of the cache
  outputs      export, merge, import, predict, evaluate, report and plot are killed, or find no space; then once more
  inputs       the same damages for data, backbones, adapters to import, inputs to predict, own configs
  environment  variables of launchers and libraries, in a process of its own
  words        command lines of every subcommand, made of known and of odd words (by hypothesis, where it is installed)
  records      records, plans, metrics and predictions with hostile names and values, in every table

A trial is survived if no command ends with a traceback, by a signal that nobody sent or without a word; if a line ends
well in the end, where a sentence has not named the file that it cannot be without; and if a run that ends has the same
bits as one that nothing happened to. The last lines say how many were tried and survived; exit code 1 if not all were.

All happens on a CPU, in a temporary folder, in processes forked from this one, which has imported everything once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drilling.damage import DAMAGES, FOLDER, GONE, harm, spoil, write_data
from drilling.environment import ENVIRONMENTS
from drilling.processes import Child, Loss, Said, die_at_change, limit_files, mount
from drilling.words import make_words

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
TRIALS = ["search=optuna", "search.trials=3", "search.sampler=random"]
JOURNAL = ".study.jsonl"  # text of Optuna's without a hash: a changed letter may be another choice


class Line:
    """A run of a second, and what it comes to if nothing happens to it."""

    def __init__(self, name: str, words: Sequence[str], drill: Drill) -> None:
        self.name, self.words, self.drill = name, list(words), drill
        self.took, self.changes = 0.0, 0
        self.expected: dict[str, str] = {}

    def learn(self) -> None:
        """Train it once, undisturbed."""
        began = time.monotonic()
        place = self.drill.new_place()
        Child(["train", *self.words], place).wait().check((0,))
        self.took = time.monotonic() - began
        self.expected = read_result(place)

    def finish(self, place: Path, what: str) -> None:
        """Type the line again, after what happened; Loss unless it ends, with the same result."""
        self.check(place, Child(["train", *self.words], place).wait().check((0,)), what)

    def check(self, place: Path, said: Said, what: str, harmed: str | None = None) -> None:
        """Raise Loss unless the run is done, with the same bits except in a file that was `harmed`, and has left
        nothing behind."""
        found = read_result(place)
        odd = sorted(key for key in {*found, *self.expected} if found.get(key) != self.expected.get(key))
        if harmed is not None:
            odd = [key for key in odd if not key.endswith(harmed)]
        if odd:
            raise Loss(f"different after {what}: {', '.join(odd)}\n{said.both[-800:]}")
        for left in [*filter(is_left, place.rglob("checkpoints")), *place.rglob("*.tmp")]:
            raise Loss(f"left behind after {what}: {left.relative_to(place)}")


def is_left(checkpoints: Path) -> bool:
    """Return whether a folder of checkpoints has more in it than a trial that was not chosen keeps, to go on with."""
    try:
        status = json.loads((checkpoints.parent / "record.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return True
    return status != "trained" or [file.name for file in checkpoints.iterdir()] != ["ended.json"]


def read_result(place: Path) -> dict[str, str]:
    """Return hashes of the adapters and predictions, and the scores, of the runs in a place."""
    found = {}
    for file in sorted(place.rglob("record.json")):
        name = file.parent.name
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            search = record.get("search")
        except (OSError, ValueError, AttributeError, RecursionError):
            found[f"{name} record.json"] = "damaged"
            continue
        found[f"{name} status"] = f"{record['status']} {search['role'] if search else ''}"
        found[f"{name} scores"] = json.dumps([record["scores"], record["steps"], record["baselines"]], sort_keys=True)
        for part in ("adapter/adapter.safetensors", "predictions.jsonl"):
            path = file.parent / part
            found[f"{name} {part}"] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    return found


def list_runs(place: Path) -> list[str]:
    """Return the folders of the runs in a place, relative to it, those of the classification first."""
    return sorted(str(file.parent.relative_to(place)) for file in place.rglob("record.json"))


def read_written(place: Path, out: str) -> dict[str, str]:
    """Return hashes of what a command wrote to `out`, without the files that have the time in them."""
    root = place / out
    files = [root] if root.is_file() else [file for file in sorted(root.rglob("*")) if file.is_file()]
    kept = [
        file for file in files if file.name != "record.json" and file.suffix not in (".html", ".md", ".lock", ".svg")
    ]
    return {str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


class Drill:
    """The trials, and what they have come to."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.tried, self.survived, self.losses = Counter[str](), Counter[str](), list[str]()
        self.count = 0
        self.data = root / "data"
        self.lines: dict[str, Line] = {}
        self.stopped: list[tuple[Line, Path]] = []  # copies of places in which a run was stopped
        self.queues: dict[str, Iterator[Any]] = {}
        self.written: dict[str, tuple[int, dict[str, str]]] = {}  # by a command: how many changes, and what

    def new_place(self, like: Path | None = None) -> Path:
        """Return a new folder to run in, empty or a copy."""
        self.count += 1
        place = self.root / f"place-{self.count}"
        if like is None:
            place.mkdir()
        else:
            shutil.copytree(like, place, symlinks=True)
        return place

    def prepare(self) -> None:
        """Write the data, import what commands import, and train each line once, undisturbed."""
        write_data(self.data)
        os.environ["PEFTBENCH_CACHE"] = str(self.root / "cache")
        from peftbench.config.schema import find_conf_dir
        from peftbench.utils.quick_imports import speed_up_imports

        with speed_up_imports():  # children are forks, and so need not import it
            import peftbench.cli.export
            import peftbench.cli.import_adapter
            import peftbench.cli.predict
            import peftbench.cli.train
            import peftbench.evaluation.merged
            import peftbench.train

        preset = (find_conf_dir() / "method" / "lora.yaml").read_text(encoding="utf-8")
        (self.data / "own.yaml").write_text(preset.replace("method: lora", "method: own"), encoding="utf-8")
        common = ["output_dir=out", "debug=smoke", "trainer.checkpoint_minutes=0", "trainer.device=cpu", "seed=1"]
        labels = ["task=text_classification", f"task.train_file={self.data / 'labels.jsonl'}"]
        texts = ["task=text_to_text", f"task.train_file={self.data / 'texts.jsonl'}", "task.source_column=source"]
        lines = {
            "classification": [*labels, "method=lora", "trainer.keep=best", "trainer.evaluate_every=2"],
            "generation": [*texts, "task.target_column=target", "method=prefix", "trainer.eval_batch_size=2"],
        }
        if find_spec("optuna") is not None:
            import peftbench.sweeps.study_training  # noqa: F401  # before the forks, which then need not import Optuna

            lines["study"] = [*labels, "method=lora", "trainer.max_steps=2", "task.baselines=[]", *TRIALS]
        for name, words in lines.items():
            self.lines[name] = Line(name, [*words, *common, "model=mini"], self)
        for line in self.lines.values():
            line.learn()

    @cached_property
    def done(self) -> Path:
        """A place in which all lines are done, one of them as a sweep of two runs."""
        place = Path(tempfile.mkdtemp(prefix="done-", dir=self.root))
        for line in self.lines.values():
            sweep = ["-m", *line.words, "seed=1,2"] if line.name == "classification" else line.words
            Child(["train", *sweep], place).wait().check((0,))
        exported = self.data / "exported"
        Child(["export", self._find_run(place), "--out", str(exported), "--no-check"], place).wait().check((0,))
        return place

    def _find_run(self, place: Path) -> str:
        """Return the folder of the run of the first line, a LoRA."""
        names = {key.split()[0] for key in self.lines["classification"].expected}
        return next(run for run in list_runs(place) if run.split("/")[-1] in names)

    def stop(self, line: Line) -> None:
        """Keep places in which the line was killed: in its training, and after it."""
        for part in (0.5, 0.7, 0.9):
            place = self.root / f"stopped-{line.name}-{part}"
            place.mkdir()
            total = self.count_changes(line)
            Child(["train", *line.words], place, die_at_change(int(part * total), place)).wait()
            self.stopped.append((line, place))

    def count_changes(self, line: Line) -> int:
        """Return how often a run of the line changes a file."""
        if not line.changes:
            with tempfile.TemporaryFile() as counted:
                place = self.new_place()
                before = die_at_change(0, place, lambda seen: os.pwrite(counted.fileno(), str(seen).encode(), 0))
                Child(["train", *line.words], place, before).wait().check((0,))
                counted.seek(0)
                line.changes = int(counted.read())
        return line.changes

    def run(self, kind: str) -> None:
        """Make one trial of a kind, and count it."""
        trial: Callable[[], None] = getattr(self, f"try_{kind}")
        self.tried[kind] += 1
        before = self.count
        try:
            trial()
            self.survived[kind] += 1
        except Loss as loss:
            self.losses.append(f"{kind}: {loss}")
            print(f"\nLOST, {kind}: {loss}", flush=True)
        for number in range(before + 1, self.count + 1):
            shutil.rmtree(self.root / f"place-{number}", ignore_errors=True)

    def take(self, kind: str, make: Callable[[], Sequence[Any]]) -> Any:
        """Return the next of all that there is to try of a kind, in random order, and then all again."""
        while True:
            for one in self.queues.setdefault(kind, iter(())):
                return one
            everything = list(make())
            self.random.shuffle(everything)
            self.queues[kind] = iter(everything)

    # The kinds of trials

    def try_kill(self) -> None:
        line = self.random.choice(list(self.lines.values()))
        number = self.take(f"kill {line.name}", lambda: range(1, self.count_changes(line) + 1))
        place, what = self.new_place(), f"SIGKILL at change {number} of {line.name}"
        if self.random.random() < 0.2:  # in the middle of a file instead
            size = self.random.choice([1, 100, 1000, 10_000, 100_000, 500_000])
            what = f"SIGXFSZ after {size} bytes of a file of {line.name}"
            before = limit_files(size, deadly=True)
        else:
            before = die_at_change(number, place)
        Child(["train", *line.words], place, before).wait().check((0, -signal.SIGKILL, -signal.SIGXFSZ), quiet=True)
        if self.random.random() < 0.5:
            again = self.random.randint(1, number + 1)
            what += f" and again at change {again}"
            Child(["train", *line.words], place, die_at_change(again, place)).wait().check(
                (0, -signal.SIGKILL), quiet=True
            )
        line.finish(place, what)

    def try_moment(self) -> None:
        line, place = self.random.choice(list(self.lines.values())), self.new_place()
        moments = [self.random.uniform(0, line.took) for _ in range(self.random.randint(1, 3))]
        for moment in moments:
            child = Child(["train", *line.words], place)
            time.sleep(moment)
            child.kill(signal.SIGKILL)
            child.wait().check((0, -signal.SIGKILL), quiet=True)
        line.finish(place, f"SIGKILL of {line.name} after {', '.join(f'{moment:.3f}' for moment in moments)} s")

    def try_signal(self) -> None:
        line, place = self.random.choice(list(self.lines.values())), self.new_place()
        number = self.random.choice([signal.SIGINT, signal.SIGTERM])
        words = ["train", *(["-m", *line.words, "seed=1,2"] if self.random.random() < 0.3 else line.words)]
        child = Child(words, place)
        moment = self.random.uniform(0.05, line.took)
        time.sleep(moment)
        child.kill(number)
        said = child.wait()
        if said.code == -signal.SIGTERM and not said.both:  # before the command had begun
            return
        said.check((0, 130), quiet=True)
        what = f"{signal.Signals(number).name} of {line.name} after {moment:.3f} s"
        records = [json.loads(file.read_text()) for file in place.rglob("record.json")]
        if said.code and (left := [record["status"] for record in records if record["status"] == "running"]):
            raise Loss(f"{what}: {len(left)} records say running\n{said.both[-500:]}")
        if said.code and not re.search("interrupted|unfinished", said.both):
            raise Loss(f"{what}: silent, exit code {said.code}\n{said.both[-500:]}")
        for folder in {file.parent for file in place.rglob("record.json")}:
            if "-m" in words and json.loads((folder / "record.json").read_text())["seed"] != 1:
                shutil.rmtree(folder)
        line.finish(place, what)

    def try_twins(self) -> None:
        # Two processes share a study, and what is chosen depends on the order in which its runs end.
        line = self.random.choice([line for line in self.lines.values() if line.name != "study"])
        place, twins = self.new_place(), []
        for _ in range(2):
            twins.append(Child(["train", *line.words], place))
            time.sleep(self.random.choice([0.0, self.random.uniform(0, line.took)]))
        if self.random.random() < 0.5:
            self.random.choice(twins).kill(signal.SIGKILL)
        for twin in twins:
            twin.wait().check((0, 2, -signal.SIGKILL), quiet=True)
        line.finish(place, f"twins on {line.name}")

    def try_disk(self) -> None:
        line, place = self.random.choice(list(self.lines.values())), self.new_place()
        size = self.random.choice([0, 1, 512, 4096, *(int(10 ** self.random.uniform(4, 6.7)) for _ in range(6))])
        mounted = size >= 4096 and self.random.random() < 0.6 and mount(place, size)
        try:
            before = (lambda: None) if mounted else limit_files(size, deadly=False)
            what = f"{'a disk' if mounted else 'files'} of {size} bytes, {line.name}"
            said = Child(["train", *line.words], place, before).wait()
            said.check((0, 1, 2), quiet=False)
            if said.code and not said.err.strip():
                raise Loss(f"{what}: no sentence\n{said.both[-500:]}")
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            line.finish(place, what)
        finally:
            if mounted:
                subprocess.run(["umount", str(place)], check=True)

    def try_torn(self) -> None:
        line, like, file, damage = self.take("torn", self._list_torn)
        place = self.new_place(like)
        what = f"{file.relative_to(like)} {damage}"
        harm(place / file.relative_to(like), damage)
        if line is not None:
            self._check_again(line, like, place, what, file.name)
            return
        (run,) = {
            f.parent for f in place.rglob("record.json") if f.parent in (place / file.relative_to(like)).parents
        } or {next(f.parent for f in place.rglob("record.json"))}
        commands = [
            ["evaluate", str(run.relative_to(place)), "task.max_eval=4"],
            ["rescore", str(run.relative_to(place))],
            ["merge", str(run.relative_to(place)), "--out", "merged"],
            ["results", "out"],
            ["results", "out", "--csv"],
            ["compare", *(str(f.parent.relative_to(place)) for f in sorted(place.rglob("config.yaml"))[:2])],
            ["export", str(run.relative_to(place)), "--out", "exported"],
            ["predict", str(run.relative_to(place)), str(self.data / "labels.jsonl")],
            ["explain", str(run.relative_to(place))],
            ["advise", "out", "task=text_classification", "model=mini"],
            ["report", "out", "--out", "r.html"],
            ["plot", "out", "--curves", "--out", "c.svg"],
            ["status", "out"],
        ]
        for words in self.random.sample(commands, 3):
            Child(words, place).wait().check()
        for other in self.lines.values():
            said = Child(["train", *other.words], place).wait().check((0, 1, 2))
            if said.code and file.name not in said.both:
                raise Loss(f"after {what} the run is stuck, and no file is named: {said.both[-500:]}")

    def _list_torn(self) -> list[tuple[Line | None, Path, Path, str]]:
        if not self.stopped:
            for line in self.lines.values():
                self.stop(line)
        places = [*self.stopped, (None, self.done)]
        return [
            (line, place, file, damage)
            for line, place in places
            for file in sorted(place.rglob("*"))
            if file.is_file()
            for damage in (*DAMAGES, GONE, FOLDER)
        ]

    def _check_again(self, line: Line, like: Path, place: Path, what: str, name: str) -> None:
        """Type the line again: it ends with the same result, or a sentence names the file that is in the way."""
        said = Child(["train", *line.words], place).wait().check((0, 1, 2))
        # What is done is not looked at again: damage shows when it is used.
        was_done = any(json.loads(file.read_text())["status"] == "done" for file in like.rglob("record.json"))
        if said.code == 0 and not name.endswith(JOURNAL):
            line.check(place, said, what, name if was_done else None)
        elif said.code and name not in said.err:
            raise Loss(f"after {what} the run is stuck, and no file is named: {said.both[-500:]}")

    def try_cache(self) -> None:
        cached = self.root / "cached"
        line = self._warm(cached)
        file, damage = self.take(
            "cache",
            lambda: [(f, d) for f in sorted(cached.rglob("*")) if f.is_file() for d in (*DAMAGES, GONE, FOLDER)],
        )
        place = self.new_place()
        shutil.copytree(cached, place / "cache")
        harm(place / "cache" / file.relative_to(cached), damage)
        what = f"the cache's {file.relative_to(cached)} {damage}"
        before = partial(os.environ.update, PEFTBENCH_CACHE=str(place / "cache"))
        said = Child(["train", *line.words], place, before).wait().check((0,))
        line.check(place, said, what)

    def _warm(self, cached: Path) -> Line:
        """Return a line whose tokens and docstrings are cached, in `cached`."""
        if "cached" not in self.lines_apart:
            words = [
                *("task=docsum", "task.packages=[json,logging,email]", "method=lora", "model=mini", "debug=smoke"),
                *(
                    "task.max_train=8",
                    "task.max_selection=4",
                    "task.max_eval=4",
                    "output_dir=out",
                    "trainer.device=cpu",
                ),
            ]
            line = Line("cached", words, self)
            os.environ["PEFTBENCH_CACHE"] = str(cached)
            from peftbench.tasks import cache

            cache.MIN_ROWS = 1
            line.learn()
            os.environ["PEFTBENCH_CACHE"] = str(self.root / "cache")
            self.lines_apart["cached"] = line
        return self.lines_apart["cached"]

    @property
    def lines_apart(self) -> dict[str, Line]:
        return self.__dict__.setdefault("_apart", {})

    def try_outputs(self) -> None:
        run = self._find_run(self.done)
        labels = ["task=text_classification", f"task.train_file={self.data / 'labels.jsonl'}", "model=mini"]
        name, out, words = self.random.choice(
            [
                ("export", "exported", ["export", run, "--no-check"]),
                ("merge", "merged", ["merge", run]),
                ("import", "imported", ["import", str(self.data / "exported"), *labels]),
                ("predict", "predicted.csv", ["predict", run, str(self.data / "labels.jsonl")]),
                ("report", "report.html", ["report", "out"]),
                ("plot", "plot.svg", ["plot", "out"]),
            ]
        )
        words = [*words, "--out", out]
        changes, expected = self._learn_written(name, words, out)
        place = self.new_place(self.done)
        runs = read_result(place)
        if self.random.random() < 0.4:
            size = self.random.choice([0, 1, 100, 1000, 20_000, 200_000, 2_000_000])
            what = f"{name} with files of {size} bytes"
            Child(words, place, limit_files(size, deadly=False)).wait().check((0, 1, 2))
        else:
            number = self.random.randint(1, changes)
            what = f"SIGKILL at change {number} of {name}"
            Child(words, place, die_at_change(number, place)).wait().check((0, -signal.SIGKILL), quiet=True)
        said = Child(words, place).wait().check((0, 2))
        if said.code == 2:
            if out not in said.err:
                raise Loss(f"after {what} the command is stuck, and {out} is not named: {said.both[-500:]}")
            shutil.rmtree(place / out) if (place / out).is_dir() else (place / out).unlink()
            Child(words, place).wait().check((0,))
        if odd := {key for key, value in expected.items() if read_written(place, out).get(key) != value}:
            raise Loss(f"different after {what}: {', '.join(sorted(odd))}")
        if {**runs, **{k: v for k, v in read_result(place).items() if k in runs}} != runs:
            raise Loss(f"{what} has changed the runs that it read")

    def _learn_written(self, name: str, words: list[str], out: str) -> tuple[int, dict[str, str]]:
        """Return how often a command changes a file, and what it writes."""
        if name not in self.written:
            place = self.new_place(self.done)
            with tempfile.TemporaryFile() as counted:
                before = die_at_change(0, place, lambda seen: os.pwrite(counted.fileno(), str(seen).encode(), 0))
                Child(words, place, before).wait().check((0,))
                counted.seek(0)
                self.written[name] = int(counted.read()), read_written(place, out)
        return self.written[name]

    def try_inputs(self) -> None:
        inputs = self._list_inputs()
        what, damage = self.take("inputs", lambda: [(name, d) for name in inputs for d in (*DAMAGES, GONE, FOLDER)])
        source, words = inputs[what]
        place = self.new_place(self.done)
        given = place / "given"
        if source.parent == self.data:  # a file by itself
            given.mkdir()
            shutil.copyfile(source, given / source.name)
        else:
            shutil.copytree(source.parent, given)
        harm(given / source.name, damage)
        if what == "own config":
            (place / "method").symlink_to(given)
        said = Child(words, place).wait().check()
        if said.code == 1 and "given" not in said.both:
            raise Loss(f"{what} {damage}: no sentence names it\n{said.both[-500:]}")

    def _list_inputs(self) -> dict[str, tuple[Path, list[str]]]:
        """Return files that others give to a command, which finds them in the folder `given`."""
        from peftbench.config.schema import EMBEDDED

        run = self._find_run(self.done)
        smoke = ["debug=smoke", "trainer.max_steps=1", "task.baselines=[]", "output_dir=new"]
        labels = [f"task.train_file={self.data / 'labels.jsonl'}", "task=text_classification", "model=mini"]
        texts = ["task=text_to_text", "task.source_column=source", "task.target_column=target", "model=mini"]
        found = {
            "labels": (
                self.data / "labels.jsonl",
                ["train", *smoke, *labels, "method=lora", "task.train_file=given/labels.jsonl"],
            ),
            "texts": (
                self.data / "texts.jsonl",
                ["train", *smoke, *texts, "method=lora", "task.train_file=given/texts.jsonl"],
            ),
            "inputs": (self.data / "labels.jsonl", ["predict", run, "given/labels.jsonl", "--out", "p.csv"]),
            "own config": (
                self.data / "own.yaml",
                ["train", *smoke, *labels, "method=own", "--config-dir", "."],
            ),
        }
        for file in sorted((self.data / "exported").iterdir()):
            found[f"adapter {file.name}"] = (file, ["import", "given", "--out", "imported", *labels])
        for file in sorted((EMBEDDED / "mini").iterdir()):
            words = ["train", *smoke, *labels, "method=lora", "model.path=given"]
            found[f"backbone {file.name}"] = (file, words)
        return found

    def try_environment(self) -> None:
        line, place = self.lines["classification"], self.new_place()
        chosen = self.random.sample(ENVIRONMENTS, self.random.choice([1, 1, 2]))
        given = {name: value for one in chosen for name, value in one.items()}
        words = ["train", *line.words]
        package = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "peftbench", *words],
            env={**os.environ, "PYTHONPATH": path, **given},
            cwd=place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
        )
        out, err = (part.decode("utf-8", "replace") for part in (done.stdout, done.stderr))
        said = Said(done.returncode, out, err, f"{given} peftbench {' '.join(words)}").check((0, 2))
        if said.code == 0:
            line.check(place, said, f"{given}")

    def try_words(self) -> None:
        words = make_words(self.random, self.data, list_runs(self.done))
        reading = words[0] in ("results", "status", "compare", "ls", "params", "explain", "advise", "claims", "env")
        Child(words, self.done if reading else self.new_place(self.done)).wait().check()

    def try_records(self) -> None:
        place = self.new_place(self.done)
        files = [*place.rglob("record.json"), *place.rglob("*.sweep.json"), *place.rglob("*.jsonl")]
        for file in self.random.sample(files, self.random.randint(1, len(files))):
            lines = file.read_text(encoding="utf-8").split("\n") if file.suffix == ".jsonl" else [file.read_text()]
            file.write_text(
                "\n".join(json.dumps(spoil(json.loads(one), self.random)) if one else "" for one in lines),
                encoding="utf-8",
            )
        runs = list_runs(place)
        for words in (
            ["results", "out", *self.random.choice(FORMS)],
            ["status", "out"],
            ["compare", *self.random.choices(runs, k=2)],
            ["rescore", self.random.choice(runs)],
            ["explain", self.random.choice(runs)],
            ["export", self.random.choice(runs), "--out", "exported", "--no-check"],
            ["predict", self.random.choice(runs), str(self.data / "labels.jsonl")],
            ["advise", "out", "task=text_classification", "model=mini", *self.random.choice([[], ["--json"]])],
            ["claims", "out", *self.random.choice([[], ["--json"]])],
            ["plot", "out", *self.random.choice([[], ["--curves"]]), "--out", "a.svg"],
            ["report", "out"],
        ):
            said = Child(words, place).wait().check()
            if escapes := set(said.both) & set("\x1b\x07\r\x9b\x00\u202e"):
                raise Loss(f"{sorted(escapes)} reach the terminal: {said.line}")
        for line in self.lines.values():
            Child(["train", *line.words], place).wait().check((0, 1, 2))


FORMS = [[], ["--csv"], ["--markdown"], ["--latex"], ["--json"], ["--mean"], ["--rows", "method", "--columns", "seed"]]
KINDS = (
    *("kill", "moment", "signal", "twins", "disk", "torn", "torn", "cache", "outputs", "inputs", "environment"),
    *("words", "words", "words", "records"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=sorted(set(KINDS)), help="kinds of trials; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is random; default: %(default)s")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the losses to FOLDER/losses.txt")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not arguments.only or kind in arguments.only]
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="peftbench-drill-"))
    try:
        drill = Drill(root, arguments.seed)
        drill.prepare()
        print(f"prepared in {time.monotonic() - began:.0f} s, in {root}", flush=True)
        said = time.monotonic()
        while not drill.tried or time.monotonic() - began < 60 * arguments.minutes:  # one round at least
            for kind in kinds:
                drill.run(kind)
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"{(said - began) / 60:.0f} min: {drill.survived.total()} of {drill.tried.total()}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for kind in dict.fromkeys(kinds):
        print(f"{kind:11} {drill.tried[kind]:6} tried {drill.survived[kind]:6} survived")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes: {drill.tried.total()} tried, {len(drill.losses)} lost")
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        (arguments.keep / "losses.txt").write_text("\n\n".join(drill.losses), encoding="utf-8")
    return int(bool(drill.losses))


if __name__ == "__main__":
    sys.exit(main())
