"""Print an explanation on the terminal, and write it as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from peftbench.config.budget import parse_budget
from peftbench.config.schema import Unfreeze
from peftbench.counts.sizes import MEANINGS, Size

if TYPE_CHECKING:
    from peftbench.counts.explanation import Explanation
    from peftbench.counts.formula import Description
    from peftbench.counts.tree import Branch

INSERTED, MARK, HEADING = "bold green", "yellow", "bold"
UNMODIFIED = {
    Unfreeze.none: "No representation is modified.",
    Unfreeze.bias: "No representation is modified; the backbone's own biases are trained.",
    Unfreeze.norm: "No representation is modified; the backbone's own norms are trained.",
    Unfreeze.all: "No representation is modified; all of the backbone's own parameters are trained.",
}


def show_explanation(explained: Explanation, console: Console) -> None:
    """Print the rows, the layers and the parameters."""
    run, totals = explained.counted.run, explained.counted.totals
    console.print(
        Text.assemble((run.method, HEADING), " on ", (run.model.name, HEADING), f" of {totals.backbone:,} parameters")
    )
    for note in explained.counted.notes:
        console.print(Padding.indent(Text(note), 2))
    for row in explained.rows:
        console.print()
        _show_row(row, console)
    if not explained.rows:
        console.print(UNMODIFIED[run.unfreeze])
    elif run.unfreeze is not Unfreeze.none:
        what = {"bias": "biases", "norm": "norms", "all": "parameters"}[run.unfreeze.name]
        console.print(f"\nThe backbone's own {what} are trained too.")

    console.print()
    legend = Text.assemble("The network: ", ("+ inserted", INSERTED), ", ", ("« read, edited or trained", MARK))
    tree = Tree(legend, guide_style="dim")
    for branch in explained.network:
        _grow_tree(tree, branch)
    console.print(tree, highlight=False)
    console.print()
    _show_parameters(explained, console)


def explanation_to_json(explained: Explanation) -> str:
    """Return a JSON object with the rows, the parameters' formulas and totals, and the network."""
    run, totals = explained.counted.run, explained.counted.totals
    values = {
        "method": run.method,
        "task": run.task.name,
        "model": run.model.name,
        "budget": run.budget,
        "notes": explained.counted.notes,
        "unfreeze": run.unfreeze.name,
        "modifications": [asdict(row) for row in explained.rows],
        "parameters": [
            {
                "label": size.label,
                "prefix": size.prefix,
                "formula": size.formula,
                "numbers": size.numbers,
                "values": size.values,
                "stored": size.stored,
            }
            for size in explained.sizes
        ],
        "totals": asdict(totals),
        "network": [asdict(branch) for branch in explained.network],
    }
    return json.dumps(values, indent=2, ensure_ascii=False)


def _show_row(row: Description, console: Console) -> None:
    name = row.name or "a point for which the paper has no result"
    keys = f"{row.prefix}*: " if row.prefix else ""
    console.print(Text.assemble((f"{keys}{name}", HEADING)))
    grid = Table.grid(padding=(0, 2))
    for _ in range(3):
        grid.add_column(overflow="fold")
    for axis, (choice, meaning) in row.axes.items():
        grid.add_row(axis, Text(choice, HEADING), Text(meaning))
    console.print(Padding.indent(grid, 2), highlight=False)
    console.print(Text(f"  {row.formula}", INSERTED))


def _grow_tree(tree: Tree, branch: Branch) -> None:
    if branch.inserted:
        label = Text(f"+ {branch.name}: {branch.kind}", INSERTED)
    else:
        label = Text(f"{branch.name}  ")
        label.append(f"{branch.kind} {branch.sizes}".rstrip(), "dim")
        if branch.marks:
            label.append(f"  « {', '.join(branch.marks)}", MARK)
    child = tree.add(label)
    for below in branch.children:
        _grow_tree(child, below)


def _show_parameters(explained: Explanation, console: Console) -> None:
    run, totals = explained.counted.run, explained.counted.totals
    console.print(Text("Parameters", HEADING))
    for row in explained.rows:
        sizes = [size for size in explained.sizes if size.prefix == row.prefix]
        _show_letters(row.prefix, sizes, console)
        for size in sizes:
            formula, numbers = f"{size.label}: {size.formula}", f"= {size.numbers} = {size.stored:,}"
            if len(f"    {formula} {numbers}") <= console.width:
                formula, numbers = f"{formula} {numbers}", ""
            for line in filter(None, (formula, f"  {numbers}".rstrip())):
                console.print(Padding.indent(Text(line), 4))
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right")
    grid.add_column(justify="right")
    grid.add_column(overflow="fold")
    if run.budget is not None:
        most = parse_budget(run.budget, totals.backbone)
        grid.add_row("budget", f"{most:,}", f"{totals.percent(most):.2f}%", "the bottlenecks are solved for it")
    for group in explained.counted.groups:
        if explained.rows and group.prefix is None:
            share = f"{totals.percent(group.stored):.2f}%"
            grid.add_row(group.label.removeprefix("the backbone's "), f"{group.stored:,}", share, "the backbone's own")
    mlp = "during training an MLP computes the prefix" if totals.trained != totals.stored else ""
    stored = Text(f"{totals.stored:,}", HEADING)
    grid.add_row("stored", stored, f"{totals.percent(totals.stored):.2f}%", "of the backbone")
    grid.add_row("trained", f"{totals.trained:,}", f"{totals.percent(totals.trained):.2f}%", mlp)
    if totals.head:
        grid.add_row("task head", f"{totals.head:,}", f"{totals.percent(totals.head):.2f}%", "trained in addition")
    console.print(Padding.indent(grid, 2), highlight=False)


def _show_letters(prefix: str, sizes: list[Size], console: Console) -> None:
    """Print the meanings of the letters in a modification's formulas."""
    values = {letter: value for size in sizes for letter, value in size.values.items()}
    told = [f"{letter} = {values[letter]} ({meaning})" for letter, meaning in MEANINGS.items() if letter in values]
    console.print(Padding.indent(Text(f"{prefix}*: {', '.join(told)}" if prefix else ", ".join(told)), 2))
