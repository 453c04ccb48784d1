"""Keep the record of a run correct from the start of the run to its end."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import peftbench
from peftbench.config.axes import read_axes
from peftbench.config.identity import drop_later_defaults, hash_run, to_plain
from peftbench.config.own_parts import METRIC, OwnPart, find_code, is_own, list_own_code
from peftbench.config.peft_methods import read_point
from peftbench.config.schema import Modification, Run, Task, list_modifications, list_task_files
from peftbench.config.stamps import stamp_content
from peftbench.config.yaml_files import format_config
from peftbench.records.record import FILE, Attempt, Axes, Record, RecordedBackbone, Status, find_record, get_time
from peftbench.records.run_files import CHECKPOINTS, METRICS_FILE, clear_half_files
from peftbench.utils.differences import flatten
from peftbench.utils.errors import LostProcess, describe_os_error
from peftbench.utils.files import replace_file


@contextmanager
def record_run(run: Run, folder: Path, overrides: Sequence[str], reporting: bool = True) -> Iterator[Record]:
    """Record what happens inside the block: done at its end, interrupted by Ctrl-C, a full disk or the end of another
    process of the run, failed by any other exception.

    Args:
        reporting: the report split is scored in the block; if not, the run is a trial and is trained at its end.
    """
    record = _take_up(run, folder, overrides)
    try:  # so that no unfinished run is ever recorded as done, and none as running that has ended
        _write_start(record, run)
        yield record
        record.finish(reporting)
    except BaseException as error:
        if not is_interruption(error):
            record.fail(error)
            raise
        with suppress(OSError) if isinstance(error, OSError) else nullcontext():  # the disk may be full
            record.interrupt()
        raise  # the first error, which names the file


def is_interruption(error: BaseException) -> bool:
    """Return whether an error that ends a run leaves it interrupted, and not failed: the same line goes on with it."""
    if isinstance(error, OSError):
        return describe_os_error(error) is not None
    return isinstance(error, KeyboardInterrupt | LostProcess)


def forget_refused(folder: Path) -> None:
    """Delete the record of a run that was refused before it trained: a mistyped path should not appear in tables."""
    record = find_record(folder)
    if record is not None and record.status == "failed" and "prepare_s" not in record.timings:
        for name in (FILE, "config.yaml", "error.txt"):
            (folder / name).unlink(missing_ok=True)


def start_record(run: Run, folder: Path, overrides: Sequence[str]) -> Record:
    """Write a record of status running, and the resolved `config.yaml` next to it.

    Files of an earlier attempt are deleted, except its checkpoints and the metrics up to them.
    """
    record = _take_up(run, folder, overrides)
    _write_start(record, run)
    return record


def _take_up(run: Run, folder: Path, overrides: Sequence[str]) -> Record:
    """Return the record of a new attempt at a run, with the attempts before it. Nothing is written but its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    before = find_record(folder)
    record = describe_run(run, folder, overrides)
    record.clock = time.monotonic()
    earlier = before.attempts if before is not None and not before.has_ended else []
    record.attempts = [*earlier, Attempt(record.created, socket.gethostname())]
    if before is not None:  # a trial that a study gave up may be trained to its end by another one
        known = (*before.studies, before.study)
        record.studies = list(dict.fromkeys(study for study in known if study is not None))
    # With other code of its own metric the selection split is scored again.
    if before is not None and before.unreported and not run.rerun and before.own_code == record.own_code:
        record.take_up(before)
    return record


def _write_start(record: Record, run: Run) -> None:
    folder = record.folder
    record.save()  # before all else: an earlier run in this folder is no longer done
    clear_half_files(folder)
    for stale in (folder / "error.txt", folder / "predictions.jsonl"):
        stale.unlink(missing_ok=True)
    if not (folder / CHECKPOINTS).is_dir():
        (folder / METRICS_FILE).unlink(missing_ok=True)
    with replace_file(folder / "config.yaml") as file:
        file.write(format_config(to_plain(replace(run, sizes=None, size=None))))


def describe_run(run: Run, folder: Path, overrides: Sequence[str], status: Status = "running") -> Record:
    """Return the record of a run that has no results yet."""
    content = stamp_content(run.model.path) if run.model.path else None
    return Record(
        run=hash_run(run),
        point=hash_run(replace(run, seed=0)),
        status=status,
        created=get_time(),
        method=run.method,
        task=run.task.name,
        model=RecordedBackbone(
            run.model.name,
            hub_id=None if content else run.model.hub_id,
            revision=None if content else run.model.revision,
            content=content,
        ),
        axes=record_axes(run),
        unfreeze=run.unfreeze.name,
        metric=run.task.metric,
        seed=run.seed,
        folder=folder,
        overrides=list(overrides),
        budget=run.budget,
        debug=run.debug,
        test_file=_name_test_files(run.task),
        fidelity=run.fidelity.name,
        trainer=drop_later_defaults("trainer", to_plain(run.trainer)),
        versions=_read_versions(*(["peft"] if run.peft else [])),
        git=read_git(),
        own_code={part.name: stamp_content(find_code(part)) for part in _list_own_parts(run)},
    )


def _list_own_parts(run: Run) -> list[OwnPart]:
    """Return the own parts of a run, its metric too."""
    return [*list_own_code(run), *([OwnPart(METRIC, run.task.metric)] if is_own(run.task.metric) else [])]


def describe_changed_code(run: Run, record: Record, key: str) -> list[str]:
    """Return a sentence for each own part of a key whose file is another one than when the run was recorded."""
    return [
        f"The code of {part.name} has changed since this run was recorded."
        for part in _list_own_parts(run)
        if part.key == key
        and part.name in record.own_code
        and record.own_code[part.name] != stamp_content(find_code(part))
    ]


def _name_test_files(task: Task) -> str | None:
    """Return the user's files from which the scored rows come, or the folder; None if they come from elsewhere."""
    files = list_task_files(task)
    found = files.get(task.report_split) or (None if task.data_dir else files.get(task.train_split))
    return ", ".join(found) if found else task.data_dir


def record_axes(run: Run) -> list[Axes]:
    """Return the modifications of a run, each with the options in which it differs from the defaults."""
    if run.peft:
        of_peft = {f"peft.{key}": value for key, value in flatten(to_plain(run)["peft"])}
        return [Axes(prefix="", **read_point(run)._asdict(), options={**_list_options_of(run), **of_peft})]
    return [
        Axes(
            prefix=prefix,
            **read_axes(modification)._asdict(),
            scale=modification.composition_function.scale,
            bottleneck=modification.bottleneck,
            options=_list_options_of(modification),
        )
        for prefix, modification in list_modifications(run).items()
    ]


def _list_options_of(m: Modification) -> dict[str, Any]:
    """Return the options of a modification that differ from their defaults, by their dotted keys."""
    bare = dict(flatten(to_plain(Modification())))
    shown = {"bottleneck", "composition_function.scale"} | {key for key in bare if key.endswith(".name")}
    own = {f"functional_form.settings.{key}": value for key, value in flatten(m.functional_form.settings)}
    return own | {
        key: value for key, value in flatten(to_plain(m)) if key in bare and key not in shown and value != bare[key]
    }


def _read_versions(*more: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "peftbench": peftbench.__version__}
    for package in ("torch", "transformers", "datasets", *more):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@cache
def read_git() -> dict[str, Any] | None:
    """Return commit and state of the checkout from which peftbench runs; None if it is installed, or git is not."""
    checkout = Path(peftbench.__file__).resolve().parent.parent

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command],
            cwd=checkout,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # a status would write the index, which others may hold
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top) != checkout:  # installed in an environment inside another project's checkout
            return None
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
