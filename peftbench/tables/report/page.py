"""The HTML file of a report: report.html with report.css, report.js and the content inserted."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

PLACE = re.compile(r"\{\{(\w+)\}\}")  # in report.html


def build_page(content: dict[str, Any]) -> str:
    """Return the page with the content of `report.content`. It loads no other resource, and no other script runs."""
    script, style, template = (_read_part(f"report.{ending}") for ending in ("js", "css", "html"))
    parts = {
        "style": style,
        "script": script,
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_hash_script(script)}'",
        "content": _dump_inert(content),
    }
    return PLACE.sub(lambda place: parts[place[1]], template)


def _read_part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash_script(script: str) -> str:
    """Return the hash by which the browser recognises the page's own script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _dump_inert(content: dict[str, Any]) -> str:
    """Return JSON that cannot end its HTML element: `<` is escaped. Raises ValueError for NaN, which is not in JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
