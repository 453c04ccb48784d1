"""Check the user's own parts in the runs of a command line, before anything is loaded.

They are imported here for the first time, and torch only if there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from peftbench.config.own_parts import is_own
from peftbench.config.schema import Run, list_modifications
from peftbench.utils.errors import UserError


def check_own_parts(runs: Sequence[Run]) -> None:
    """Raise UserError, with a sentence for each fault, if a form, metric, task or callback is not what it must be."""
    _raise_faults(_find_form_faults, _find_metric_faults, _find_task_faults, _find_callback_faults, runs=runs)


def check_own_forms(runs: Sequence[Run]) -> None:
    """Raise UserError if a functional form is not what it must be."""
    _raise_faults(_find_form_faults, runs=runs)


def _raise_faults(*finders: Callable[[Sequence[Run]], Iterator[str]], runs: Sequence[Run]) -> None:
    if found := list(dict.fromkeys(fault for find in finders for fault in find(runs))):
        raise UserError(*found)


def _take_different(runs: Sequence[Run], read: Callable[[Run], object]) -> list[Run]:
    """Return the first of the runs for each value that differs: a sweep may have thousands with the same part."""
    return list({repr(read(run)): run for run in reversed(runs)}.values())


def _find_form_faults(runs: Sequence[Run]) -> Iterator[str]:
    own = [run for run in runs if any(is_own(m.functional_form.name) for m in list_modifications(run).values())]
    if not own:
        return
    from peftbench.modification.own_form import find_own_form_faults

    for run in _take_different(own, list_modifications):
        yield from find_own_form_faults(run)


def _find_metric_faults(runs: Sequence[Run]) -> Iterator[str]:
    own = [run for run in runs if is_own(run.task.metric)]
    if not own:
        return
    from peftbench.metrics.own_metric import find_own_metric_fault

    for run in _take_different(own, lambda run: run.task.metric):
        if (fault := find_own_metric_fault(run.task.metric)) is not None:
            yield fault


def _find_task_faults(runs: Sequence[Run]) -> Iterator[str]:
    own = [run for run in runs if run.task._target_ is not None]
    if not own:
        return
    from peftbench.tasks.prepare import find_own_task_faults

    for run in _take_different(own, lambda run: (run.task._target_, run.task.kind)):
        yield from find_own_task_faults(run.task)


def _find_callback_faults(runs: Sequence[Run]) -> Iterator[str]:
    own = [run for run in runs if run.callbacks]
    if not own:
        return
    from peftbench.training.callbacks import find_callback_faults

    for run in _take_different(own, lambda run: run.callbacks):
        yield from find_callback_faults(run.callbacks)
