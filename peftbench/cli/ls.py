"""List the choices of a group, the keys, or which combinations of the four axes run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftbench.config.axes import CHOICES, Point, is_allowed, list_points
from peftbench.config.keys import Key, list_keys
from peftbench.config.notation import describe_choice
from peftbench.config.peft_methods import METHODS, is_peft_installed, list_types
from peftbench.config.rows import GROUP, PaperRow, read_rows
from peftbench.config.schema import find_conf_dir
from peftbench.utils.console import make_console, say
from peftbench.utils.errors import UserError, describe_unknown, suggest

Options = Mapping[str, Path | PaperRow]  # the options of a group, by name

MARKDOWN = """\
# Keys

The keys that `KEY=VALUE` sets, as printed by `peftbench ls keys --markdown`. A key has its default value unless the
method, the task or the trainer sets it. A key without a default is always set by one of them. The headings are also
groups: `functional_form=relu` or `task=xsum` takes a preset of one, and `peftbench ls task` lists a group's presets."""


def main(argv: Sequence[str]) -> int:
    """Print what `peftbench ls [GROUP]` asks for and return 0. Raises UserError for an unknown group."""
    parser = argparse.ArgumentParser("peftbench ls", description=__doc__)
    parser.add_argument("group", nargs="?", help="axes, keys, peft, or a group of conf/ such as method or task")
    parser.add_argument("start", nargs="?", default="", help="with keys: the start of the keys, such as trainer")
    parser.add_argument("-cd", "--config-dir", type=Path, help="a folder of your own with method/, task/ ... below it")
    parser.add_argument("--markdown", action="store_true", help="with keys: print the tables of docs/keys.md")
    parser.add_argument("--json", action="store_true", help="with axes: print every point, and whether it runs")
    arguments = parser.parse_args(argv)
    if arguments.start and arguments.group != "keys":
        raise UserError(f"{arguments.start}: ls {arguments.group} takes no further word; ls keys START does.")
    console, groups = make_console(), find_option_groups(arguments.config_dir)
    if arguments.group is None:
        show_option_groups(groups, console)
        console.print(
            "peftbench ls GROUP says what each choice is, ls axes which combinations run, ls keys what keys mean."
        )
    elif arguments.group == "axes":
        if arguments.json:
            say(json.dumps([{**point._asdict(), "runs": is_allowed(point)} for point in list_points()], indent=1))
        else:
            _show_axes(console)
    elif arguments.group == "keys":
        found = _find_keys(arguments.start)
        if arguments.markdown:
            say("\n".join(_to_markdown(found)))
        else:
            _show_keys(found, console)
    elif arguments.group == "peft":
        _show_peft(console)
    elif arguments.group in groups:
        _show_group(arguments.group, groups[arguments.group], console)
    else:
        raise UserError(describe_unknown("group", arguments.group, ["axes", "keys", "peft", *groups]))
    return 0


def find_option_groups(config_dir: Path | None) -> dict[str, Options]:
    """Return the options of each group of conf/, and of a folder of the user's own.

    Raises:
        UserError: the folder is none, or holds what would not be read.
    """
    groups = dict(sorted({**_list_groups(find_conf_dir()), GROUP: read_rows()}.items()))
    if config_dir is not None:
        from peftbench.config.compose import check_config_dir  # imports Hydra, which is needed only here

        check_config_dir(config_dir)
        for name, options in _list_groups(config_dir).items():
            groups[name] = {**groups.get(name, {}), **options}
    return groups


def show_option_groups(groups: Mapping[str, Options], console: Console) -> None:
    """Print each group with the names of its options, as they are typed."""
    for name, options in groups.items():
        console.print(Text.assemble((name, "bold"), f": {', '.join(options)}"))


def _list_groups(conf: Path) -> dict[str, Options]:
    """Return the groups of a folder that are not empty, with the files of their options by name, as paper/table5."""
    folders = sorted(
        path for path in (*conf.iterdir(), *conf.glob("hydra/*")) if path.is_dir() and path.name != "hydra"
    )
    found = {
        folder.relative_to(conf).as_posix(): {
            file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))
        }
        for folder in folders
    }
    return {name: options for name, options in found.items() if options}


def _show_group(group: str, options: Options, console: Console) -> None:
    """Print each option with its meaning: the comment at the start of its file, the help of a row of the paper, or the
    description of an axis's choice."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, option in options.items():
        table.add_row(
            name, _get_meaning(option) or (describe_choice(group, name) if name in CHOICES.get(group, ()) else "")
        )
    console.print(table, highlight=False)


def _get_meaning(option: Path | PaperRow) -> str:
    if isinstance(option, PaperRow):
        return option.help
    return " ".join(_read_opening(option.read_text(encoding="utf-8").splitlines()))


def _read_opening(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            return
        yield line.lstrip("# ").rstrip()


def _show_peft(console: Console) -> None:
    """Print the values of `peft.type` with their formulas; peft has further ones where it is installed."""
    names = list_types() if is_peft_installed() else list(METHODS)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name in names:
        table.add_row(name, METHODS[name].formula if name in METHODS else "see peft's documentation")
    console.print(table, highlight=False)
    if not is_peft_installed():
        console.print("peft, which computes them, is not installed: pip install peftbench[peft].", highlight=False)
    console.print("Each is peft.type=NAME of method=peft; peftbench ls method has the presets.", highlight=False)


def _find_keys(start: str) -> list[Key]:
    """Return the keys that begin with `start`. Raises UserError if there are none."""
    found = [key for key in list_keys() if key.name.startswith(start)]
    if not found:
        groups = dict.fromkeys(key.name.partition(".")[0] for key in list_keys())
        raise UserError(f"No key starts with {start}{suggest(start, groups)}")
    return found


def _show_keys(found: Sequence[Key], console: Console) -> None:
    """Print keys with their choices, or if there are none the schema's default, and their meanings."""
    for key in found:
        console.print(Text.assemble((key.name, "bold"), f": {', '.join(key.choices) or key.default}"))
        console.print(Padding(Text(key.meaning), (0, 0, 0, 4)))
    console.print(
        "After each key: its choices, or its default value, which the method, the task or the trainer may change."
    )


def _to_markdown(found: Sequence[Key]) -> Iterator[str]:
    """Yield the lines of a page with a table for the keys of each group; keys without a group come first."""
    yield MARKDOWN
    for group in sorted(dict.fromkeys(map(_group, found)), key=bool):
        yield from ("", f"## `{group}`" if group else "## The run", "")
        yield from ("| key | default | choices | meaning |", "|---|---|---|---|")
        for key in found:
            if _group(key) == group:
                choices, meaning = ", ".join(map(_format_code, key.choices)), key.meaning.replace("|", r"\|")
                yield f"| {_format_code(key.name)} | {_format_code(key.default)} | {choices} | {meaning} |"


def _group(key: Key) -> str:
    return key.name.split(".")[0] if "." in key.name else ""


def _format_code(text: str) -> str:
    return f"`{text}`" if text else ""


def _show_axes(console: Console) -> None:
    """Print the choices with their meanings, then for each representation which forms run in which combination."""
    for axis, choices in CHOICES.items():
        console.print(Text(axis, "bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for choice in choices:
            table.add_row(f"  {choice}", describe_choice(axis, choice))
        console.print(table, highlight=False)

    forms, representations, insertions, compositions = CHOICES.values()
    possible = sum(1 for _ in list_points())
    console.print(Text(f"\nWhich run ({sum(map(is_allowed, list_points()))} of {possible} points)", "bold"))
    letters = {form: form[0] for form in forms}
    console.print(f"{', '.join(f'{letter}: {form}' for form, letter in letters.items())}; ·: none", highlight=False)
    for insertion in insertions:
        console.print()
        matrix = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for header in (insertion, *compositions):
            matrix.add_column(header, no_wrap=True)
        for representation in representations:
            cells = (
                "".join(
                    letters[form] for form in forms if is_allowed(Point(form, representation, insertion, composition))
                )
                for composition in compositions
            )
            matrix.add_row(representation, *(cell or "·" for cell in cells))
        console.print(matrix, highlight=False)
    console.print("A combination that does not run is refused with its reason and the nearest one that does.")
