"""What the pictures of `peftbench plot` share: their arrangement, names, colours and files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from peftbench.config.axes import CHOICES
from peftbench.records.record import Record
from peftbench.records.wording import format_value
from peftbench.tables.fields import FIELDS, find_field
from peftbench.tables.row import Row, identify_data
from peftbench.tables.terminal import make_title
from peftbench.utils.differences import find_differing
from peftbench.utils.files import dump_json, write_beside
from peftbench.utils.text import format_count, strip_controls

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito (2008): distinguishable for the colour-blind too; the darkest first, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
COLUMNS = 3  # panels next to each other
A_NAME = 0.206  # inches of the legend's height
BELOW = 4  # lines of names below several panels; more names are next to them
# Inches of a panel: alone, and beside others, so that three are as wide as a page and its letters stay as large.
ALONE, BESIDE = (4.4, 3.5), (3.0, 2.9)
DATA = {".svg": "Description", ".png": "Description", ".pdf": "Subject"}  # the metadata that hold what is drawn


def save_figure(figure: Figure, file: Path, marks: Sequence[dict[str, Any]] = ()) -> None:
    """Write the picture, and the numbers of its marks to its metadata (`list_marks`); in an SVG, words stay text.

    The same data make the same file. Names are drawn as they are: an SVG has no controls, and $ is no formula.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(strip_controls(text.get_text()))
        text.set_parse_math(False)
    if figure.get_layout_engine() is not None:  # once, so that no picture depends on those saved before it
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = file.suffix.lower()
    about: dict[str, Any] = {DATA[kind]: dump_json(list(marks), ensure_ascii=True)} if marks else {}
    about |= {} if kind == ".png" else {"Date" if kind == ".svg" else "CreationDate": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "peftbench"}), write_beside(file) as unfinished:
        figure.savefig(unfinished, format=kind.removeprefix("."), dpi=200, metadata=about)


def draw_figure(panels: Sequence[Callable[[Axes], None]], note: str = "") -> Figure:
    """Arrange panels next to and below each other, with one legend: next to one panel, below several."""
    from matplotlib import rc_context
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

    across = min(len(panels), COLUMNS)
    down = -(-len(panels) // across)
    wide, high = BESIDE if across > 1 else ALONE
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(layout="constrained")
        grid = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            panel(axes)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
        each = 0.6 + 0.075 * max(map(len, handles), default=0)  # inches of a name with its line
        abreast = max(1, min(int(wide * across / each), len(handles)))
        lines = math.ceil(len(handles) / abreast)
        if across > 1 and lines <= BELOW:
            note = fill(note, int(wide * across / 0.07))
            figure.set_size_inches(wide * across, high * down + 0.17 * (lines + note.count("\n") + bool(note)))
            place, columns = "outside lower center", math.ceil(len(handles) / lines)
        else:
            note = fill(note, max(24, int(each / 0.07)))
            names = int(high * down / A_NAME) - note.count("\n") - bool(note)  # below each other
            columns = math.ceil(len(handles) / names) or 1
            figure.set_size_inches(wide * across + each * columns, high * down)
            place = "outside right upper"
        figure.legend(
            handles.values(),
            handles.keys(),
            loc=place,
            frameon=False,
            ncols=columns,
            title=note or None,
            title_fontproperties={"size": 8},
            alignment="left",
        )
    return figure


def name_panels(tables: Sequence[Sequence[Row]]) -> list[str]:
    """Return a title for each panel: its task and backbone, the backbone's version where only that differs."""
    found = [make_title(table).plain.partition(",")[0].partition(" of ")[0] for table in tables]
    short = [re.sub(r"@\w+( \(debug=.*\))?$", r"\1", title) for title in found]
    return [one if short.count(one) == 1 else title for one, title in zip(short, found, strict=True)]


def name_lines(panels: Sequence[Sequence[Row]], by: str) -> dict[int, str]:
    """Return the name of the line on which each row is a point.

    By method, a method that was tried with several axes has a line for each: adapter · ffn, adapter · attention. The
    same holds, in a panel, for a method that was tried with several scales, trained for several lengths or on several
    numbers of examples, or chosen on several splits, but not for one whose sizes have different learning rates. Panels
    may differ in them: MAM's scale depends on the task.
    """
    rows = [row for panel in panels for row in panel]
    if by != "method":
        return {id(row): name_row(row, by) for row in rows}
    found = {}
    for method in {row.first.method for row in rows}:
        groups = [[row for row in panel if row.first.method == method] for panel in panels]
        alike = [row for group in groups for row in group]
        differ = set(find_differing([_read_axes(row, with_scale=False) for row in alike]))
        differ.update(key for group in groups if group for key in find_differing(list(map(_read_axes, group))))
        for row in alike:
            axes = _read_axes(row)
            found[id(row)] = " · ".join([method, *(axes[key] for key in axes if key in differ)])
    for describe, panel in product((_describe_length, _describe_examples, _describe_selection), panels):
        told: dict[str, set[str]] = {}
        for row in panel:
            told.setdefault(found[id(row)], set()).add(describe(row))
        found |= {id(row): f"{name} · {describe(row)}" for row in panel if len(told[name := found[id(row)]]) > 1}
    return found


def _read_axes(row: Row, with_scale: bool = True) -> dict[str, str]:
    """Return the four axes of a row, the composition function with its scale."""
    axes = {axis: format_value(FIELDS[axis](row.first)) for axis in CHOICES}
    scaled = {"composition_function": format_value([one.composition for one in row.first.axes])}
    return axes | scaled if with_scale else axes


def _describe_length(row: Row) -> str:
    """Return the requested training length of a row's runs; a number of steps overrides one of epochs."""
    trainer = row.first.trainer
    steps, epochs = (format_value(trainer.get(key)) for key in ("max_steps", "epochs"))
    return f"{steps} steps" if steps else f"{epochs} epochs" if epochs else ""


def _describe_examples(row: Row) -> str:
    """Return on how many examples a row's runs were trained."""
    examples, _ = identify_data(row.first)
    return "" if examples is None else format_count(examples, "example")


def _describe_selection(row: Row) -> str:
    """Return the split that has chosen the state and the learning rate of a row's runs."""
    _, split = identify_data(row.first)
    return "chosen on no split" if split is None else f"chosen on {split}"


def find_row_field(key: str, rows: Sequence[Row]) -> Callable[[Record], Any]:
    """Return what reads a key of the rows' records. Raises UserError if the key is unknown."""
    return find_field(key, [record for row in rows for record in row.records])


def round_number(number: float) -> float:
    """Return a number with six digits, which are the same on every machine."""
    return float(f"{number:.6g}")


def name_row(row: Row, by: str) -> str:
    return format_value(find_field(by, row.records)(row.first)) or "none"


def choose_style(index: int) -> dict[str, Any]:
    """Return colour, mark and dashes of a line."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3],
    }


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
