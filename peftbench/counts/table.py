"""Counts as tables for the terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftbench.config.axes import UNFROZEN, format_axes, format_composition, read_axes
from peftbench.config.budget import parse_budget
from peftbench.config.peft_methods import read_point
from peftbench.config.schema import Modification, Run, Unfreeze, list_modifications
from peftbench.tables.columns import Column
from peftbench.tables.terminal import show_table

if TYPE_CHECKING:
    from peftbench.counts.run_counts import RunCounts
    from peftbench.modification.counting import Counts

NUMBERS = ("trained", "stored", "paper")
WORDS = {"places": 12, "weights at each": 12}  # minimum widths, in characters
WHERE_THEY_DIFFER = ("task", "model", "deviations")  # columns that are shown only if the runs differ in them


def show_run(counted: RunCounts, console: Console) -> None:
    """Print one run: its modifications, then a table of the kinds of places with their numbers, totals and head."""
    run, totals = counted.run, counted.totals
    backbone = f" of {totals.backbone:,} parameters without task head"
    console.print(Text.assemble((run.method, "bold"), " on ", (run.model.name, "bold"), backbone))
    for modification in list_modifications(run).values():
        console.print(Text(f"  {_format_axes(modification)}{_format_bottleneck(modification)}"))
    if run.peft:
        console.print(Text(f"  {_format_point(run)}{_format_bottleneck(run)}"))
    if counted.deviations:
        console.print("As in the paper's released code, not its text:")
    for deviation in counted.deviations:
        console.print(Padding(Text(deviation.sentence), (0, 0, 0, 2), expand=False))
    if run.budget is not None:
        console.print(Text(f"  solved for a budget of {_format_budget(run, totals)}"))
    for note in counted.notes:
        console.print(Padding(Text(note), (0, 0, 0, 2), expand=False))
    console.print()

    table = _make_table("places", "weights at each", *NUMBERS)
    prefix: str | None = ""
    for group in counted.groups:
        if group.prefix != prefix:
            table.add_section()
        prefix = group.prefix
        label = group.label if prefix is None else f"{group.label} ×{group.places}"
        table.add_row(
            label, "\n".join(format_weights(group.tensors)), *(f"{getattr(group, name):,}" for name in NUMBERS)
        )
    table.add_section()
    numbers = [getattr(totals, name) for name in NUMBERS]
    table.add_row("total", "", *(f"{number:,}" for number in numbers), style="bold")
    table.add_row("% of backbone", "", *(f"{totals.percent(number):.2f}" for number in numbers))
    if totals.head:
        table.add_section()
        table.add_row("task head, in addition", "", f"{totals.head:,}", f"{totals.head:,}", "")
        share = f"{totals.percent(totals.head):.2f}"
        table.add_row("% of backbone", "", share, share, "")
    if counted.dead:
        table.add_section()
        table.add_row("dead, in addition", "", f"{counted.dead:,}", "", "")
    console.print(table)


def show_sweep(counted: Sequence[RunCounts], console: Console) -> None:
    """Print one table with a row for each run, in the order of the sweep, with as many columns as fit."""
    if not counted:
        return
    if len({c.run.model.name for c in counted}) == 1:
        backbone = counted[0].totals.backbone
        console.print(Text.assemble((counted[0].run.model.name, "bold"), f" of {backbone:,} parameters"))
    differing = [c for c in COLUMNS if c.key not in WHERE_THEY_DIFFER or len({c.cell(run) for run in counted}) > 1]
    budgeted = any(run.run.budget is not None for run in counted)
    show_table([c for c in differing if budgeted or c.key != "budget"], counted, console)
    for note in dict.fromkeys(note for run in counted for note in run.notes):
        console.print(Text(note))


def _format_four_axes(counted: RunCounts) -> str:
    """Return the four axes of each modification, a line each, then what else is trained."""
    lines = [_format_axes(m) for m in list_modifications(counted.run).values()]
    if counted.run.peft:
        lines.append(_format_point(counted.run))
    if counted.run.unfreeze is not Unfreeze.none:
        lines.append(UNFROZEN[counted.run.unfreeze.name])
    return "\n".join(lines)


def _format_bottlenecks(counted: RunCounts) -> str:
    modifications = [counted.run] if counted.run.peft else list_modifications(counted.run).values()
    sizes = (m.bottleneck for m in modifications)
    return "\n".join("" if size is None else str(size) for size in sizes)


def _format_deviations(counted: RunCounts) -> str:
    return "\n".join(deviation.name.replace("_", " ") for deviation in counted.deviations)


def _total(name: str, dispensable: int = 0) -> Column[RunCounts]:
    return Column(name, name, lambda counted: f"{getattr(counted.totals, name):,}", dispensable=dispensable)


COLUMNS: list[Column[RunCounts]] = [
    Column("method", "method", lambda counted: counted.run.method, words=True, wrap=17),
    Column("task", "task", lambda counted: counted.run.task.name, words=True, wrap=8),
    Column("model", "model", lambda counted: counted.run.model.name, words=True, wrap=8),
    Column("budget", "budget", lambda counted: counted.run.budget or ""),
    Column("axes", "four axes", _format_four_axes, words=True, wrap=20),
    Column("deviations", "as in the code", _format_deviations, words=True, wrap=16),
    Column("bottleneck", "bottle-\nneck", _format_bottlenecks),
    _total("trained", dispensable=2),
    _total("stored"),
    _total("paper", dispensable=3),
    _total("head", dispensable=4),
    Column("percent", "%\nstored", lambda counted: f"{counted.totals.percent(counted.totals.stored):.2f}"),
]


def counts_to_json(counted: Sequence[RunCounts]) -> str:
    """Return a JSON array with an object for each run; `percent` is the percentage of the backbone."""
    return json.dumps([_to_object(c) for c in counted], indent=2)


def _to_object(counted: RunCounts) -> dict[str, Any]:
    run, totals = counted.run, counted.totals
    names = (*NUMBERS, "head")
    return {
        "method": run.method,
        "task": run.task.name,
        "model": run.model.name,
        "axes": [
            {"prefix": prefix, **read_axes(m)._asdict(), "bottleneck": m.bottleneck}
            for prefix, m in list_modifications(run).items()
        ],
        "peft": run.peft,
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


def _format_axes(m: Modification) -> str:
    """Return the four axes in one line, as `peftbench results` writes them."""
    *names, composition = read_axes(m)
    joined = format_composition(composition, m.composition_function.scale, m.composition_function.learned)
    return format_axes(*names, joined)


def _format_point(run: Run) -> str:
    """Return the axes that a method of peft has, in one line."""
    point = read_point(run)
    return format_axes(*point[:3], format_composition(point.composition_function, point.scale, False))


def _format_bottleneck(m: Modification) -> str:
    return "" if m.bottleneck is None else f", bottleneck {m.bottleneck}"


def _format_budget(run: Run, totals: Counts) -> str:
    """Return the budget as typed, followed by its number if that is different."""
    assert run.budget is not None
    number = f"{parse_budget(run.budget, totals.backbone):,}"
    return number if run.budget.isdigit() else f"{run.budget}, {number}"


def format_weights(tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a line for each tensor and its bias, such as `down 512×1024 + 512`."""
    sizes = {name.removeprefix("function."): format_shape(shape) for name, shape in sorted(tensors.items())}
    return [
        f"{name} {size}" + (f" + {sizes[f'{name}_bias']}" if f"{name}_bias" in sizes else "")
        for name, size in sizes.items()
        if not name.endswith("_bias")
    ]


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as `512×1024`. Axes of 1 are left out: the axis for groups, and the one that biases have next to
    it."""
    return "×".join(str(size) for size in shape if size != 1) or "1"


def _make_table(*headers: str) -> Table:
    """Return a table whose columns hold text if `WORDS` has them, else numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for header in headers:
        if header in WORDS:
            table.add_column(header, min_width=WORDS[header], overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    return table
