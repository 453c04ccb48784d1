"""Files that are written beside their place and then renamed, so that no reader ever sees half of one; and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write to that takes the place of `path` once it is complete."""
    if path.exists() and not path.is_file():  # nothing takes the place of /dev/stdout
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        return
    # Half a surrogate pair, which UTF-8 cannot hold, becomes \udxxx: what JSON calls it too.
    with beside(path) as unfinished, unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield file


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once it is complete."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say whose
            error.filename = str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object on each line of a file."""
    with replacing(path) as file:
        file.writelines(dumped(row) + "\n" for row in rows)


def dumped(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """JSON that every program reads: with null for NaN and infinity, for which it has no numbers."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
