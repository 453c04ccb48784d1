#!/usr/bin/env python
"""Brings docs/reproduction.md, README.md and their pictures up to date: what commands print of outputs/reference.

Searches over the axes that were planned and have no record are said not to have been run. README.md shows those of
its cells of which there are records.

python scripts/claims_page.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

from peftbench.cli.claims import main as claims
from peftbench.cli.plot import main as plot
from peftbench.cli.results import main as results
from peftbench.cli.searched import list_study_names, name_study
from peftbench.tables.searches import find_studies
from peftbench.tables.select import load_folders

ROOT = Path(__file__).resolve().parents[1]
PAGE, README, PICTURE = ROOT / "docs" / "reproduction.md", ROOT / "README.md", ROOT / "docs" / "images" / "scores.svg"
CURVES = PICTURE.with_name("curves.svg")
RECORDS = ROOT / "outputs" / "reference"
BEGIN, END = "<!-- peftbench claims outputs/reference --markdown -->\n", "<!-- end -->\n"
BEGIN_GROUPS = "<!-- peftbench claims outputs/reference group=seen --short --markdown, and group=unseen -->\n"
BEGIN_SEARCHES = "<!-- peftbench claims outputs/reference --searches --markdown -->\n"
PLANNED = [(*cell, budget) for cell in (("sst2", "minilm-l6"), ("webnlg", "smollm2-135m")) for budget in ("0.5%", "2%")]

BEGIN_SCORES = "<!-- peftbench results, by scripts/claims_page.py -->\n"
BEGIN_VERDICTS = "<!-- peftbench claims --short, by scripts/claims_page.py -->\n"
# The cells of README.md, folders in outputs/reference/reproduction, as they are named there.
CELLS = {
    "sst2/minilm-l6": "MiniLM, encoder: SST-2",
    "webnlg/bart-mini": "BART, encoder-decoder: WebNLG",
    "webnlg/smollm2-135m": "SmolLM2, decoder: WebNLG",
}
GROUPS = {
    "seen": "The categories that are trained on, `group=seen`:",
    "unseen": "The other categories, `group=unseen`:",
}
# The rows of the steps `insertion` and `mam` of scripts/reproduction.sh, as filters.
ROWS = [
    *("budget=2%", "row=sa_ffn_200,pa_ffn_200,sa_attention_200,pa_attention_200"),
    *("or", "budget=6.7%", "row=pa_ffn_200,scaled_pa_ffn_512,lora_ffn_102,mam_30_512"),
    *("or", "row=full"),
]
LABELS = {"budget": "stored", "modified_representation": "at"}


def write_page(page: str, records: Path = RECORDS) -> str:
    """Return the page with the tables that the records have now."""
    page = replace_part(page, BEGIN, _run(claims, [str(records), "--markdown"]))
    page = replace_part(page, BEGIN_GROUPS, write_groups(records))
    return replace_part(page, BEGIN_SEARCHES, write_searches(records))


def write_groups(records: Path) -> str:
    """Return the verdicts on the test examples of the categories that are trained on, and on those of the others."""
    lines: list[str] = []
    for group, title in GROUPS.items():
        told = _run(claims, [str(records), f"group={group}", "--short", "--markdown"])
        lines += [title, "", *_list_table(told), "", *_list_ways(told), ""]
    return "\n".join(lines)


def write_searches(records: Path) -> str:
    """Return what `peftbench claims --searches` prints, with a line for each planned search that has no record."""
    names = list_study_names(find_studies(load_folders([records]), 100))
    missing = [name for one in PLANNED if (name := name_study(*one)) not in names]
    lines = "".join(f"- {name}: not run yet.\n" for name in missing)
    found = _run(claims, [str(records), "--searches", "--markdown"]) if names else ""
    return "\n".join(filter(None, [found, lines]))


def write_readme(readme: str, records: Path = RECORDS) -> str:
    """Return README.md with the tables that the records have now."""
    readme = replace_part(readme, BEGIN_SCORES, write_scores(records))
    return replace_part(readme, BEGIN_VERDICTS, write_verdicts(records))


def write_scores(records: Path) -> str:
    """Return the scores of the rows, a column for each cell, and what the marks in the table mean."""
    by = ["--rows", "budget,method,modified_representation", "--columns", "task,model,metric"]
    told = _run(results, [*find_cells(records), *ROWS, *by, "--interval", "--markdown"])
    return _rename(told)


def write_verdicts(records: Path) -> str:
    """Return the verdicts on the claims, a column for each cell."""
    told = _run(claims, [*find_cells(records), "--short", "--markdown"])
    return _rename(told)


def draw_picture(file: Path, records: Path = RECORDS) -> None:
    """Draw the scores of the rows, a panel for each cell."""
    _run(plot, [*find_cells(records), *ROWS, "--x", "percent", "--interval", "--out", str(file)])


def draw_looks(file: Path, records: Path = RECORDS) -> None:
    """Draw what the rows had on the selection split during the training, one seed of each."""
    _run(plot, [*find_cells(records), *list_first_seed(ROWS), "--curves", "--y", "selection", "--out", str(file)])


def list_first_seed(filters: list[str]) -> list[str]:
    """Return filters that join sets by `or`, with the seed of the trials in each."""
    return [word for one in filters for word in (["seed=42", one] if one == "or" else [one])] + ["seed=42"]


def find_cells(records: Path) -> list[str]:
    """Return the folders of the cells of README.md that have records."""
    folders = [records / "reproduction" / cell for cell in CELLS]
    return [str(folder) for folder in folders if any(folder.rglob("record.json"))]


def _rename(told: str) -> str:
    """Return the table that a command printed, with the cells' names, and what its marks and intervals are."""
    head, *lines = _list_table(told)
    labels = " | ".join(LABELS.get(label, label) for label in head.strip("| ").split(" | "))
    # after the runs of `peftbench results`, and below the table of `peftbench claims`
    _, *marks = next((line for line in told.splitlines() if line.startswith("score of ")), "").split("; ")
    below = _list_ways(told) or [f"{'; '.join(marks)}."]
    table = "\n".join([f"| {labels} |", *lines, "", *below, ""])
    for cell, name in CELLS.items():
        task, model = cell.split("/")
        table = re.sub(rf"{task} (with )?{model}", name, table)
    return table.replace(" bleu", " BLEU")


def _list_table(told: str) -> list[str]:
    """Return the lines of the table that a command printed in Markdown."""
    return [line for line in told.splitlines() if line.startswith("|")]


def _list_ways(told: str) -> list[str]:
    """Return the line that says what the intervals of a table of claims are."""
    return [line for line in told.splitlines() if line.startswith("Intervals: ")]


def _run(command: Callable[[list[str]], int], words: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        command(words)
    return told.getvalue()


def replace_part(text: str, begin: str, told: str) -> str:
    """Return a text with what was told between a line and the next end."""
    before, _, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"The page lacks the line {begin.strip()} or {END.strip()}")
    return f"{before}{begin}\n{told}\n{END}{after}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    README.write_text(write_readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    draw_picture(PICTURE)
    draw_looks(CURVES)
