"""JSON, and files that are written next to their destination and then renamed, so that no reader sees half a file.

No file is written through a symbolic link, which somebody else may have put in its place.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, TextIO, cast

from peftbench.utils.errors import UserError

UNFINISHED = ".tmp"  # the end of the name of a file that is being written
MOST_DIGITS = 300  # of a whole number: math and torch make a float of it


@contextmanager
def replace_file(path: Path) -> Iterator[TextIO]:
    """Yield a text file to write to; it replaces `path` once it is complete."""
    if path.exists() and not path.is_file():  # /dev/stdout cannot be replaced
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        return
    with write_beside(path) as unfinished, open_unlinked(unfinished, "w") as file:
        yield file


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield the path at which to write a file that replaces `path` once it is complete: an empty file of our own, whose
    name nobody can know beforehand."""
    unfinished = path.with_name(f"{path.name}.{token_hex(4)}{UNFINISHED}")
    try:
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(unfinished)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # of a path that cannot exist
            unfinished.unlink()


def clear_unfinished(folder: Path, start: str = "") -> None:
    """Delete what killed processes have left in a folder of the files that they were writing, by the start of the name.

    Only for who holds a lock: nobody else may be writing them.
    """
    for stale in folder.glob(f"{start}*{UNFINISHED}"):
        stale.unlink(missing_ok=True)


def open_unlinked(path: Path, mode: str) -> TextIO:
    """Open a text file to write ("w") or to append ("a"). Raises OSError if `path` is a symbolic link."""
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none

    def open_file(name: str, flags: int) -> int:
        return os.open(name, flags | no_link, 0o666)

    # A lone surrogate, which UTF-8 cannot encode, becomes \\udxxx, as JSON writes it.
    return cast(TextIO, open(path, mode, encoding="utf-8", errors="backslashreplace", opener=open_file))


def require_empty(out: Path) -> None:
    """Raise UserError if the folder of --out exists, unless it is empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already; give a folder that is new or empty.")


def expand_home(path: str | Path) -> Path:
    """Return a path with the home folder for its ~ or ~USER. If there is no such user, ~ is a letter as any other."""
    return Path(os.path.expanduser(path))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file. Raises OSError if the disk is full; then the file that was there before is still there."""
    with write_beside(path) as unfinished:
        unfinished.write_bytes(content)


def refuse_links(folder: Path) -> None:
    """Raise UserError if a symbolic link is in a folder or below it, through which we would write elsewhere.

    The folder itself may be one: it is where the user wants it.
    """
    below = [folder]
    while below:
        # A listing says what each entry is; to ask for each one is slow on a shared file system.
        with suppress(OSError), os.scandir(below.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise UserError(
                        f"{entry.path} is a link, and a run writes and deletes in its own folder only; remove the "
                        "link, or put in its place what it leads to."
                    )
                if entry.is_dir(follow_symlinks=False):
                    below.append(Path(entry.path))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError or ValueError if it cannot be read, whatever bytes it has."""
    return parse_json(path.read_text(encoding="utf-8"))


def resolve_folder(folder: str | Path, resolved: dict[str, str]) -> str:
    """Return what os.path.realpath returns of a folder, with one look at the disk instead of one at each folder above.

    Args:
        resolved: the folders above that are known, to which this adds. Thousands of runs lie in a few.
    """
    above, name = os.path.split(folder)
    if name in ("", os.curdir, os.pardir) or os.path.islink(folder):
        return os.path.realpath(folder)
    if above not in resolved:
        resolved[above] = os.path.realpath(above)
    return os.path.join(resolved[above], name)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError also if it is nested too deep for Python, and for a whole
    number that is too large for a float."""
    try:
        return json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _parse_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError("a number in it is too large")
    return int(digits)


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
