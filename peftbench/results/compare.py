"""`peftbench compare A B`: is the difference of two runs more than chance, and in what do they differ? No torch here.

A and B are each a run, or the seeds of one setting; their saved predictions are compared example by example.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.config import Modification
from peftbench.errors import UserError
from peftbench.results.bootstrap import Difference, paired_bootstrap
from peftbench.results.differences import differing, flatten
from peftbench.results.fields import FIELDS, text
from peftbench.results.identity import IGNORED, plain
from peftbench.results.record import FILE, Record, load_records
from peftbench.results.row import Row, is_trial, left_out, over_seeds, unscored
from peftbench.results.select import TRIALS, is_filter, select
from peftbench.scoring.saved import saved_predictions
from peftbench.tasks.example_scores import ExampleScores, example_scores
from peftbench.terminal import terminal
from peftbench.whole_files import dumped

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C, where PyYAML was built with it

EPILOG = """\
A and B are each the folder of a run, the first digits of its name, or filters as for peftbench results. Runs that
differ only in their seed are taken together.

examples:
  peftbench compare 3f2a91c0 77d01b2e
  peftbench compare method=mam method=lora
  peftbench compare "method=lora task=sst2 bottleneck=8" "method=lora task=sst2 bottleneck=32" --folder outputs
"""


def main(argv: list[str]) -> int:
    """Prints the comparison; returns 0. Raises UserError for sides that cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="peftbench compare",
        description="Compare two runs, or two settings over their seeds, by a paired bootstrap over the examples.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sides", nargs=2, metavar="A B", help="two runs, or two sets of filters")
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="where the runs are; default: %(default)s")
    parser.add_argument("--resamples", type=int, default=10_000, help="draws of the bootstrap; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    if arguments.resamples < 1:
        raise UserError(f"--resamples {arguments.resamples}: it must be a whole number of at least 1.")

    a, b = (_side(name, word, arguments.folder) for name, word in zip("AB", arguments.sides, strict=True))
    _check_comparable(a, b)
    differences = compare(a, b, arguments.resamples)
    settings = settings_that_differ(a, b)
    if arguments.json:
        scores = {name: {**asdict(one), "difference": one.difference} for name, one in differences.items()}
        runs = {name: [record.run for record in row.scored] for name, row in (("a", a), ("b", b))}
        print(dumped({**runs, "metrics": scores, "settings": settings}, indent=2, ensure_ascii=True))
    else:
        _show(a, b, differences, settings, terminal())
    if missing := left_out([a, b]):
        print(missing, file=sys.stderr)
    return 0


def compare(a: Row, b: Row, resamples: int) -> dict[str, Difference]:
    """The difference of each metric of the runs' report split."""
    read = [[saved_predictions(record.folder, "report") for record in row.scored] for row in (a, b)]
    asked = [_asked(run) for side in read for run in side]
    for other, record in zip(asked, [*a.scored, *b.scored], strict=True):
        if other != asked[0]:
            odd = sum(x != y for x, y in zip(asked[0], other, strict=False)) + abs(len(other) - len(asked[0]))
            raise UserError(f"{record.folder} was not scored on the same examples: {odd} of {len(other)} differ.")
    scored = [
        [_scores(record, run) for record, run in zip(row.scored, side, strict=True)]
        for row, side in zip((a, b), read, strict=True)
    ]
    paired = [record.seed for record in a.scored] == [record.seed for record in b.scored]
    return paired_bootstrap(*scored, paired_seeds=paired, resamples=resamples)


def settings_that_differ(a: Row, b: Row) -> dict[str, list[Any]]:
    """Of each key of the config, and of the record's circumstances, that differs: its value in A and in B.

    Of a modification that one of them has alone: its axes, and what is not as in any.
    """
    both = [settings_of(row.first) for row in (a, b)]
    one, other = ({key.split(".")[1] for key in side if key.startswith("mix.")} for side in both)
    bare = {f"mix.{name}.{key}": value for name in one ^ other for key, value in flatten(plain(Modification()))}
    own = [{key: value for key, value in side.items() if key not in bare or value != bare[key]} for side in both]
    return {key: [side.get(key) for side in own] for key in differing(own)}


def _side(name: str, word: str, folder: Path) -> Row:
    """The runs that a word of the command line stands for."""
    records = _found(word, folder)
    rows = [row for row in over_seeds(records, "mean") if not unscored(row)]
    if not records:
        raise UserError(
            f"{name}={word} is neither the folder of a run nor the first digits of one below {folder}, nor a filter "
            "such as method=lora; peftbench results --show method,run,score lists them, --folder where to look."
        )
    if not rows:
        ended = ", ".join(sorted({record.outcome for record in records}))
        raise UserError(f"{name}={word} has no score to compare: it is {ended}.")
    if len(rows) > 1:
        keys = differing([settings_of(row.first) for row in rows])
        raise UserError(
            f"{name}={word} stands for {len(rows)} settings, which differ in {', '.join(keys[:6]) or 'no key'}; choose "
            'one with further filters, as in "method=lora bottleneck=8", or name a run.'
        )
    return rows[0]


def _found(word: str, folder: Path) -> list[Record]:
    if (Path(word) / FILE).is_file():
        return load_records(Path(word))[0]
    records, _ = load_records(folder)
    if is_filter(word):
        filters = shlex.split(word)
        compared = [record for record in records if TRIALS in filters or not is_trial(record)]
        return select(compared, [one for one in filters if one != TRIALS])
    return [record for record in records if record.run.startswith(word)]


def _check_comparable(a: Row, b: Row) -> None:
    one, other = a.scored[0], b.scored[0]
    for key in ("task", "metric", "split", "examples", "data"):
        values = [FIELDS[key](record) for record in (one, other)]
        if values[0] != values[1] and not (key == "data" and None in values):  # an early record does not say on what
            raise UserError(f"A and B cannot be compared, for they differ in {key}: {values[0]} and {values[1]}.")


def _asked(predictions: Sequence[dict[str, Any]]) -> list[Any]:
    """What tells whether two runs had the same examples."""
    return [(one.get("id"), one["reference"]) for one in predictions]


def _scores(record: Record, predictions: Sequence[dict[str, Any]]) -> dict[str, ExampleScores]:
    ours, right = ([one[side] for one in predictions] for side in ("prediction", "reference"))
    return example_scores(record.metric, ours, right, record.data.get("labels", ()))


def settings_of(record: Record) -> dict[str, Any]:
    """A run's config as dotted keys, without what is no setting of it, and the circumstances that the record has."""
    found = dict(flatten(_config(record.folder / "config.yaml")))
    kept = {key: value for key, value in found.items() if value is not None and not _is_ignored(key)}
    reading = {f"reading.{key}": value for key, value in record.data.get("reading", {}).items()}
    circumstances = {"device": record.device, "data": record.data.get("fingerprint"), **reading, **record.versions}
    return kept | {f"({key})": value for key, value in circumstances.items() if value is not None}


def _config(file: Path) -> dict[str, Any]:
    """The config of a run as it lies on disk; empty, and named on stderr, where it is torn."""
    if not file.is_file():
        return {}
    try:
        # what OmegaConf.save wrote is plain YAML, which OmegaConf.load would read fifteen times as slowly
        config = yaml.load(file.read_text(encoding="utf-8"), LOADER)
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if isinstance(config, dict):
        return config
    print(f"{file} is left out: it is torn or not the config of a run.", file=sys.stderr)
    return {}


def _is_ignored(key: str) -> bool:
    return key == "seed" or any(key == ignored or key.startswith(f"{ignored}.") for ignored in IGNORED)


def _show(a: Row, b: Row, differences: dict[str, Difference], settings: dict[str, list[Any]], console: Console) -> None:
    one = a.scored[0]
    report = one.scores["report"]
    console.print(f"{one.task}, {report.examples:,} {report.split} examples", highlight=False)
    for name, row in (("A", a), ("B", b)):
        runs = ", ".join(f"{record.run} (seed {record.seed})" for record in row.scored)
        console.print(f"{name}: {row.first.method}, {runs}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("metric")
    for header in ("A", "B", "A - B", "95% interval", "p"):
        table.add_column(header, justify="right")
    for name, found in differences.items():
        interval = f"{found.low:+.2f} to {found.high:+.2f}"
        cells = (name, f"{found.a:.2f}", f"{found.b:.2f}", f"{found.difference:+.2f}", interval, f"{found.p:.4f}")
        table.add_row(*cells, style="bold" if name == one.metric else None)
    console.print()
    console.print(table)
    seeds = min(len(a.scored), len(b.scored))
    drawn = "examples alone; one seed does not tell what another one would change"
    if seeds > 1:
        drawn = "examples and seeds" + ("; so few seeds tell little of what others would change" if seeds < 5 else "")
    console.print(f"Chance over {drawn}.", style="dim", highlight=False)
    console.print()
    if not settings:
        console.print("The settings do not differ.")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("settings that differ", "A", "B"):
        table.add_column(header, overflow="fold")
    for key, values in settings.items():
        table.add_row(key, *(_setting(value) for value in values))
    console.print(table)


def _setting(value: Any) -> str:
    return "–" if value is None else text(value)[:60]
