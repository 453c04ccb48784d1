#!/usr/bin/env python
"""Brings the tables of docs/reproduction.md up to date: what `peftbench claims` prints of outputs/reference.

Searches over the axes that were planned and have no record are said not to have been run.

python scripts/claims_page.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from peftbench.cli.claims import main as claims
from peftbench.cli.searched import list_study_names, name_study
from peftbench.tables.searches import find_studies
from peftbench.tables.select import load_folders

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
RECORDS = ROOT / "outputs" / "reference"
BEGIN, END = "<!-- peftbench claims outputs/reference --markdown -->\n", "<!-- end -->\n"
BEGIN_SEARCHES = "<!-- peftbench claims outputs/reference --searches --markdown -->\n"
PLANNED = [(*cell, budget) for cell in (("sst2", "minilm-l6"), ("webnlg", "smollm2-135m")) for budget in ("0.5%", "2%")]


def write_page(page: str, records: Path = RECORDS) -> str:
    """Return the page with the tables that the records have now."""
    page = _replace_part(page, BEGIN, _run_claims(records))
    return _replace_part(page, BEGIN_SEARCHES, write_searches(records))


def write_searches(records: Path) -> str:
    """Return what `peftbench claims --searches` prints, with a line for each planned search that has no record."""
    names = list_study_names(find_studies(load_folders([records]), 100))
    missing = [name for one in PLANNED if (name := name_study(*one)) not in names]
    lines = "".join(f"- {name}: not run yet.\n" for name in missing)
    return "\n".join(filter(None, [_run_claims(records, "--searches") if names else "", lines]))


def _run_claims(records: Path, *options: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        claims([str(records), *options, "--markdown"])
    return told.getvalue()


def _replace_part(page: str, begin: str, told: str) -> str:
    before, _, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} lacks the line {begin.strip()} or {END.strip()}")
    return f"{before}{begin}\n{told}\n{END}{after}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
