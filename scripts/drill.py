"""A drill of what can go wrong around a run: it kills, fills disks, tears files and types nonsense, and counts losses.

python scripts/drill.py [--minutes 60] [--only KIND ...] [--seed 0] [--keep FOLDER]

Kinds of trials, taken in turn until the time is over (docs/robustness.md says what each of them promises):

  kill      SIGKILL before the n-th change of a file, and in the middle of writing one; then the same line again
  moment    SIGKILL at a random moment
  signal    SIGINT or SIGTERM at a random moment
  twins     the same line in two processes at once, one of which may be killed
  disk      no space (a small tmpfs, for root) or a limit on the size of files; then the same line with space again
  torn      a file of a run, stopped or done, is cut short, empty, garbage, null, {} or a folder; then every command
  cache     the same for each file of the cache
  words     command lines of every subcommand, made of known and of odd words (by hypothesis, where it is installed)
  records   records, plans, metrics and predictions with hostile names and values, in every table

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
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}

LIMIT = 120.0  # seconds for a command, after which it counts as hung
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "cut at a line's end": lambda content: content[: content.rfind(b"\n", 0, max(1, len(content) - 1)) + 1],
    "empty": lambda content: b"",
    "garbage": lambda content: random.Random(len(content)).randbytes(max(64, min(len(content), 1 << 16))),
    "zeros": lambda content: bytes(len(content)),
    "a bit flipped": lambda content: _flip(content),
    "null": lambda content: b"null",
    "{}": lambda content: b"{}",
    "[]": lambda content: b"[]",
    "nested": lambda content: b"[" * 5000 + b"]" * 5000,
}
GONE, FOLDER = "gone", "a folder in its place"


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :] if content else content


class Loss(Exception):
    """What a trial lost, as a sentence."""


@dataclass(frozen=True)
class Said:
    """How a command ended: the exit code, negative for a signal, and what it printed."""

    code: int
    out: str
    err: str
    line: str

    @property
    def both(self) -> str:
        return self.out + self.err

    def check(self, codes: Sequence[int] = (0, 1, 2), quiet: bool = False) -> Said:
        """Raise Loss for a traceback, an exit code that is not one of `codes`, or silence."""
        if "Traceback (most recent call last)" in self.both:
            raise Loss(f"traceback: {self.line}\n{self.both[-1500:]}")
        if self.code not in codes:
            raise Loss(f"exit code {self.code}: {self.line}\n{self.both[-800:]}")
        if not self.both.strip() and not quiet:
            raise Loss(f"silent, exit code {self.code}: {self.line}")
        return self


class Child:
    """A command in a forked process.

    Args:
        before: is called in the child, before the command.
    """

    def __init__(self, words: Sequence[str], place: Path, before: Callable[[], None] = lambda: None) -> None:
        self.line = "peftbench " + " ".join(words)
        pipes = [os.pipe() for _ in range(2)]  # a file could be full
        self.ends, self.read = [end for end, _ in pipes], [bytearray(), bytearray()]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            for end, other in pipes:
                os.close(other)
                os.set_blocking(end, False)
            return
        code = 70
        try:
            sys.unraisablehook = sys.__unraisablehook__
            os.setsid()
            os.chdir(place)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, (_, end) in enumerate(pipes, start=1):
                os.dup2(end, number)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="replace", closefd=False)
            sys.argv = ["peftbench", *words]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            from peftbench.cli.main import main

            code = main(list(words))
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(code)

    def wait(self, limit: float = LIMIT) -> Said:
        """Wait for the end; a command that hangs is a Loss."""
        deadline = time.monotonic() + limit
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._drain()
            if pid:
                break
            if time.monotonic() > deadline:
                self.kill(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Loss(f"hung for {limit:.0f} s: {self.line}\n{bytes(self.read[0][-500:] + self.read[1][-500:])!r}")
            time.sleep(0.005)
        for end in self.ends:
            os.close(end)
        out, err = (bytes(part).decode("utf-8", "replace") for part in self.read)
        return Said(os.waitstatus_to_exitcode(status), out, err, self.line)

    def kill(self, number: int) -> None:
        """Send a signal to the command and its own children, if it is still there."""
        for send in (os.killpg, os.kill):
            try:
                send(self.pid, number)
                return
            except ProcessLookupError:
                pass

    def _drain(self) -> None:
        for end, part in zip(self.ends, self.read, strict=True):
            try:
                while more := os.read(end, 1 << 16):
                    part.extend(more)
            except BlockingIOError:
                pass


CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


def die_at_change(number: int, place: Path, count: Callable[[int], Any] = lambda seen: None) -> Callable[[], None]:
    """Return what makes a process kill itself before its `number`-th change below `place`; `count` gets each number."""

    def install() -> None:
        seen = [0]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if not (writes or event in CHANGES) or not os.path.abspath(str(arguments[0])).startswith(str(place)):
                return
            seen[0] += 1
            count(seen[0])
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return install


def limit_files(size: int, deadly: bool) -> Callable[[], None]:
    """Return what ends each write beyond `size` bytes of a file: in the middle of it by a signal, or by EFBIG."""

    def install() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return install


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
        for left in [*place.rglob("checkpoints"), *place.rglob("*.tmp")]:
            raise Loss(f"left behind after {what}: {left.relative_to(place)}")


def read_result(place: Path) -> dict[str, str]:
    """Return hashes of the adapters and predictions, and the scores, of the runs in a place."""
    found = {}
    for file in sorted(place.rglob("record.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        name = file.parent.name
        found[f"{name} status"] = record["status"]
        found[f"{name} scores"] = json.dumps([record["scores"], record["steps"], record["baselines"]], sort_keys=True)
        for part in ("adapter/adapter.safetensors", "predictions.jsonl"):
            path = file.parent / part
            found[f"{name} {part}"] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    return found


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
        from peftbench.utils.quick_imports import speed_up_imports

        with speed_up_imports():  # children are forks, and so need not import it
            import peftbench.cli.train
            import peftbench.evaluation.merged
            import peftbench.train  # noqa: F401

        common = ["output_dir=out", "debug=smoke", "trainer.checkpoint_minutes=0", "trainer.device=cpu", "seed=1"]
        labels = ["task=text_classification", f"task.train_file={self.data / 'labels.jsonl'}"]
        texts = ["task=text_to_text", f"task.train_file={self.data / 'texts.jsonl'}", "task.source_column=source"]
        for name, words in {
            "classification": [*labels, "method=lora", "trainer.keep=best", "trainer.evaluate_every=2"],
            "generation": [*texts, "task.target_column=target", "method=prefix", "trainer.eval_batch_size=2"],
        }.items():
            self.lines[name] = Line(name, [*words, *common, "model=mini"], self)
        for line in self.lines.values():
            line.learn()

    @cached_property
    def done(self) -> Path:
        """A place in which runs are done, two of them in a sweep."""
        place = self.root / "done"
        place.mkdir()
        Child(["train", *self.lines["generation"].words], place).wait().check((0,))
        Child(["train", "-m", *self.lines["classification"].words, "seed=1,2"], place).wait().check((0,))
        return place

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
        line, place = self.random.choice(list(self.lines.values())), self.new_place()
        twins = []
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
        size = self.random.choice([0, 1, 512, 4096, 20_000, 100_000, 200_000, 400_000, 2_000_000, 30_000_000])
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
        if said.code == 0:
            line.check(place, said, what, name if was_done else None)
        elif name not in said.err:
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

    def try_words(self) -> None:
        words = make_words(self.random, self.data, self.hypothesis())
        place = self.new_place(self.done) if words[0] in ("train", "reproduce", "merge", "report") else self.done
        Child(words, place).wait().check()

    def hypothesis(self) -> bool:
        return find_spec("hypothesis") is not None

    def try_records(self) -> None:
        place = self.new_place(self.done)
        files = [*place.rglob("record.json"), *place.rglob("*.sweep.json"), *place.rglob("*.jsonl")]
        for file in self.random.sample(files, self.random.randint(1, len(files))):
            lines = file.read_text(encoding="utf-8").split("\n") if file.suffix == ".jsonl" else [file.read_text()]
            file.write_text(
                "\n".join(json.dumps(spoil(json.loads(one), self.random)) if one else "" for one in lines),
                encoding="utf-8",
            )
        runs = [str(f.parent.relative_to(place)) for f in place.rglob("record.json")]
        for words in (
            ["results", "out", *self.random.choice(FORMS)],
            ["status", "out"],
            ["compare", *self.random.choices(runs, k=2)],
            ["rescore", self.random.choice(runs)],
            ["plot", "out", *self.random.choice([[], ["--curves"]]), "--out", "a.svg"],
            ["report", "out"],
        ):
            said = Child(words, place).wait().check()
            if escapes := set(said.both) & set("\x1b\x07\r\x9b\x00\u202e"):
                raise Loss(f"{sorted(escapes)} reach the terminal: {said.line}")


FORMS = [[], ["--csv"], ["--markdown"], ["--latex"], ["--json"], ["--mean"], ["--rows", "method", "--columns", "seed"]]
HOSTILE: list[Any] = [
    *(
        "",
        "\x1b]0;t\x07",
        "=1+1",
        "\n\\input{x}",
        "../../..",
        "$\\frac$",
        "é🙂",
        "\ud800",
        "</script>",
        "%s{}",
        "x" * 300,
    ),
    *(None, [], {}, 0, -1, 1e308, float("nan"), True, 10**400, [[]], {"": ""}, {"a": [None]}),
]


def spoil(value: Any, chance: random.Random) -> Any:
    """Return JSON values in which some are others."""
    if chance.random() < 0.04:
        return chance.choice(HOSTILE)
    if isinstance(value, dict):
        return {key: spoil(below, chance) for key, below in value.items() if chance.random() > 0.01}
    if isinstance(value, list):
        return [spoil(below, chance) for below in value]
    if isinstance(value, str) and chance.random() < 0.1:
        return value + str(chance.choice(HOSTILE[:10]))
    return value


def harm(file: Path, damage: str) -> None:
    """Damage a file."""
    if damage in (GONE, FOLDER):
        file.unlink()
        if damage == FOLDER:
            file.mkdir()
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))


def mount(place: Path, size: int) -> bool:
    """Mount a small file system at a folder; return whether we may."""
    if os.geteuid() or shutil.which("mount") is None:
        return False
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    return done.returncode == 0


def write_data(folder: Path) -> None:
    """Write the rows of the runs: a few sentences with labels, and with sentences to write."""
    folder.mkdir()
    words = ["red", "green", "blue", "round", "heavy", "quick", "old", "new", "loud", "calm"]
    with (folder / "labels.jsonl").open("w") as labels, (folder / "texts.jsonl").open("w") as texts:
        for number in range(60):
            text = f"the {words[number % 10]} thing is {words[number * 7 % 10]} and has number {number}"
            print(json.dumps({"text": text, "label": words[number % 2]}), file=labels)
            print(json.dumps({"source": text, "target": f"{words[number % 10]} {number}"}), file=texts)


# Command lines

VALUES = [
    *(
        "1",
        "0",
        "-1",
        "nan",
        "inf",
        "1e38",
        "null",
        "true",
        "''",
        "a b/é",
        "-x",
        "é🙂",
        "[]",
        "{}",
        "[1,2]",
        "{a:1}",
        "1,2",
    ),
    *(
        "range(1,4)",
        "range(0,3,-1)",
        "range(0,3,0)",
        "interval(5,1)",
        "choice(1,2)",
        "glob(*)",
        "glob(zz*)",
        "sort(2,1)",
    ),
    *("shuffle(1,2)", "tag(a,1)", "str('é🙂')", "int(x)", "float([])", "extend_list(1)", "${seed}", "${oc.env:HOME}"),
    *(
        "${oc.env:NONE_SUCH}",
        "${nope}",
        "${",
        "$",
        "'",
        '"',
        "\\",
        "\n",
        "\t",
        "\x1b[2J",
        "=",
        "==",
        "~",
        "#",
        "%",
        "???",
    ),
    *("[" * 1000 + "]" * 1000, "{a:" * 500 + "1" + "}" * 500, "9" * 400, "x" * 5000, "/dev/null", "/", "..", "/nope/x"),
    *("lora", "mam,lora", "mini", "sst2", "0.5", "1%", "lr3", "smoke", "auto", "paper", "full"),
]
PREFIXES = ["", "", "", "", "", "+", "++", "~"]


def list_key_names() -> list[str]:
    from peftbench.config.keys import list_keys

    groups = ["method", "task", "model", "trainer", "search", "experiment", "debug", "mix", "row", "fidelity"]
    odd = [
        "nope",
        "nope.x",
        "task",
        "",
        ".",
        "a.b.c",
        "hydra.run.dir",
        "hydra/launcher",
        "hydra.verbose",
        "mix.x.bottleneck",
    ]
    return [key.name for key in list_keys()] + 4 * groups + odd


def make_words(chance: random.Random, data: Path, by_hypothesis: bool) -> list[str]:
    """Return a command line: a subcommand, and words that are right, nearly right or nonsense."""

    def one_of(choices: Sequence[str]) -> str:
        return chance.choice(list(choices))

    def odd() -> str:
        if by_hypothesis and chance.random() < 0.3:
            return draw_text(chance)
        return one_of(VALUES)

    def override() -> str:
        return f"{one_of(PREFIXES)}{one_of(list_key_names())}={odd()}"

    base = [
        *("task=text_classification", f"task.train_file={data / 'labels.jsonl'}", "method=lora", "model=mini"),
        *("debug=smoke", "trainer.max_steps=1", "output_dir=out", "trainer.device=cpu"),
    ]
    runs = ["out", "out/text_classification", "nope", *VALUES[:30]]
    overrides = [override() for _ in range(chance.randint(1, 3))]
    command = one_of(
        ["train"] * 8
        + ["params"] * 3
        + ["results"] * 2
        + ["explain", "ls", "status", "compare", "plot", "report", "reproduce", "evaluate", "rescore", "merge", "nope"]
    )
    flags = [
        one_of(["-m", "--json", "--help", "--mean", "-x", "--", "--cfg", "job", "--out", "--rows", "-h", "--nope"])
    ]
    flags = flags if chance.random() < 0.4 else []
    sweep = ["-m"] if chance.random() < 0.5 else []
    if command == "train":
        return [command, *base, *sweep, *overrides, *(flags if chance.random() < 0.2 else [])]
    if command in ("params", "explain"):
        return [command, *(sweep if command == "params" else []), *overrides, *flags]
    if command == "reproduce":
        return [command, one_of(["table5", "figure4", "nope", odd()]), "--dry-run", *overrides, *flags]
    if command == "ls":
        return [command, *([] if chance.random() < 0.2 else [one_of(["axes", "keys", "method", odd()])]), *flags]
    if command in ("results", "plot", "report", "status"):
        words = [one_of(runs)] if chance.random() < 0.7 else ["out"]
        more = [one_of(["method=lora", "score>1", "seed!=1", f"method={odd()}", f"{odd()}>1", "--show", odd()])]
        return [command, *words, *more, *flags]
    return [
        command,
        *(one_of(runs) for _ in range(chance.randint(0, 2))),
        *(overrides if chance.random() < 0.4 else []),
        *flags,
    ]


def draw_text(chance: random.Random) -> str:
    """Return a text that hypothesis makes up."""
    import warnings

    from hypothesis import strategies

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = _texts()
    return chance.choice(drawn) if drawn else str(strategies)


@cache
def _texts() -> list[str]:
    from hypothesis import HealthCheck, Phase, given, settings, strategies

    found: list[str] = []
    letters = strategies.characters(exclude_characters="\x00", exclude_categories=())
    nested = strategies.recursive(
        strategies.text("abc019.,:={}[]()$'\"\\ ", max_size=6),
        lambda below: strategies.lists(below, max_size=3).map(lambda parts: f"[{','.join(map(str, parts))}]"),
    )

    @settings(max_examples=400, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategies.one_of(strategies.text(letters, max_size=12), nested))
    def gather(text: str) -> None:
        found.append(text)

    gather()
    return [text for text in found if not re.search("[\ud800-\udfff]", text)]


KINDS = ("kill", "moment", "signal", "twins", "disk", "torn", "torn", "cache", "words", "words", "words", "records")


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
        print(f"{kind:8} {drill.tried[kind]:6} tried {drill.survived[kind]:6} survived")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes: {drill.tried.total()} tried, {len(drill.losses)} lost")
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        (arguments.keep / "losses.txt").write_text("\n\n".join(drill.losses), encoding="utf-8")
    return int(bool(drill.losses))


if __name__ == "__main__":
    sys.exit(main())
