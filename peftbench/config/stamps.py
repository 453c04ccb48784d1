"""What a file or folder holds, in twelve hexadecimal digits. Imports no torch.

All bytes count. Those of a large file are read once: their hash is kept in memory and on disk, for as long as the
file's inode, size and times stay what they were, so that the workers of a sweep do not read gigabytes of weights again.
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

from peftbench.utils.cache_dir import cache_dir
from peftbench.utils.errors import UserError
from peftbench.utils.files import replacing

LARGE = 1 << 20  # bytes; the first version of the stamp saw files smaller than this whole, of larger ones
_END = 1 << 16  # only so many bytes at either end, beside the size
_PIECE = 1 << 22  # bytes of a large file that a thread hashes at once
_FRESH = 2_000_000_000  # nanoseconds within which two changes of a file may have the same time
# The embedded backbone has had its name from the first version of the stamp: its runs are to be found under it.
_NAMED_BEFORE = {"3474f3c7b65b": "61d6297fc805"}

_State = list[int]
_known: dict[Path, tuple[_State, str]] = {}  # of large files, what this process has hashed or found on disk


def content_stamp(path: str | Path) -> str:
    """Twelve hexadecimal digits that stand for a file, or for a folder with all files in it but hidden ones.

    Raises UserError where there is no such path.
    """
    stamp = _stamp(path, _whole)
    return _NAMED_BEFORE.get(stamp, stamp)


def ends_stamp(path: str | Path) -> str:
    """The first version of `content_stamp`, by which runs were named once: blind to the middle of `LARGE` files.

    Without such files the two are equal. Raises UserError where there is no such path.
    """
    return _stamp(path, _ends)


def counted_files(path: str | Path) -> list[tuple[str, Path]]:
    """The files that a stamp is made of, sorted, with their names in the folder.

    Raises UserError where there is no such path.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{path} does not exist; give the path of an existing file or folder.")
    found = [(file.relative_to(root).as_posix(), file) for file in root.rglob("*")] if root.is_dir() else []
    return [
        (name, file)
        for name, file in sorted(found) or [(root.name, root)]
        if file.is_file() and not any(part.startswith(".") for part in name.split("/"))
    ]


def _stamp(path: str | Path, of_large: Callable[[Path], bytes]) -> str:
    digest = hashlib.sha256()
    for name, file in counted_files(path):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        digest.update(file.read_bytes() if size < LARGE else of_large(file))
    return digest.hexdigest()[:12]


def _ends(file: Path) -> bytes:
    with file.open("rb") as content:
        start = content.read(_END)
        content.seek(-_END, os.SEEK_END)
        return start + content.read(_END)


def _whole(file: Path) -> bytes:
    """The hash of a large file, from an earlier reading where the file is still what it was."""
    place, state = file.resolve(), _state(file)
    kept = cache_dir() / "stamps" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"
    found = _known.get(place) or _read(kept)
    if found is None or found[0] != state:
        found = (state, _hashed(file, state[1]))
        # A file that changes while it is read, or just after, might be taken for what it was.
        if _state(file) != state or time.time_ns() - max(state[2:]) < _FRESH:
            return bytes.fromhex(found[1])
        with suppress(OSError):  # a cache that cannot be written costs seconds, not the run
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as writing:
                json.dump(found, writing)
    _known[place] = found
    return bytes.fromhex(found[1])


def _state(file: Path) -> _State:
    """What a change of a file changes: inode, size, the times of the last change of its content and of its inode, the
    last of which nobody can set."""
    found = file.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read(kept: Path) -> tuple[_State, str] | None:
    """What `_whole` has kept, or None where that is missing or torn."""
    try:
        state, digest = json.loads(kept.read_text(encoding="utf-8"))
        return (list(map(int, state)), digest) if len(bytes.fromhex(digest)) == 32 else None
    except (OSError, ValueError, TypeError):
        return None


def _hashed(file: Path, size: int) -> str:
    """SHA-256 over the SHA-256 hashes of the pieces of a file, in threads: hashlib lets others run while it hashes.

    A cryptographic hash, since nothing looks at the content again: two files with one hash would be one run. Processors
    have instructions for this one, which do 1.6 GB a second on a core.
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
