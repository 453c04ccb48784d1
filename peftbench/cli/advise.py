"""`peftbench advise task=T model=M`: what the records at hand say about which method to take."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from peftbench.records.record import Record, load_records
from peftbench.records.wording import format_value
from peftbench.tables.advice import (
    COSTS,
    LEVEL,
    SEEDS,
    Advice,
    Contrast,
    advise,
    choose_records,
    describe_row,
    find_reference,
    list_next_commands,
    read_limits,
)
from peftbench.tables.columns import format_duration
from peftbench.tables.row import Row, is_trial
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError, describe_unknown
from peftbench.utils.files import dump_json
from peftbench.utils.text import format_count

KEYS = ("task", "model", "budget", "memory")
MOST = 10  # rows on one screen


def main(argv: list[str]) -> int:
    """Print the advice and return 0. Raises UserError where the records allow no claim."""
    parser = argparse.ArgumentParser(
        prog="peftbench advise",
        description="Say what the records at hand show: which methods lie on the front of score and stored parameters, "
        "memory or time, which differences are more than chance, and what has not been tried.",
        epilog="budget=2% or budget=599k leaves out what stores more, memory=16 what took more GiB to train. The "
        "records are those below the folders (default: outputs, and the ones that came with peftbench).",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="FOLDER | KEY=VALUE", help="task=, model=, budget=, memory=")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_intermixed_args(argv)
    given = dict(word.split("=", 1) for word in arguments.words if "=" in word)
    for key in given:
        if key not in KEYS:
            raise UserError(describe_unknown("key", key, KEYS))
    budget, memory = read_limits(given)
    records = choose_records(
        _read_records([word for word in arguments.words if "=" not in word]), given.get("task"), given.get("model")
    )
    advice = advise(records, budget, memory)
    if arguments.json:
        say(dump_json(_to_json(advice, budget), indent=2, ensure_ascii=True))
    else:
        _show(advice, budget, make_console())
    return 0


def _read_records(folders: list[str]) -> list[Record]:
    """Return the records of runs, without the trials of searches."""
    own = [Path("outputs")] if Path("outputs").is_dir() else []
    reference = find_reference()
    places = [Path(folder) for folder in folders] or [*own, *([reference] if reference is not None else [])]
    found = {record.folder.resolve(): record for place in places for record in load_records(place)[0]}
    records = [record for record in found.values() if not is_trial(record)]
    if not records:
        raise UserError("No record, no claim: train some runs first, with peftbench train.")
    return records


def _show(advice: Advice, budget: str | None, console: Console) -> None:
    first, rows = advice.rows[0].first, advice.rows
    report = first.scores["report"]
    console.print(
        f"{first.task} with {first.model.name}: {format_count(len(rows), 'setting')} with "
        f"{format_count(sum(len(row.scored) for row in rows), 'run')}, "
        f"{first.metric} on {report.examples:,} {report.split} examples",
        highlight=False,
    )
    for number, why in ((advice.beyond, "above the limits"), (advice.apart, "trained or scored otherwise")):
        if number:
            left_out = (
                f"{format_count(number, 'further setting')} {'is' if number == 1 else 'are'} {why}, and left out."
            )
            console.print(left_out, style="dim", highlight=False)
    console.print()
    console.print(_make_table(advice))
    if len({record.device for row in rows for record in row.scored}) > 1:
        console.print("Memory and time are of several devices.", style="dim")
    console.print("Time and memory are upper bounds where runs shared a device.", style="dim")
    console.print()
    for line in _describe_contrasts(advice):
        console.print(line, highlight=False)
    if advice.untried:
        console.print(f"Not tried here: {', '.join(advice.untried)}.", highlight=False)
    lines = list_next_commands(advice, budget)
    if lines:
        console.print("\nNext:")
    for line in lines:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _make_table(advice: Advice) -> Table:
    """Return the rows of the fronts, best first, with the costs in which none beats them."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("on a front", overflow="fold")
    for header in ("size", "score", "n", "% stored", "GiB", "time"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("best for its", overflow="fold")
    shown = [row for row in advice.rows if _list_fronts(advice, row)]
    for row in shown[:MOST]:
        seen = describe_row(row)
        table.add_row(
            row.first.method,
            format_value([size for size in seen["bottleneck"] if size is not None]),
            f"{seen['score']:.2f}",
            str(len(row.scored)),
            *("" if seen[key] is None else f"{seen[key]:.2f}" for key in ("percent", "memory")),
            "" if seen["time"] is None else format_duration(seen["time"]),
            ", ".join(_list_fronts(advice, row)),
        )
    return table


def _list_fronts(advice: Advice, row: Row) -> list[str]:
    return [cost for cost in COSTS if any(row is one for one in advice.fronts[cost])]


def _describe_contrasts(advice: Advice) -> list[str]:
    """Return sentences on the best row's lead: over which of the others it is more than chance, and by what."""
    best = advice.rows[0].first.method
    if not advice.contrasts:
        return [f"{best} has the best score at the lowest cost of all."]
    known = [one for one in advice.contrasts if one.p is not None]
    sure = [one for one in known if one.p is not None and one.p < LEVEL]
    unsure = [one for one in known if one not in sure]
    drawn = ", ".join(sorted({one.by for one in known}))
    lines = []
    if sure:
        lines.append(f"{best} leads by more than chance over {_name(sure)} (over {drawn}, Holm's correction).")
    if unsure:
        lines.append(f"The lead of {best} may be chance over {_name(unsure)} (over {drawn}).")
    if alone := len(advice.contrasts) - len(known):
        lines.append(f"No claim on {alone} of the differences: one seed, and no predictions of both sides.")
    if advice.thin:
        lines.append(f"Fewer than {SEEDS} seeds: {len(advice.thin)} of the settings above.")
    return lines


def _name(contrasts: list[Contrast]) -> str:
    named = [f"{one.other.first.method} ({one.difference:+.2f}, p {one.p:.3f})" for one in contrasts[:5]]
    return ", ".join([*named, *([f"{len(contrasts) - 5} more"] if len(contrasts) > 5 else [])])


def _to_json(advice: Advice, budget: str | None) -> dict[str, object]:
    return {
        "rows": [{**describe_row(row), "front": _list_fronts(advice, row)} for row in advice.rows],
        "contrasts": [
            {**describe_row(one.other), "difference": one.difference, "p": one.p, "over": one.by}
            for one in advice.contrasts
        ],
        "left_out": {"above the limits": advice.beyond, "trained or scored otherwise": advice.apart},
        "untried": advice.untried,
        "next": list_next_commands(advice, budget),
    }
