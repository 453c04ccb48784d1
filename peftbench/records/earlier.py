"""Runs that were recorded under the first version of names, for which only the size and both ends of large files count.

Such a record is accepted as the requested run if the large files have the same paths as then and have not changed since
the recorded run began. Otherwise nobody can know, and the run is trained again. Either way the user is told, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from peftbench.config.schema import Run, list_task_files
from peftbench.config.stamps import LARGE, list_counted_files, stamp_content, stamp_ends
from peftbench.records.record import Record
from peftbench.records.saved import read_saved_config
from peftbench.utils.errors import UserError, warn
from peftbench.utils.files import expand_home

_told: set[str] = set()


def is_the_same(run: Run, record: Record, point: str) -> bool:
    """Return whether a record whose name depends only on the ends of large files is that of `run`. If so, the record
    notes it.

    Args:
        point: the `point` in the record of `run`.
    """
    if record.point == point:  # noted before
        return True
    doubt = _explain_doubt(run, record)
    if doubt is not None:
        _tell(
            f"{doubt}: runs such as {record.folder} were named when only the ends of large files counted, so that "
            "these files may have been different in the middle; the runs are trained again under new names."
        )
        return False
    paths = ", ".join(path for path in list_sources(run).values() if not _was_seen_whole(path))
    _tell(
        f"{paths} unchanged since: runs that were recorded when only the ends of large files counted are taken as the "
        "same."
    )
    if record.status == "done":
        record.point = point
        record.model.content = stamp_content(run.model.path) if run.model.path else record.model.content
        with suppress(OSError):  # read-only records are compared again next time
            record.save()
    return True


def check_backbone(run: Run, record: Record) -> None:
    """Tell the user if the record's stamp does not cover the whole backbone, which may have changed since.

    Raises UserError if `model.path` is not the backbone on which the run was trained.
    """
    path, content = run.model.path, record.model.content
    if not path or not content or content == stamp_content(path):
        return
    if content != stamp_ends(path):
        raise UserError(f"model.path={path} is not the backbone on which the run was trained.")
    if (doubt := _explain_doubt(run, record, only="model.path")) is not None:
        _tell(
            f"{doubt}: the record of {record.folder} covers only the ends of large files, so that its backbone may "
            "have been different in the middle."
        )


def list_sources(run: Run) -> dict[str, str]:
    """Return the paths whose content is part of the run, by the keys with which they were typed."""
    found = {"model.path": run.model.path} if run.model.path else {}
    if files := list_task_files(run.task):
        for split, (first, *others) in files.items():
            found |= {f"task.data_files.{split}": first}
            found |= {f"task.data_files.{split}[{index}]": file for index, file in enumerate(others, 1)}
        return found
    return found | ({"task.data_dir": run.task.data_dir} if run.task.data_dir else {})


def _explain_doubt(run: Run, record: Record, only: str | None = None) -> str | None:
    """Return why the large files of `run` may differ from those that a record's run read; None without a reason."""
    try:
        before = OmegaConf.to_object(read_saved_config(record.folder))
        assert isinstance(before, Run)
    except UserError:
        return f"{record.folder / 'config.yaml'} cannot be read"
    then, began = list_sources(before), datetime.fromisoformat(record.created).timestamp()
    for key, path in list_sources(run).items():
        if only not in (None, key) or _was_seen_whole(path):
            continue
        here = expand_home(path)
        # A relative path is the same one if the record was found below the same working directory.
        if then.get(key) != path or not (here.is_absolute() or not expand_home(run.output_dir).is_absolute()):
            return f"{key}={path} was not the path then"
        if max(_list_changes(here)) >= began:
            return f"{key}={path} has changed since"
    return None


def _was_seen_whole(path: str) -> bool:
    """Return whether the earlier name covers all of a path: it has no large files, or is the embedded backbone."""
    return stamp_content(path) == stamp_ends(path)


def _list_large_files(path: str | Path) -> Iterator[Path]:
    return (file for _, file in list_counted_files(path) if file.stat().st_size >= LARGE)


def _list_changes(path: Path) -> Iterator[float]:
    """Yield when the large files at a path, the links that lead to them and their folder were last changed.

    Replacing the folder with another one by renaming changes that folder's own time.
    """
    whole = path.absolute()
    links = [part for part in (whole, *whole.parents) if part.is_symlink()]
    for place in (*links, *_list_large_files(path), *([path] if path.is_dir() else [])):
        for found in {place.lstat(), place.stat()}:
            yield max(found.st_mtime, found.st_ctime)


def _tell(line: str) -> None:
    """Print a line once, on stderr, since stdout may be JSON."""
    if line not in _told:
        _told.add(line)
        warn(line)
