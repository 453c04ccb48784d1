"""The content of a report as JSON values: columns, axes, settings, curves and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import compress, islice
from typing import Any

from peftbench import __version__
from peftbench.records.record import Axes, Record
from peftbench.records.run_files import name_predictions_file, read_lines, read_metrics
from peftbench.records.wording import format_value
from peftbench.tables.columns import PAPER, choose_columns
from peftbench.tables.comparison import read_settings
from peftbench.tables.fields import AVERAGE, COSTS, FIELDS, MANY_CUT_OFF, find_field, list_further_splits
from peftbench.tables.figure import COLOURS
from peftbench.tables.plot import NAMES
from peftbench.tables.row import Row, get_rank, identify_data, identify_point, make_rows, split_tables
from peftbench.tables.terminal import make_titles
from peftbench.utils.differences import find_differing

SAMPLES = 6  # predictions of each run
LONGEST = 600  # characters of each prediction
POINTS = 100  # maximum number of points of a curve
# The columns that are visible at first, in this order, if they distinguish runs; the first ones are always visible.
ALWAYS = ("method", "score", "stored", "percent")
SHOWN = (
    *("method", "score", AVERAGE, "delta", "paper", "paper_of", "difference"),
    *("seed", "task", "model", "axes", "bottleneck"),
    *("stored", "percent", "trained", "tokens_per_s", "memory", "time", "forgetting", "token_ms"),
    *("use_memory", "learning_rate", "status", "error", "debug"),
)
HEADERS = {
    "axes": "four axes",
    "delta": "Δ full",
    "paper_of": "printed for",
    "difference": "Δ paper",
    "percent": "% stored",
    "memory": "peak GiB",
    "tokens_per_s": "tokens/s",
    "adapter": "adapter MiB",
    "general_loss": "general loss",
    "speed": "speed, % of bare",
    "forgetting": "general Δ loss",
    "token_ms": "ms/token in use",
    "use_memory": "GiB in use",
}
FORMS = {
    **dict.fromkeys(("trained", "stored", "backbone", "examples", "train_examples", "steps", "tokens_per_s"), "count"),
    "score": "score",
    "paper": "score",
    "percent": "score",
    "memory": "score",
    "time": "duration",
    "adapter": "score",
    "use_memory": "score",
    "forgetting": "change",
    "delta": "signed",
    "difference": "signed",
}


def build_content(
    records: Sequence[Record], words: Sequence[str] = (), samples: int = SAMPLES, paper: bool = False
) -> dict[str, Any]:
    """Return all content of the page, best runs first; comparable runs are one group.

    Args:
        words: the words that were typed to choose the runs.
        samples: number of predictions of each run.
        paper: show the paper's scores also next to runs with another backbone or less data.
    """
    tables = split_tables(make_rows(records))
    groups = sorted((sorted(table, key=get_rank) for table in tables), key=_rank_group)
    rows = [(index, row) for index, table in enumerate(groups) for row in table]
    points = _number_points(rows)
    keys, values, settings = _index_settings([row.first for _, row in rows])
    shown = _describe_columns(groups, paper)
    return {
        "made": f"peftbench {__version__}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "words": " ".join(words),
        "colours": COLOURS,
        "groups": [heading.plain for heading in make_titles(groups)],
        "columns": [{key: value for key, value in column.items() if key != "cells"} for column in shown],
        "baselines": list(dict.fromkeys(name for record in records for name in record.baselines)),
        "settings": {"keys": keys, "values": values},
        "runs": [
            {
                "run": row.first.run,
                "folder": str(row.first.folder),
                "method": row.first.method,
                "group": group,
                "point": points[index],
                "full": row.first.is_full,
                "data": " ".join(map(str, identify_data(row.first))),
                "unfreeze": row.first.unfreeze,
                "error": f"{row.first.error.name}: {row.first.error.message}" if row.first.error else None,
                "overrides": row.first.overrides,
                "cells": [column["cells"][index] for column in shown],
                "axes": [_describe_axes(axes) for axes in row.first.axes],
                "settings": settings[index],
                "curves": _read_curves(row),
                "predictions": _sample_predictions(row.first, samples),
            }
            for index, (group, row) in enumerate(rows)
        ],
    }


def _rank_group(table: Sequence[Row]) -> tuple[bool, bool, int]:
    """Return the sort key of a group: large groups first; then those without a score, and debug runs."""
    return (table[0].first.debug is not None, not any(row.scored for row in table), -len(table))


def _number_points(rows: Sequence[tuple[int, Row]]) -> list[int]:
    """Return a number for each run; runs of a group that differ only in their seed have the same number."""
    known: dict[tuple[Any, ...], int] = {}
    return [known.setdefault((group, identify_point(row.first)), len(known)) for group, row in rows]


def _describe_columns(groups: Sequence[Sequence[Row]], paper: bool) -> list[dict[str, Any]]:
    """Return the columns that `peftbench results` knows, with the cells in the order of the rows."""
    records = [row.first for table in groups for row in table]
    measured = dict.fromkeys(name for r in records if "report" in r.scores for name in r.scores["report"].metrics)
    measured |= dict.fromkeys(name for r in records for name in r.baselines)
    further = list_further_splits(records)
    measured |= dict.fromkeys([*further, AVERAGE] if len(further) > 1 else further)
    found = {key: list(map(find_field(key, records), records)) for key in [*FIELDS, *measured]}
    beside: dict[str, list[Any]] = {key: [] for key in ("axes", "paper_of", "delta", *PAPER)}
    for table in groups:
        known = {column.key: column for column in choose_columns(table, paper=paper)}
        for key, cells in beside.items():
            column = known.get(key)
            cells += [None if column is None else (column.value or column.cell)(row) for row in table]
    found |= beside

    made = []
    for key in filter(found.__contains__, dict.fromkeys([*SHOWN, *found])):
        cells = [_to_cell(value) for value in found[key]]
        kinds = {type(cell) for cell in cells} - {type(None)}
        if not kinds and key not in ALWAYS:
            continue
        words = bool(kinds - {int, float})
        apart = len(set(cells)) > 1
        # Each run has its own score in a metric; other values, such as a learning rate, are shown as they are.
        form = "words" if words else FORMS.get(key, "score" if key in measured and key not in FIELDS else "number")
        made.append(
            {
                "key": key,
                "header": HEADERS.get(key, key.replace("_", " ")),
                "name": NAMES.get(key, HEADERS.get(key, key.replace("_", " "))),
                "form": form,
                "better": _find_better(key, form),
                "shown": key in ALWAYS or (key in SHOWN and apart) or (key == "cut_off" and _has_many(cells)),
                "same": None if apart else cells[0],
                "cells": [None if cell is None else str(cell) for cell in cells] if words else cells,
            }
        )
    return made


def _has_many(cut_off: Sequence[Any]) -> bool:
    """Return whether some run had many of its texts cut off, which its score does not show."""
    return any(share is not None and share > MANY_CUT_OFF for share in cut_off)


def _find_better(key: str, form: str) -> str | None:
    """Return which end of a column is marked as the best. The paper's printed score is not one of our scores."""
    if key in COSTS:
        return "lower"
    return "higher" if key == "tokens_per_s" or (form == "score" and key != "paper") else None


def _to_cell(value: Any) -> Any:
    """Return a number, a text or None. A mixture's values become one text; a single modification's value stays."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else format_value(value) or None


def _describe_axes(axes: Axes) -> dict[str, str]:
    """Return the four axes of a modification, its size and its options, by name."""
    return {
        "functional form": axes.functional_form,
        "modified representation": axes.modified_representation,
        "insertion form": axes.insertion_form,
        "composition function": axes.composition,
        "bottleneck": format_value(axes.bottleneck),
        **{key: _format_setting(value) or "none" for key, value in axes.options.items()},
    }


def _index_settings(records: Sequence[Record]) -> tuple[list[str], list[list[str]], list[list[int]]]:
    """Return (keys that differ among the runs, the values of each key, for each run the indices of its values; -1 for
    none)."""
    settings = [read_settings(record) for record in records]
    keys = find_differing(settings)
    values: list[dict[str, int]] = [{} for _ in keys]
    of_runs = []
    for one in settings:
        pairs = zip(keys, values, strict=True)
        of_runs.append(
            [known.setdefault(_format_setting(one[key]), len(known)) if key in one else -1 for key, known in pairs]
        )
    return keys, [list(known) for known in values], of_runs


def _format_setting(value: Any) -> str:
    return ", ".join(map(format_value, value)) if isinstance(value, list) else format_value(value)


def _read_curves(row: Row) -> list[dict[str, Any]]:
    """Return the values that a run logged during training, grouped by their steps and thinned out evenly."""
    lines = read_metrics(row.first.folder)
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:  # without the training of the head alone, which comes second
        for key, value in line.items():
            number = isinstance(value, int | float) and math.isfinite(value)
            if number and key not in ("step", "epoch") and line["stage"] == lines[0]["stage"]:
                found.setdefault(key, []).append((line["step"], value))
    together: dict[tuple[int, ...], dict[str, list[float]]] = {}
    for key, points in found.items():
        if len(points) > 1:  # single points are sums computed at the end
            thinned = points[:: -math.ceil(len(points) / POINTS)][::-1]  # the last point is always kept
            steps, values = zip(*thinned, strict=True)
            together.setdefault(steps, {})[key] = [float(f"{value:.4g}") for value in values]
    return [{"steps": steps, "values": values} for steps, values in together.items()]


def _sample_predictions(record: Record, samples: int) -> list[list[str]]:
    """Return the first predictions, each as (example, reference, prediction). All runs have the same examples."""
    found: list[list[str]] = []
    lines = read_lines(record.folder / name_predictions_file("report"), None if record.restricted else samples)
    chosen = compress(lines, record.restricted.chosen) if record.restricted else lines
    for one in islice(chosen, samples):
        if one is not None and {"reference", "prediction"} <= one.keys():  # not a damaged line or another program's
            name = str(one.get("id", one.get("index", len(found))))
            found.append([name, _cut_text(one["reference"]), _cut_text(one["prediction"])])
    return found


def _cut_text(value: Any) -> str:
    whole = str(value)
    return whole if len(whole) <= LONGEST else whole[:LONGEST] + " …"
