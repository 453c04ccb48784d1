#!/usr/bin/env python
"""Brings the tables of docs/reproduction.md up to date: what `peftbench claims` prints of outputs/reference.

python scripts/claims_page.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from peftbench.cli.claims import main as claims

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
BEGIN, END = "<!-- peftbench claims outputs/reference --markdown -->\n", "<!-- end -->\n"


def write_page(page: str) -> str:
    """Return the page with the tables that the records have now."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} lacks the line {BEGIN.strip()} or {END.strip()}")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        claims([str(ROOT / "outputs" / "reference"), "--markdown"])
    return f"{before}{BEGIN}\n{told.getvalue()}\n{END}{after}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
