"""A stamp stands for all bytes, large files are read once, and small ones have the stamps that they always had."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peftbench.config import stamps
from peftbench.config.compose import compose_run
from peftbench.config.stamps import LARGE, stamp_content, stamp_ends


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PEFTBENCH_CACHE", str(folder))
    monkeypatch.setattr(stamps, "_known", {})
    return folder


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Every file has been there for long; what is returned waits until the file system's clock has ticked."""
    monkeypatch.setattr(stamps, "_FRESH", -1)
    return lambda: time.sleep(0.05)


def changed(file: Path, place: int, *, quietly: bool = False) -> None:
    """Write another byte at a place of a file; quietly, with the time of the last change put back."""
    before = file.stat()
    with file.open("r+b") as content:
        content.seek(place)
        (old,) = content.read(1)
        content.seek(place)
        content.write(bytes([old ^ 1]))
    if quietly:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def large(file: Path, size: int = 3 * LARGE) -> Path:
    file.write_bytes(bytes(size))
    return file


@pytest.mark.parametrize("size", [LARGE - 1, LARGE, LARGE + 1, stamps._PIECE, 2 * stamps._PIECE + 7])
def test_every_byte_counts(size: int, tmp_path: Path) -> None:
    """At both ends, in the middle, and at the borders of what is hashed at once."""
    file = large(tmp_path / "weights", size)
    found = {stamp_content(file)}
    places = {0, size // 2, size - 1, *(p for p in (stamps._PIECE - 1, stamps._PIECE) if p < size)}
    for place in places:
        changed(file, place)
        assert stamp_content(file) == stamp_content(tmp_path)  # the file's name is in both
        found.add(stamp_content(file))
        changed(file, place)
    assert len(found) == 1 + len(places)
    file.write_bytes(bytes(size + 1))
    assert stamp_content(file) not in found


def test_the_first_version_was_blind_to_the_middle(tmp_path: Path) -> None:
    file = large(tmp_path / "weights")
    before, whole = stamp_ends(file), stamp_content(file)
    changed(file, 3 * LARGE // 2)
    assert stamp_ends(file) == before and stamp_content(file) != whole


def test_small_files_keep_their_stamps(tmp_path: Path) -> None:
    """The digits are those of peftbench before whole files counted: runs on small files keep their names."""
    (tmp_path / "train.csv").write_text("a,b\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "test.csv").write_bytes(b"x" * (LARGE - 1))
    assert stamp_content(tmp_path) == stamp_ends(tmp_path) == "8a043d9683a4"
    assert stamp_content(tmp_path / "train.csv") == "11f32180d92c"


def test_the_embedded_backbone_keeps_its_stamp() -> None:
    """Though its weights are large: the runs on it are the ones that everybody has."""
    path = compose_run([]).model.path
    assert path is not None
    assert stamp_content(path) == stamp_ends(path) == "61d6297fc805"


@pytest.mark.usefixtures("settled")
def test_a_large_file_is_read_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this process, and by others that share the cache."""
    file = large(tmp_path / "weights")
    first = stamp_content(file)
    monkeypatch.setattr(stamps, "_hash_large", None)
    assert stamp_content(file) == first
    monkeypatch.setattr(stamps, "_known", {})
    assert stamp_content(file) == first
    assert len(list((own_cache / "stamps").iterdir())) == 1


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kept", ["", "[", '[[1, 2, 3, 4], "12"]', "{}", "null", '["a", "b"]'])
def test_a_torn_cache_is_read_over(kept: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = large(tmp_path / "weights")
    first = stamp_content(file)
    (entry,) = (own_cache / "stamps").iterdir()
    entry.write_text(kept)
    monkeypatch.setattr(stamps, "_known", {})
    assert stamp_content(file) == first
    assert len(entry.read_text()) > 64


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("no folder")
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "taken"))
    assert stamp_content(large(tmp_path / "weights")) != stamp_content(large(tmp_path / "others", 2 * LARGE))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no time that nobody can set")
def test_a_change_with_the_old_time_is_seen(tmp_path: Path, settled: Callable[[], None]) -> None:
    file = large(tmp_path / "weights")
    first = stamp_content(file)
    settled()
    changed(file, 3 * LARGE // 2, quietly=True)
    assert stamp_content(file) != first


@pytest.mark.usefixtures("settled")
def test_a_file_in_the_place_of_another_is_seen(tmp_path: Path) -> None:
    """The size and the times of the first, as `cp -p` gives them."""
    file, other = large(tmp_path / "weights"), large(tmp_path / "other")
    first = stamp_content(file)
    changed(other, 3 * LARGE // 2)
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    other.replace(file)
    assert stamp_content(file) != first


def test_what_was_just_written_is_not_kept(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another write could have the very same times: clocks tick slowly."""
    file = large(tmp_path / "weights")
    stamp_content(file)
    assert not (own_cache / "stamps").exists()
    later = time.time_ns() + 3_000_000_000
    monkeypatch.setattr(stamps.time, "time_ns", lambda: later)
    stamp_content(file)
    assert (own_cache / "stamps").exists()


def test_a_kept_hash_that_was_changed_is_not_taken(
    tmp_path: Path, own_cache: Path, settled: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would give the run another name, or that of another backbone."""
    file = large(tmp_path / "weights")
    right = stamp_content(file)
    (kept,) = (own_cache / "stamps").iterdir()
    state, digest, seal = json.loads(kept.read_text())
    for wrong in ([state, digest[::-1], seal], [[*state[:-1], 0], digest, seal], [state, digest], "[" * 10_000):
        kept.write_text(wrong if isinstance(wrong, str) else json.dumps(wrong))
        monkeypatch.setattr(stamps, "_known", {})
        assert stamp_content(file) == right
