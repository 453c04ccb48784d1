"""Parts of the user's own, found by their dotted names: `task.metric=mypkg.Brevity`.

A name is imported only if it was typed, written in the user's own --config-dir, or is in the config of a run that is
read, and what is imported is named on stderr first. Nothing is called before it is known to be of the kind that its
key takes. Python's own modules have no such parts, and are never imported for one.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from peftbench.utils.errors import UserError, warn

GROUPS = {"task.metric": "peftbench.metrics"}  # of entry points, by key


def is_own(name: str) -> bool:
    """Return whether a name is a dotted one, which no part of peftbench has."""
    return "." in name


def list_entry_points(key: str) -> dict[str, str]:
    """Return the short names that installed packages offer for a key, each with the dotted name behind it."""
    return {point.name: point.value.replace(":", ".") for point in entry_points(group=GROUPS[key])}


def resolve_own(key: str, name: str) -> str:
    """Return the dotted name for a short one that an installed package offers, or the name itself."""
    return name if is_own(name) else list_entry_points(key).get(name, name)


@cache
def load_class(key: str, name: str, base: type) -> Any:
    """Return the class of that dotted name, which must be derived from `base`.

    Raises:
        UserError: it cannot be imported, or is something else.
    """
    module, _, attribute = name.rpartition(".")
    typed = f"{key}={name}"
    wanted = f"a class derived from {base.__module__.partition('.')[0]}.{base.__name__}"
    if not module or module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{typed} is not {wanted}.")
    warn(f"{typed} imports {module}.")
    try:
        found = getattr(import_module(module), attribute)
    except AttributeError:
        raise UserError(f"{typed}: {module} has no {attribute}.") from None
    except Exception as error:  # of the module itself
        raise UserError(
            f"{typed} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); put the folder of "
            f"{module.partition('.')[0]} on PYTHONPATH, or next to your groups in --config-dir."
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{typed} is not {wanted}.")
    return found


def add_import_folder(folder: Path) -> None:
    """Let modules in the user's --config-dir be imported, here and in the processes that this one starts."""
    path = str(folder.resolve())
    if path not in sys.path:
        sys.path.append(path)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = path if not before else f"{before}{os.pathsep}{path}"
