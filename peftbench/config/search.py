"""The trials of a search (`search=lr3`): which runs are compared, and which searches are refused.

The trials of a search are separate runs, one for each combination of the values, with one seed. Once they have ended,
the requested runs take the values of the trial that is best on the selection split (records/choice.py). A key of
the config distinguishes them: `search.trial=1` is the second trial. With `search.extend` there may be further values
(config/extension.py): their trials come in between, each once it is known that the one before was the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from functools import cache
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf

from peftbench.config.compose import TypedRun
from peftbench.config.extension import find_extension_fault, find_next_value
from peftbench.config.identity import IGNORED, hash_run
from peftbench.config.overrides import set_key
from peftbench.config.schema import Reported, Run, Search, Variation, get_value, index_by_key
from peftbench.config.stamps import stamp_content
from peftbench.config.studies import find_study_faults
from peftbench.config.validity import find_faults
from peftbench.utils.errors import UserError, suggest

SHARED = {"search.extend": "0", "search.report": Reported.chosen.name}  # of which all runs of a search have one value
# In addition to IGNORED: with other data or another backbone the scores of trials would not be comparable.
NOT_SEARCHED = ("task", "model", "method", "fidelity", "debug", "seed", "search")


def list_values(run: Run, search: Search) -> dict[str, list[Any]]:
    """Return the values that are tried for each key, in the order of preference that decides ties.

    A multiple has 12 significant digits. A multiple of an integer is rounded to the nearest integer, at least 1.
    """
    found = {key: _expand_variation(variation, get_value(run, key)) for key, variation in search.keys.items()}
    if search.further:
        ((key, values),) = found.items()
        values += _convert_values(search.further, get_value(run, key))
    return found


def _convert_values(values: Sequence[Any], base: Any) -> list[Any]:
    return [float(value) if isinstance(base, float) else value for value in values]


def _expand_variation(variation: Variation, base: Any) -> list[Any]:
    if variation.times is None:
        return _convert_values(variation.values or [], base)
    multiples = [base * factor for factor in variation.times]
    if isinstance(base, int):
        return list(dict.fromkeys(max(1, round(value)) for value in multiples))
    return list(dict.fromkeys(float(f"{value:.12g}") for value in multiples))


def list_settings(run: Run, search: Search) -> list[dict[str, Any]]:
    """Return the settings of each trial: every combination of the values."""
    tried = list_values(run, search)
    return [dict(zip(tried, combination, strict=True)) for combination in product(*tried.values())]


def build_trials(run: Run) -> list[Run]:
    """Return the runs that are compared before `run`."""
    assert run.search is not None
    plain = replace(run, search=None, seed=run.seed if run.search.seed is None else run.search.seed)
    found = []
    for setting in list_settings(run, run.search):
        trial = plain
        for key, value in setting.items():
            trial = _replace_at(trial, key.split("."), value)
        found.append(trial)
    return found


def extend_search(run: Run, best: int) -> Run | None:
    """Return the run with one value more to try, as `search.further`; None if there is none.

    There is none if the best value is not the outermost, if `search.extend` further ones have been tried, or if the key
    cannot have the next one, such as a probability above 1.

    Args:
        run: of a search over one key.
        best: the index of the best trial.
    """
    search = run.search
    assert search is not None
    if len(search.further) >= search.extend:
        return None
    (tried,) = list_values(run, search).values()
    value = find_next_value(tried, best)
    if value is None:
        return None
    extended = replace(run, search=replace(search, further=[*search.further, value]))
    new = set(find_faults(build_trials(extended)[-1])) - set(find_faults(build_trials(run)[best]))
    return None if new else extended


def list_further_trials(point: TypedRun) -> list[TypedRun]:
    """Return the trials of the values in `search.further`, with what is typed for them where they are trained."""
    overrides, run = point
    search = run.search
    assert search is not None
    first = len(list_settings(run, search)) - len(search.further)
    found = []
    for index in range(len(search.further)):
        known = search.further[: index + 1]  # later ones depend on what it comes to
        words = [f"search.further=[{','.join(map(repr, known))}]", f"search.trial={first + index}"]
        found.append(([*overrides, *words], replace(run, search=replace(search, further=known, trial=first + index))))
    return found


def _replace_at(node: Any, path: Sequence[str], value: Any) -> Any:
    """Return a copy of a config with another value at a path."""
    first, *rest = path
    old = node[first] if isinstance(node, dict) else getattr(node, first)
    new = _replace_at(old, rest, value) if rest else type(old)[value] if isinstance(old, Enum) else value
    return {**node, first: new} if isinstance(node, dict) else replace(node, **{first: new})


def find_search_faults(run: Run) -> list[str]:
    """Return all faults of a run's search and of its trials."""
    search = run.search
    if search is None:
        return []
    whose = f"search={search.name}"
    if search.trials is not None:
        extended = f"search.extend={search.extend} is for a search without search.trials; leave one of the two out."
        return [f"{whose}: {extended}"] if search.extend else find_study_faults(run, search)
    if not search.keys:
        return [f"{whose} has no keys; give it some, as conf/search/lr3.yaml does."]
    found = [fault for key, variation in search.keys.items() for fault in _find_key_faults(key, variation, run)]
    if found:
        return [f"{whose}: {fault}" for fault in found]
    if (fault := find_extension_fault(search, list_values(run, replace(search, further=[])))) is not None:
        return [f"{whose}: {fault}"]
    compared = build_trials(run)
    if search.trial is not None and not 0 <= search.trial < len(compared):
        return [f"search.trial={search.trial}: {whose} has the trials 0 to {len(compared) - 1}."]
    sound = set(find_faults(replace(run, search=None)))
    return list(
        dict.fromkeys(f"{whose}: {fault}" for trial in compared for fault in find_faults(trial) if fault not in sound)
    )


def _find_key_faults(key: str, variation: Variation, run: Run) -> list[str]:
    if key in IGNORED:
        return [f"{key} changes no result, so there is nothing to search over."]
    if key.split(".")[0] in NOT_SEARCHED:
        return [f"{key} cannot be searched over, because it changes what is compared; use keys of the training."]
    if run.budget is not None and not key.startswith("trainer."):
        return [f"{key} with budget={run.budget}: with a budget, only trainer.* can be searched over."]
    try:
        base = get_value(run, key)
    except KeyError as missing:
        (name,) = missing.args
        return [f"{key} is not a key of method={run.method}, whose mix has no {name}{suggest(name, run.mix)}"]
    except AttributeError:
        return [set_key(_make_config(run), key, None) or f"{key} is not a key of the config."]
    if variation.low is not None or variation.high is not None:
        return [f"{key}: a range (low, high) needs search.trials, the number of runs that are chosen from it."]
    if bool(variation.times) == bool(variation.values):
        return [f"{key} needs either times (multiples of its value) or values."]
    if variation.times and (isinstance(base, bool) or not isinstance(base, int | float)):
        return [f"{key} is not a number for method={run.method}, so it has no multiples; give it values."]
    # A number or text in the place of another needs no check.
    doubtful = [
        value for value in variation.values or [] if type(value) is not type(base) or isinstance(value, list | dict)
    ]
    cfg = _make_config(run) if doubtful else None
    return [fault for value in doubtful if cfg is not None and (fault := set_key(cfg.copy(), key, value))]


def _make_config(run: Run) -> DictConfig:
    """Return a run as a config that checks values. This takes OmegaConf 0.1 s."""
    cfg: DictConfig = OmegaConf.structured(replace(run, search=None))
    return cfg


def check_searches(points: Sequence[TypedRun]) -> None:
    """Raise UserError if a point's search is wrong, or if a grid sweeps over a key that the search chooses, or over
    one of `SHARED`: if points differ in nothing else."""
    different: dict[str, Run] = {}  # what is wrong with a search does not depend on the seed
    for _, run in points:
        if run.search is not None:
            different.setdefault(repr(replace(run, seed=0)), run)
    found = [sentence for run in different.values() for sentence in find_search_faults(run)]
    given = [index_by_key(overrides) for overrides, _ in points]
    swept: dict[tuple[str, frozenset[tuple[str, str]]], set[str | None]] = {}
    searched = [key for run in different.values() if run.search is not None for key in run.search.keys]
    for key in dict.fromkeys([*SHARED, *searched]):
        for typed in given:
            swept.setdefault((key, _drop_key(key, typed)), set()).add(typed.get(key))
    for typed, (_, run) in zip(given, points, strict=True):
        if run.search is None or run.search.trials is not None:  # a study takes a key that is typed as given
            continue
        for key, default in SHARED.items():
            if len(given_values := swept[key, _drop_key(key, typed)]) > 1:
                listed = ",".join(sorted(value or default for value in given_values))
                found.append(f"{key}={listed}: a search has one choice of its values; give one value of {key}.")
        chosen = f"is chosen by search={run.search.name}; leave one of the two out."
        for key, variation in run.search.keys.items():
            if len(swept[key, _drop_key(key, typed)]) > 1:
                found.append(f"{key} is swept and {chosen}")
            elif variation.values and key in typed:
                found.append(f"{key}={typed[key]} {chosen}")
    if found:
        raise UserError(*dict.fromkeys(found))


def _drop_key(key: str, typed: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(item for item in typed.items() if item[0] != key)


def has_open_search(run: Run) -> bool:
    """Return whether the run depends on trials that have not been compared yet."""
    return run.search is not None and run.search.trial is None


def is_unreported(run: Run) -> bool:
    """Return whether a run is a trial of which the report split is not scored: only if it is chosen, and then as a run
    of its own."""
    search = run.search
    if search is None or search.trial is None or search.report is Reported.trials:
        return False
    # The point of a study's trial with another seed is no trial.
    return search.trials is None or search.seed in (None, run.seed)


def split_trials(points: Sequence[TypedRun]) -> tuple[list[TypedRun], list[TypedRun]]:
    """Return the trials of a sweep's searches, and the sweep's own runs with the seed of the trials as `search.seed`.

    Points that differ only in their seed share their trials. These have the first point's seed unless `search.seed`
    is given.
    """
    first: dict[tuple[str, str], int] = {}
    tried: dict[tuple[tuple[str, str], int], TypedRun] = {}
    final: list[TypedRun] = []
    stamp = cache(stamp_content)
    for overrides, run in points:
        search = run.search
        if search is None or search.trial is not None:
            final.append((overrides, run))
            continue
        group = (hash_run(replace(run, seed=0), stamp), run.output_dir)  # trials are looked for beside their runs
        if search.seed is None:
            search = replace(search, seed=first.setdefault(group, run.seed))
            overrides = [*overrides, f"search.seed={search.seed}"]
        final.append((overrides, replace(run, search=search)))
        for index in range(len(list_settings(run, search))):
            trial = replace(run, search=replace(search, trial=index))
            tried.setdefault((group, index), ([*overrides, f"search.trial={index}"], trial))
    return list(tried.values()), final
