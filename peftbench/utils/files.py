"""Files that are written beside their place and then renamed, so that no reader ever sees half of one."""

from __future__ import annotations

import json
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
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
