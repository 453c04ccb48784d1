"""Hashes of the content of files and folders, twelve hexadecimal digits each.

All bytes count. A large file is read once: its hash is kept in memory and on disk for as long as the file's inode,
size and times are unchanged, so that the workers of a sweep do not read gigabytes of weights again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from peftbench.utils.cache_dir import find_cache_dir
from peftbench.utils.errors import UserError
from peftbench.utils.files import expand_home, read_json, replace_file

LARGE = 1 << 20  # bytes; the first version of the stamp read the whole of smaller files, and of files from this size
_END = 1 << 16  # only the size and this many bytes at each end
_PIECE = 1 << 22  # bytes of a large file that a thread hashes at a time
_FRESH = 2_000_000_000  # nanoseconds within which two changes of a file may have the same time
# The embedded backbone keeps its name from the first version of the stamp, so that its runs are still found.
_NAMED_BEFORE = {"3474f3c7b65b": "61d6297fc805"}

_State = list[int]
_known: dict[Path, tuple[_State, str]] = {}  # of large files, as hashed by this process or found on disk


def stamp_content(path: str | Path, apart: str | Path | None = None) -> str:
    """Return twelve hexadecimal digits for a file, or for a folder with all files in it except hidden ones.

    Files in the folder `apart` do not count. Raises UserError if there is no such path.
    """
    stamp = _stamp(path, _whole, apart)
    return _NAMED_BEFORE.get(stamp, stamp)


def stamp_ends(path: str | Path, apart: str | Path | None = None) -> str:
    """Return the first version of `stamp_content`, which named earlier runs and ignores the middle of `LARGE` files.

    Without such files the two are equal. Raises UserError if there is no such path.
    """
    return _stamp(path, _read_ends, apart)


def list_counted_files(path: str | Path, apart: str | Path | None = None) -> list[tuple[str, Path]]:
    """Return the files that a stamp includes, sorted, with their names in the folder: none of the folder `apart`.

    Raises UserError if there is no such path.
    """
    root = expand_home(path)
    if not root.exists():
        raise UserError(f"{path} does not exist; give the path of an existing file or folder.")
    found = [(file.relative_to(root).as_posix(), file) for file in root.rglob("*")] if root.is_dir() else []
    left_out = None if apart is None else expand_home(apart).resolve()
    if left_out is not None and root.resolve() not in left_out.parents:  # the folder itself is not left out of it
        left_out = None
    return [
        (name, file)
        for name, file in sorted(found) or [(root.name, root)]
        if file.is_file()
        and not any(part.startswith(".") for part in name.split("/"))
        and not (left_out is not None and file.resolve().is_relative_to(left_out))
    ]


def _stamp(path: str | Path, of_large: Callable[[Path], bytes], apart: str | Path | None) -> str:
    digest = hashlib.sha256()
    for name, file in list_counted_files(path, apart):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        digest.update(file.read_bytes() if size < LARGE else of_large(file))
    return digest.hexdigest()[:12]


def _read_ends(file: Path) -> bytes:
    with file.open("rb") as content:
        start = content.read(_END)
        content.seek(-_END, os.SEEK_END)
        return start + content.read(_END)


def _whole(file: Path) -> bytes:
    """Return the hash of a large file, from an earlier reading if the file has not changed since."""
    place, state = file.resolve(), _read_state(file)
    kept = find_cache_dir() / "stamps" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"
    found = _known.get(place) or _read(kept, place)
    if found is None or found[0] != state:
        found = (state, _hash_large(file, state[1]))
        # A file that changes while it is read, or just after, could be mistaken for its earlier content.
        if _read_state(file) != state or time.time_ns() - max(state[2:]) < _FRESH:
            return bytes.fromhex(found[1])
        with suppress(OSError):  # a cache that cannot be written costs seconds, not the run
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(kept) as writing:
                json.dump([*found, _seal(place, found)], writing)
    _known[place] = found
    return bytes.fromhex(found[1])


def _read_state(file: Path) -> _State:
    """Return what a change of a file changes: inode, size, and the times of the last change of its content and of its
    inode; nobody can set the last one."""
    found = file.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read(kept: Path, place: Path) -> tuple[_State, str] | None:
    """Return what `_whole` has kept of a file, or None if that is missing or not as it was written.

    A wrong hash of a backbone would be another name of the run.
    """
    try:
        state, digest, seal = read_json(kept)
        found = list(map(int, state)), str(digest)
        return found if seal == _seal(place, found) else None
    except (OSError, ValueError, TypeError):
        return None


def _seal(place: Path, found: tuple[_State, str]) -> str:
    """Return a hash of what is kept of the file at `place`."""
    return hashlib.sha256(os.fsencode(place) + repr(found).encode()).hexdigest()


def _hash_large(file: Path, size: int) -> str:
    """Return the SHA-256 over the SHA-256 hashes of a file's pieces, in threads: hashlib releases the GIL.

    The hash is cryptographic because nothing compares the content again: two files with the same hash would be the
    same run. Processors have instructions for SHA-256, which hash 1.6 GB per second on a core.
    """

    def of_piece(start: int) -> bytes:
        with file.open("rb", buffering=0) as content:
            content.seek(start)
            left, digest = _PIECE, hashlib.sha256()
            while left and (read := content.read(left)):
                digest.update(read)
                left -= len(read)
            return digest.digest()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        pieces = threads.map(of_piece, range(0, size, _PIECE))
        return hashlib.sha256(b"".join(pieces)).hexdigest()
