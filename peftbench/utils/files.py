"""JSON, and files that are written next to their destination and then renamed, so that no reader sees half a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replace_file(path: Path) -> Iterator[TextIO]:
    """Yield a text file to write to; it replaces `path` once it is complete."""
    if path.exists() and not path.is_file():  # /dev/stdout cannot be replaced
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        return
    # A lone surrogate, which UTF-8 cannot encode, becomes \udxxx, as JSON writes it.
    with write_beside(path) as unfinished, unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield file


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield the path at which to write a file that replaces `path` once it is complete."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # the error of a full disk names no file
            error.filename = str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object on each line of a file."""
    with replace_file(path) as file:
        file.writelines(dump_json(row) + "\n" for row in rows)


def dump_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """JSON that every program reads: with null for NaN and infinity, for which it has no numbers."""
    return json.dumps(_replace_nonfinite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_nonfinite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
