"""A study: a search whose runs are chosen one after another (`search.trials=N`), over groups and keys of the config.

What may be chosen is the space. A key that is typed on the command line is given, and not part of the space; so is a
bottleneck if there is a budget, from which it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from peftbench.config.axes import CHOICES
from peftbench.config.compose import TypedRun
from peftbench.config.identity import IGNORED, hash_run
from peftbench.config.overrides import get_key
from peftbench.config.schema import Run, Search, Variation, get_value, index_by_key

GROUPS = (*CHOICES, "mix", "method")
FIXED = ("task", "model", "fidelity", "debug", "seed", "search", "budget")  # with others, scores are not comparable

MOST_TRIALS = 10_000  # with more, a typing error would train for ever


@dataclass(frozen=True)
class TrialOf:
    """A trial of a study of Optuna, by which it is found again in another process."""

    storage: str  # the file
    study: str
    number: int


def is_study(run: Run) -> bool:
    """Return whether the run stands for a study."""
    return run.search is not None and run.search.trials is not None and run.search.trial is None


def group_studies(points: Iterable[TypedRun]) -> list[tuple[TypedRun, list[int]]]:
    """Return the studies of a command line, each with the seeds of its points, which differ in nothing else.

    The trials have the first point's seed, or `search.seed`.
    """
    found: dict[tuple[str, str | None], tuple[TypedRun, list[int]]] = {}
    for words, run in points:
        assert run.search is not None
        seed = run.seed if run.search.seed is None else run.search.seed
        given = [word for word in words if get_key(word) != "seed"] if seed != run.seed else list(words)
        point = ([*given, f"seed={seed}"] if seed != run.seed else given, replace(run, seed=seed))
        # The bottlenecks of two budgets may be the same for this run, and are not for others.
        found.setdefault((hash_run(replace(run, seed=0)), run.budget), (point, []))[1].append(run.seed)
    return list(found.values())


def list_space(run: Run, search: Search, typed: Iterable[str] = ()) -> dict[str, Variation]:
    """Return what is chosen for each trial of a study.

    Args:
        run: the run that the study varies.
        typed: the words of the command line.
    """
    given = index_by_key(typed)
    return {
        key: variation
        for key, variation in search.keys.items()
        if not (key in given and not variation.times) and not (run.budget and key.rpartition(".")[2] == "bottleneck")
    }


def read_chosen(run: Run, search: Search) -> dict[str, Any]:
    """Return the values that a trial has, by the keys of the space."""
    found = {}
    for key in list_space(run, search):
        try:
            value = " + ".join(run.mix) or "none" if key == "mix" else get_value(run, key)
        except (KeyError, AttributeError):  # of a modification that this trial does not have
            continue
        value = getattr(value, "name", value) if key in CHOICES else value
        found[key] = value.name if isinstance(value, Enum) else value
    return found


def find_study_faults(run: Run, search: Search) -> list[str]:
    """Return all faults of a study's space."""
    whose = f"search={search.name}"
    if search.trials is not None and search.trials < 1:
        return [f"search.trials={search.trials}: a study needs at least one trial."]
    if search.trials is not None and search.trials > MOST_TRIALS:
        return [f"search.trials={search.trials}: a study has {MOST_TRIALS:,} trials at most."]
    if search.minutes is not None and not (search.minutes > 0 and math.isfinite(search.minutes)):
        return [f"search.minutes={search.minutes:g}: give a number above 0, or null for no limit."]
    if not search.keys:
        return [f"{whose} has no keys; give it some, as conf/search/optuna.yaml does."]
    return [f"{whose}: {fault}" for key, one in search.keys.items() if (fault := _find_fault(run, key, one))]


def _find_fault(run: Run, key: str, variation: Variation) -> str | None:
    if key in IGNORED:
        return f"{key} changes no result, so there is nothing to search over."
    if key.split(".")[0] in FIXED:
        return f"{key} cannot be searched over, because it changes what is compared."
    kinds = [variation.times, variation.values, None if variation.low is None else [variation.low]]
    if sum(bool(kind) for kind in kinds) != 1:
        return f"{key} needs one of times (multiples of its value), values, or low and high."
    if key in GROUPS:
        return None if variation.values else f"{key} is a group; give it values, the names of its choices."
    try:
        base = get_value(run, key)
    except KeyError:
        base = 1  # of a modification that only some trials have
    except AttributeError:
        return f"{key} is not a key of the config."
    if variation.values:
        return None
    if base is None and variation.low is not None:  # such as the bottleneck of a method without one
        base = 1
    if isinstance(base, bool) or not isinstance(base, int | float):
        return f"{key} is not a number for method={run.method}; give it values."
    if variation.times:
        return None
    if variation.high is None or variation.low is None or variation.low >= variation.high:
        return f"{key}: low must be less than high."
    return f"{key}: with log, low must be above 0." if variation.log and variation.low <= 0 else None


def list_multiples(run: Run, key: str, times: Sequence[float]) -> list[float]:
    """Return the values that `times` stands for, with 12 significant digits."""
    return [float(f"{get_value(run, key) * factor:.12g}") for factor in times]
