"""Parts of the user's own, found by their dotted names: `task.metric=mypkg.Brevity`.

A name is imported only if it was typed, written in the user's own --config-dir, or is in the config of a run that is
read, and what is imported is named on stderr first. Nothing is called before it is known to be of the kind that its
key takes. Python's own modules have no such parts, and are never imported for one.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from peftbench.config.schema import FUNCTIONAL_FORMS, Run, list_modifications
from peftbench.utils.errors import UserError, warn

TARGET = "_target_"  # the key for a class, as Hydra has it
METRIC, FORM, TASK, CALLBACKS = "task.metric", f"functional_form.{TARGET}", f"task.{TARGET}", "callbacks"
GROUPS = {  # of entry points, by key
    METRIC: "peftbench.metrics",
    FORM: "peftbench.functional_forms",
    TASK: "peftbench.tasks",
    CALLBACKS: "peftbench.callbacks",
}


class OwnPart(NamedTuple):
    """A part of the user's own in a run: its key, without the prefix of a modification, and its dotted name."""

    key: str
    name: str


def is_own(name: str) -> bool:
    """Return whether a name is a dotted one, which no part of peftbench has."""
    return "." in name


def list_entry_points(key: str) -> dict[str, str]:
    """Return the short names that installed packages offer for a key, each with the dotted name behind it."""
    return {point.name: point.value.replace(":", ".") for point in entry_points(group=GROUPS[key])}


def resolve_own(key: str, name: str) -> str:
    """Return the dotted name for a short one that an installed package offers, or the name itself."""
    return name if is_own(name) else list_entry_points(key).get(name, name)


def name_own_parts(run: Run) -> None:
    """Put the dotted names of a run's own forms, task and callbacks in the place of what was typed for them."""
    for form in (run.functional_form, *(m.functional_form for m in run.mix.values())):
        typed = form._target_ or form.name
        if typed not in FUNCTIONAL_FORMS:
            form.name = resolve_own(FORM, typed)
        elif form._target_:
            form.name = typed
        form._target_ = None
    if run.task._target_ is not None:
        run.task._target_ = resolve_own(TASK, run.task._target_)
    run.callbacks = [
        {**one, TARGET: resolve_own(CALLBACKS, str(one[TARGET]))}
        if isinstance(one, dict) and TARGET in one
        else resolve_own(CALLBACKS, one)
        if isinstance(one, str)
        else one
        for one in run.callbacks
    ]


def split_callback(callback: Any) -> tuple[str, dict[str, Any]]:
    """Return the dotted name and the settings of an entry of `callbacks`; "" for one without a name."""
    if isinstance(callback, dict):
        settings = {str(key): value for key, value in callback.items() if key != TARGET}
        return str(callback.get(TARGET, "")), settings
    return (callback, {}) if isinstance(callback, str) else ("", {})


def list_own_code(run: Run) -> list[OwnPart]:
    """Return the parts of a run whose code can change its training, each once: its forms, its task, its callbacks."""
    forms = [m.functional_form.name for m in list_modifications(run).values()]
    found = [OwnPart(FORM, name) for name in forms if is_own(name)]
    if run.task._target_ is not None:
        found.append(OwnPart(TASK, run.task._target_))
    found += [OwnPart(CALLBACKS, name) for name, _ in map(split_callback, run.callbacks)]
    return list(dict.fromkeys(found))


def find_own_faults(run: Run) -> Iterator[str]:
    """Yield faults of the keys for own parts that can be seen without an import."""
    for prefix, form in {
        "": run.functional_form,
        **{f"mix.{n}.": m.functional_form for n, m in run.mix.items()},
    }.items():
        if form.settings and not is_own(form.name):
            yield (
                f"{prefix}functional_form.settings={form.settings}: functional_form={form.name} takes none; they are "
                f"for a form of your own, {prefix}{FORM}=mypkg.Form."
            )
    if run.task._target_ is None:
        if run.task.settings:
            yield f"task.settings={run.task.settings} are for a task of your own, {TASK}=mypkg.Task; leave them out."
    elif not is_own(run.task._target_):
        yield _describe_no_name(TASK, run.task._target_)
    for one in run.callbacks:
        name, _ = split_callback(one)
        if not is_own(name):
            yield _describe_no_name(CALLBACKS, name or one)


def _describe_no_name(key: str, name: object) -> str:
    offered = ", ".join(list_entry_points(key))
    also = f", or one that an installed package offers: {offered}" if offered else ""
    return f"{key}={name} is not the dotted name of a class, such as mypkg.Part{also}."


@cache
def load_class(key: str, name: str, base: type) -> Any:
    """Return the class of that dotted name, which must be derived from `base`.

    Raises:
        UserError: it cannot be imported, or is something else.
    """
    wanted = f"a class derived from {base.__module__.partition('.')[0]}.{base.__name__}"
    found = _import_part(key, name, wanted)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{key}={name} is not {wanted}.")
    return found


def find_code(part: OwnPart) -> Path:
    """Return the file in which a part is written. Raises UserError if it cannot be imported."""
    found = _import_part(part.key, part.name, "a class of yours")
    try:
        return Path(inspect.getfile(found))
    except TypeError as error:
        raise UserError(f"{part.key}={part.name} is not a class of yours.") from error


@cache
def _import_part(key: str, name: str, wanted: str) -> Any:
    """Return what has that dotted name, which should be what `wanted` says."""
    module, _, attribute = name.rpartition(".")
    typed = f"{key}={name}"
    if not module or module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{typed} is not {wanted}.")
    if module not in sys.modules:
        warn(f"{typed} imports {module}.")
    try:
        imported = import_module(module)
    except Exception as error:  # of the module itself
        raise UserError(
            f"{typed} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); put the folder of "
            f"{module.partition('.')[0]} on PYTHONPATH, or next to your groups in --config-dir."
        ) from error
    if not hasattr(imported, attribute):
        raise UserError(f"{typed}: {module} has no {attribute}.")
    return getattr(imported, attribute)


def add_import_folder(folder: Path) -> None:
    """Let modules in the user's --config-dir be imported, here and in the processes that this one starts."""
    path = str(folder.resolve())
    if path not in sys.path:
        sys.path.append(path)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = path if not before else f"{before}{os.pathsep}{path}"
