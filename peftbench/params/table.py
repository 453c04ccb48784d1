"""Counts as tables for the terminal, and as JSON. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftbench.axes import UNFROZEN, axes, composed
from peftbench.budget import limit
from peftbench.config import Modification, Run, Unfreeze, modifications

if TYPE_CHECKING:
    from peftbench.modification.counting import Counts
    from peftbench.params.counts import RunCounts

NUMBERS = ("trained", "stored", "paper")
UNBOUNDED = 1000  # characters; rich measures nothing beyond the width that it is told
DISPENSABLE = ("head", "paper", "trained")
WORDS = {  # least widths
    "places": 12,
    "weights at each": 12,
    "method": 16,
    "task": 5,
    "model": 8,
    "four axes": 20,
    "as in the code": 16,
}


def show_run(counted: RunCounts, console: Console) -> None:
    """Prints one run: its modifications, then a table of the kinds of places with their numbers, totals and head."""
    run, totals = counted.run, counted.totals
    backbone = f" of {totals.backbone:,} parameters without task head"
    console.print(Text.assemble((run.method, "bold"), " on ", (run.model.name, "bold"), backbone))
    for modification in modifications(run).values():
        console.print(Text(f"  {_axes(modification)}{_bottleneck(modification)}"))
    if counted.deviations:
        console.print("As in the paper's released code, not its text:")
    for deviation in counted.deviations:
        console.print(Padding(Text(deviation.sentence), (0, 0, 0, 2), expand=False))
    if run.budget is not None:
        console.print(Text(f"  solved for a budget of {_budget(run, totals)}"))
    for note in counted.notes:
        console.print(Padding(Text(note), (0, 0, 0, 2), expand=False))
    console.print()

    table = _table("places", "weights at each", *NUMBERS)
    prefix: str | None = ""
    for group in counted.groups:
        if group.prefix != prefix:
            table.add_section()
        prefix = group.prefix
        label = group.label if prefix is None else f"{group.label} ×{group.places}"
        table.add_row(label, "\n".join(weights(group.tensors)), *(f"{getattr(group, name):,}" for name in NUMBERS))
    table.add_section()
    numbers = [getattr(totals, name) for name in NUMBERS]
    table.add_row("total", "", *(f"{number:,}" for number in numbers), style="bold")
    table.add_row("% of backbone", "", *(f"{totals.percent(number):.2f}" for number in numbers))
    if totals.head:
        table.add_section()
        table.add_row("task head, besides", "", f"{totals.head:,}", f"{totals.head:,}", "")
        share = f"{totals.percent(totals.head):.2f}"
        table.add_row("% of backbone", "", share, share, "")
    if counted.dead:
        table.add_section()
        table.add_row("dead, besides", "", f"{counted.dead:,}", "", "")
    console.print(table)


def show_sweep(counted: Sequence[RunCounts], console: Console) -> None:
    """Prints one table with a row for each run, in the order of the sweep.

    Where the terminal is too narrow, the columns of `DISPENSABLE` go, one after the other.
    """
    if not counted:
        return
    if len({c.run.model.name for c in counted}) == 1:
        backbone = counted[0].totals.backbone
        console.print(Text.assemble((counted[0].run.model.name, "bold"), f" of {backbone:,} parameters"))
    rows = [_row(c) for c in counted]
    told = ("task", "model", "as in the code")  # worth a column only where they differ
    headers = [name for name in rows[0] if name not in told or len({tuple(row[name]) for row in rows}) > 1]
    if all(c.run.budget is None for c in counted):
        headers.remove("budget")
    for dispensable in ("", *DISPENSABLE):
        headers = [name for name in headers if name != dispensable]
        table = _table(*headers)
        for row in rows:
            # A line for each modification, so that its bottleneck stands beside it also where the axes wrap.
            for cells in zip_longest(*(row[name] for name in headers), fillvalue=""):
                table.add_row(*cells)
        if console.measure(table, options=console.options.update(width=UNBOUNDED)).minimum <= console.width:
            break
    console.print(table)
    for note in dict.fromkeys(note for c in counted for note in c.notes):
        console.print(Text(note))


def _row(counted: RunCounts) -> dict[str, list[str]]:
    """The lines of each column of a sweep's table."""
    run, totals = counted.run, counted.totals
    found = list(modifications(run).values())
    four = [_axes(m) for m in found]
    if run.unfreeze is not Unfreeze.none:
        four.append(UNFROZEN[run.unfreeze.name])
    return {
        "method": [run.method],
        "task": [run.task.name],
        "model": [run.model.name],
        "budget": [run.budget or ""],
        "four axes": four,
        "as in the code": [deviation.name.replace("_", " ") for deviation in counted.deviations],
        "bottle-\nneck": ["" if m.bottleneck is None else str(m.bottleneck) for m in found],
        **{name: [f"{getattr(totals, name):,}"] for name in (*NUMBERS, "head")},
        "%\nstored": [f"{totals.percent(totals.stored):.2f}"],
    }


def to_json(counted: Sequence[RunCounts]) -> str:
    """A JSON array with an object for each run; `percent` is of the backbone."""
    return json.dumps([_object(c) for c in counted], indent=2)


def _object(counted: RunCounts) -> dict[str, Any]:
    run, totals = counted.run, counted.totals
    names = (*NUMBERS, "head")
    return {
        "method": run.method,
        "task": run.task.name,
        "model": run.model.name,
        "axes": [
            {"prefix": prefix, **axes(m)._asdict(), "bottleneck": m.bottleneck}
            for prefix, m in modifications(run).items()
        ],
        "unfreeze": run.unfreeze.name,
        "fidelity": run.fidelity.name,
        "deviations": [deviation.name for deviation in counted.deviations],
        "budget": run.budget,
        "notes": counted.notes,
        "backbone": totals.backbone,
        **{name: getattr(totals, name) for name in names},
        "dead": counted.dead,
        "percent": {name: totals.percent(getattr(totals, name)) for name in names},
        "places": [
            {
                "label": group.label,
                "prefix": group.prefix,
                "places": group.places,
                "tensors": {name: list(shape) for name, shape in group.tensors.items()},
                **{name: getattr(group, name) for name in NUMBERS},
            }
            for group in counted.groups
        ],
    }


def _axes(m: Modification) -> str:
    """The four axes in one line, as `peftbench results` writes them."""
    *names, composition = axes(m)
    joined = composed(composition, m.composition_function.scale, m.composition_function.learned)
    return " · ".join([*names, joined])


def _bottleneck(m: Modification) -> str:
    return "" if m.bottleneck is None else f", bottleneck {m.bottleneck}"


def _budget(run: Run, totals: Counts) -> str:
    """As typed and, where that says something else, in numbers."""
    assert run.budget is not None
    number = f"{limit(run.budget, totals.backbone):,}"
    return number if run.budget.isdigit() else f"{run.budget}, {number}"


def weights(tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for each tensor and its bias, such as `down 512×1024 + 512`."""
    sizes = {name.removeprefix("function."): size_of(shape) for name, shape in sorted(tensors.items())}
    return [
        f"{name} {size}" + (f" + {sizes[f'{name}_bias']}" if f"{name}_bias" in sizes else "")
        for name, size in sizes.items()
        if not name.endswith("_bias")
    ]


def size_of(shape: tuple[int, ...]) -> str:
    """A shape as `512×1024`. Weights have an axis for groups, and their biases one beside it: axes of 1 say nothing."""
    return "×".join(str(size) for size in shape if size != 1) or "1"


def _table(*headers: str) -> Table:
    """A table whose columns hold text where `WORDS` has them, and else numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for header in headers:
        if header in WORDS:
            table.add_column(header, min_width=WORDS[header], overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    return table
