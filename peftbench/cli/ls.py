"""`peftbench ls`: the choices of a group, and which combinations of the four axes run. Imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftbench.config.axes import CHOICES, Point, points, runs
from peftbench.config.fidelity import SWITCHES
from peftbench.config.keys import keys
from peftbench.config.notation import describe_choice
from peftbench.config.schema import conf_dir
from peftbench.utils.console import terminal
from peftbench.utils.errors import UserError, meant, unknown


def main(argv: Sequence[str]) -> int:
    """`peftbench ls [GROUP]`."""
    parser = argparse.ArgumentParser("peftbench ls", description=__doc__)
    parser.add_argument("group", nargs="?", help="axes, keys, or a group of conf/ such as method, task or model")
    parser.add_argument("start", nargs="?", default="", help="of keys: those that begin so, such as trainer")
    parser.add_argument("-cd", "--config-dir", type=Path, help="a folder of your own with method/, task/ ... below it")
    parser.add_argument("--json", action="store_true", help="of axes: every point, and whether it runs")
    arguments = parser.parse_args(argv)
    console, groups = terminal(), _groups(conf_dir())
    if arguments.config_dir is not None:
        if not arguments.config_dir.is_dir():
            raise UserError(f"--config-dir {arguments.config_dir} is not a folder.")
        for name, options in _groups(arguments.config_dir).items():
            groups[name] = {**groups.get(name, {}), **options}
    if arguments.group is None:
        for name, options in groups.items():
            console.print(Text.assemble((name, "bold"), f": {', '.join(options)}"))
        console.print(
            "peftbench ls GROUP says what they are, ls axes which combinations run, ls keys what each key means."
        )
    elif arguments.group == "axes":
        if arguments.json:
            print(json.dumps([{**point._asdict(), "runs": runs(point)} for point in points()], indent=1))
        else:
            _show_axes(console)
    elif arguments.group == "keys":
        _show_keys(arguments.start, console)
    elif arguments.group in groups:
        _show_group(arguments.group, groups[arguments.group], console)
    else:
        raise UserError(unknown("group", arguments.group, ["axes", "keys", *groups]))
    return 0


def _groups(conf: Path) -> dict[str, dict[str, Path]]:
    """The groups of a folder that hold anything, and the files of their options, as paper/table5, by name."""
    folders = sorted(path for path in conf.iterdir() if path.is_dir())
    found = {
        folder.name: {
            file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))
        }
        for folder in folders
    }
    return {name: options for name, options in found.items() if options}


def _show_group(group: str, options: Mapping[str, Path], console: Console) -> None:
    """Each option with the comment that opens its file; the choices of an axis with what they mean."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, file in options.items():
        opening = " ".join(_opening(file.read_text(encoding="utf-8").splitlines()))
        table.add_row(name, opening or (describe_choice(group, name) if group in CHOICES else ""))
    console.print(table, highlight=False)


def _opening(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            return
        yield line.lstrip("# ").rstrip()


def _show_keys(start: str, console: Console) -> None:
    """Keys with their choices, or else the schema's default, and their meanings."""
    found = [key for key in keys() if key.name.startswith(start)]
    if not found:
        groups = dict.fromkeys(key.name.partition(".")[0] for key in keys())
        raise UserError(f"No key begins with {start}{meant(start, groups)}")
    for key in found:
        console.print(Text.assemble((key.name, "bold"), f": {', '.join(key.choices) or key.default}"))
        switch = SWITCHES.get(key.name.removeprefix("fidelity."))
        if meaning := switch.sentence if switch else key.meaning:
            console.print(Padding(Text(meaning), (0, 0, 0, 4)))
    console.print(
        "Behind a key are its choices, or else what it is unless the method, the task or the trainer sets it."
    )


def _show_axes(console: Console) -> None:
    """The choices with their meanings, then for each representation which forms run in which combination."""
    for axis, choices in CHOICES.items():
        console.print(Text(axis, "bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for choice in choices:
            table.add_row(f"  {choice}", describe_choice(axis, choice))
        console.print(table, highlight=False)

    forms, representations, insertions, compositions = CHOICES.values()
    possible = sum(1 for _ in points())
    console.print(Text(f"\nWhich run ({sum(map(runs, points()))} of {possible} points)", "bold"))
    letters = {form: form[0] for form in forms}
    console.print(f"{', '.join(f'{letter}: {form}' for form, letter in letters.items())}; ·: none", highlight=False)
    for insertion in insertions:
        console.print()
        matrix = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for header in (insertion, *compositions):
            matrix.add_column(header, no_wrap=True)
        for representation in representations:
            cells = (
                "".join(letters[form] for form in forms if runs(Point(form, representation, insertion, composition)))
                for composition in compositions
            )
            matrix.add_row(representation, *(cell or "·" for cell in cells))
        console.print(matrix, highlight=False)
    console.print("A combination that does not run is refused with its reason and the nearest one that does.")
