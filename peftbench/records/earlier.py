"""Runs that were recorded under the first version of names, which saw of large files the size and both ends alone.

Such a record is taken for the run that is asked for where the large files have the paths that they had and have not
changed since it began; else nobody can know, and the run is trained anew. Either is told, once. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from peftbench.config.schema import Run, task_files
from peftbench.config.stamps import LARGE, content_stamp, counted_files, ends_stamp
from peftbench.records.record import Record
from peftbench.records.saved import saved_config
from peftbench.utils.errors import UserError

_told: set[str] = set()


def is_the_same(run: Run, record: Record, point: str) -> bool:
    """Whether a record whose name saw the ends of large files alone is that of `run`; notes in it that it is.

    Args:
        point: what the record of `run` has as `point`.
    """
    if record.point == point:  # noted before
        return True
    doubt = _doubt(run, record)
    if doubt is not None:
        _tell(
            f"{doubt}: runs such as {record.folder} were named when names saw only the ends of large files, so that "
            "theirs may have been other ones in the middle; they are trained anew under new names."
        )
        return False
    paths = ", ".join(path for path in sources(run).values() if not _was_seen_whole(path))
    _tell(
        f"{paths} unchanged since: runs that were recorded when names saw only the ends of large files are taken for "
        "the same."
    )
    if record.status == "done":
        record.point = point
        record.model.content = content_stamp(run.model.path) if run.model.path else record.model.content
        with suppress(OSError):  # records that can only be read are compared again next time
            record.save()
    return True


def check_backbone(run: Run, record: Record) -> None:
    """Tells where the record's stamp does not say all of its backbone, and it may have changed since.

    Raises UserError where `model.path` is not the backbone that the run was trained on.
    """
    path, content = run.model.path, record.model.content
    if not path or not content or content == content_stamp(path):
        return
    if content != ends_stamp(path):
        raise UserError(f"model.path={path} holds another backbone than the one that the run was trained on.")
    if (doubt := _doubt(run, record, only="model.path")) is not None:
        _tell(
            f"{doubt}: the record of {record.folder} saw only the ends of large files, so that its backbone may have "
            "been another one in the middle."
        )


def sources(run: Run) -> dict[str, str]:
    """The paths whose content is a part of the run, by what was typed for them."""
    found = {"model.path": run.model.path} if run.model.path else {}
    if files := task_files(run.task):
        return found | {f"task.data_files.{split}": file for split, file in files.items()}
    return found | ({"task.data_dir": run.task.data_dir} if run.task.data_dir else {})


def _doubt(run: Run, record: Record, only: str | None = None) -> str | None:
    """Why the large files of `run` may be others than a record's run has read; None where nothing speaks for it."""
    try:
        before = OmegaConf.to_object(saved_config(record.folder))
        assert isinstance(before, Run)
    except UserError:
        return f"{record.folder / 'config.yaml'} cannot be read"
    then, began = sources(before), datetime.fromisoformat(record.created).timestamp()
    for key, path in sources(run).items():
        if only not in (None, key) or _was_seen_whole(path):
            continue
        here = Path(path).expanduser()
        # A relative path is the same one below the working directory below which the record was found.
        if then.get(key) != path or not (here.is_absolute() or not Path(run.output_dir).expanduser().is_absolute()):
            return f"{key}={path} was not its path then"
        if max(_changed(here)) >= began:
            return f"{key}={path} has changed since"
    return None


def _was_seen_whole(path: str) -> bool:
    """Whether the name of then says all of a path: it has no large files, or is the embedded backbone."""
    return content_stamp(path) == ends_stamp(path)


def _large_files(path: str | Path) -> Iterator[Path]:
    return (file for _, file in counted_files(path) if file.stat().st_size >= LARGE)


def _changed(path: Path) -> Iterator[float]:
    """When the large files at a path, the links that lead to them and the folder that they are in were last changed.

    Who puts another folder in the place of one by renaming it changes that folder's own time.
    """
    whole = path.absolute()
    links = [part for part in (whole, *whole.parents) if part.is_symlink()]
    for place in (*links, *_large_files(path), *([path] if path.is_dir() else [])):
        for found in {place.lstat(), place.stat()}:
            yield max(found.st_mtime, found.st_ctime)


def _tell(line: str) -> None:
    """On stderr, once: what is asked for may be JSON."""
    if line not in _told:
        _told.add(line)
        print(line, file=sys.stderr, flush=True)
