"""Command lines of every subcommand, made of known and of odd words."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

NUMBERS = ("1", "0", "-1", "nan", "inf", "1e38", "9" * 400, "0.5", "1%", "1,2", "true", "null", "???")
TEXTS = (
    "''",
    "a b/é",
    "-x",
    "é🙂",
    "x" * 5000,
    "/dev/null",
    "/",
    "..",
    "/nope/x",
    "~nobody/x",
    "~",
    "\n",
    "\t",
    "\x1b[2J",
)
NESTED = ("[]", "{}", "[1,2]", "{a:1}", "[" * 1000 + "]" * 1000, "{a:" * 500 + "1" + "}" * 500)
SWEEPS = (
    *("range(1,4)", "range(0,3,-1)", "range(0,3,0)", "interval(5,1)", "choice(1,2)", "glob(*)", "glob(zz*)"),
    *("sort(2,1)", "shuffle(1,2)", "tag(a,1)", "str('é🙂')", "int(x)", "float([])", "extend_list(1)", "str('a,b'),1"),
)
SIGNS = (
    "${seed}",
    "${oc.env:HOME}",
    "${oc.env:NONE_SUCH}",
    "${nope}",
    "${",
    "$",
    "'",
    '"',
    "\\",
    "=",
    "==",
    "~",
    "#",
    "%",
)
NAMES = ("lora", "mam,lora", "mini", "sst2", "lr3", "optuna", "smoke", "auto", "paper", "full", "slurm", "ray", "basic")
VALUES = (*NUMBERS, *TEXTS, *NESTED, *SWEEPS, *SIGNS, *NAMES)
PREFIXES = ("", "", "", "", "", "+", "++", "~")
OF_HYDRA = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.verbose", "hydra.mode", "hydra.job.name"),
    *("hydra.job.chdir", "hydra.job.env_set.A", "hydra.job.env_copy", "hydra.output_subdir", "hydra.job_logging"),
    *("hydra.sweeper.params", "hydra.sweeper.max_batch_size", "hydra.callbacks.x", "hydra.overrides.task", "hydra"),
    *("hydra/launcher", "hydra/sweeper", "hydra/job_logging", "hydra/nope", "hydra.nope", "hydra.searchpath"),
)
OF_LAUNCHERS = (
    "partition",
    "gpus",
    "cpus",
    "memory",
    "time",
    "timeouts",
    "at_once",
    "poll_s",
    "options",
    "address",
    "nope",
)
GROUPS = ("method", "task", "model", "trainer", "search", "experiment", "debug", "mix", "row", "fidelity")
ODD_KEYS = ("nope", "nope.x", "task", "", ".", "a.b.c", "mix.x.bottleneck", "peft.nope", "+seed")
FLAGS = (
    "-m",
    "--json",
    "--help",
    "--mean",
    "-x",
    "--",
    "--cfg",
    "job",
    "--out",
    "--rows",
    "-h",
    "--nope",
    "--config-dir",
)
COMMANDS = (
    *("train",) * 8,
    *("params",) * 3,
    *("results", "export", "import", "predict", "explain", "advise", "claims") * 2,
    *("ls", "status", "compare", "plot", "report", "reproduce", "evaluate", "rescore", "merge", "env", "nope", "-V"),
)
FILES = ("--alpha", "--task", "--format", "--read", "--write", "--no-check", "--push")


@cache
def list_key_names() -> list[str]:
    from peftbench.config.keys import list_keys

    keys = [key.name for key in list_keys()]
    searched = [f"search.{key}" for key in ("sampler", "sampler_seed", "prune", "seed", "keys", "name", "trial")]
    return [*keys, *(4 * GROUPS), *ODD_KEYS, *OF_HYDRA, *searched]


def make_words(chance: random.Random, data: Path, runs: Sequence[str]) -> list[str]:
    """Return a command line: a subcommand, and words that are right, nearly right or nonsense.

    Args:
        data: the folder of the drill's data.
        runs: folders of finished runs.
    """

    def one_of(*choices: str) -> str:
        return chance.choice(choices)

    def odd() -> str:
        if find_spec("hypothesis") is not None and chance.random() < 0.3:
            return chance.choice(_make_texts())
        return one_of(*VALUES)

    def override() -> str:
        return f"{one_of(*PREFIXES)}{one_of(*list_key_names())}={odd()}"

    def some(*words: str, share: float = 0.5) -> list[str]:
        return list(words) if chance.random() < share else []

    base = [
        *("task=text_classification", f"task.train_file={data / 'labels.jsonl'}", "method=lora", "model=mini"),
        *("debug=smoke", "trainer.max_steps=1", "output_dir=out", "trainer.device=cpu"),
    ]
    overrides = [override() for _ in range(chance.randint(1, 3))]
    run = one_of(*runs) if chance.random() < 0.7 else one_of("out", "nope", *TEXTS)
    command = chance.choice(COMMANDS)
    flags = some(one_of(*FLAGS), share=0.4)
    sweep = some("-m")
    if command == "train":
        more = some("search=optuna", "search.trials=1", share=0.1)
        more += some(f"hydra/launcher={one_of('slurm', 'ray', 'basic', odd())}", share=0.1)
        more += some(f"hydra.launcher.{one_of(*OF_LAUNCHERS)}={odd()}", share=0.1)
        return [command, *base, *sweep, *overrides, *more, *(flags if chance.random() < 0.2 else [])]
    if command == "params":
        return [command, *sweep, *overrides, *flags]
    if command == "explain":
        return [command, *([run] if chance.random() < 0.5 else overrides), *flags]
    if command == "reproduce":
        return [command, one_of("table5", "figure4", "nope", odd()), "--dry-run", *overrides, *flags]
    if command == "ls":
        return [command, *some(one_of("axes", "keys", "method", odd()), share=0.8), *flags]
    if command == "advise":
        asked = [f"{one_of('task', 'model', 'budget', 'memory', 'nope')}={odd()}" for _ in range(chance.randint(0, 2))]
        return [command, *some("out"), *some("task=text_classification", "model=mini"), *asked, *flags]
    if command == "import":
        source = one_of(*runs, str(data / "exported"), str(data / "exported/adapter_model.safetensors"), odd())
        more = some("task=text_classification", f"task.train_file={data / 'labels.jsonl'}", "model=mini")
        return [
            command,
            source,
            *some("--out", one_of("imported", odd()), share=0.9),
            *more,
            *_make_flag(chance),
            *flags,
        ]
    if command in ("export", "merge"):
        return [command, run, *some("--out", one_of("new", odd()), share=0.9), *some(override()), *_make_flag(chance)]
    if command == "predict":
        inputs = one_of("-", str(data / "labels.jsonl"), str(data / "texts.jsonl"), odd())
        out = some("--out", one_of("p.csv", "p.jsonl", "p.tsv", odd()))
        return [command, run, inputs, *out, *some(override()), *_make_flag(chance), *flags]
    if command in ("results", "plot", "report", "status", "claims"):
        more = [one_of("method=lora", "score>1", "seed!=1", f"method={odd()}", f"{odd()}>1", "--show", odd())]
        return [command, one_of("out", run), *more, *flags]
    return [command, *([run] if chance.random() < 0.8 else []), *some(override(), share=0.4), *flags]


def _make_flag(chance: random.Random) -> list[str]:
    """Return a flag of the commands that read or write files, with a value, or nothing."""
    if chance.random() < 0.6:
        return []
    return [chance.choice(FILES), *([chance.choice(VALUES)] if chance.random() < 0.8 else [])]


@cache
def _make_texts() -> list[str]:
    """Return texts that hypothesis makes up."""
    from hypothesis import HealthCheck, Phase, given, settings, strategies

    found: list[str] = []
    letters = strategies.characters(exclude_characters="\x00", exclude_categories=())
    nested = strategies.recursive(
        strategies.text("abc019.,:={}[]()$'\"\\ ~", max_size=6),
        lambda below: strategies.lists(below, max_size=3).map(lambda parts: f"[{','.join(map(str, parts))}]"),
    )

    @settings(max_examples=400, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategies.one_of(strategies.text(letters, max_size=12), nested))
    def gather(text: str) -> None:
        found.append(text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gather()
    return [text for text in found if not re.search("[\ud800-\udfff]", text)]
