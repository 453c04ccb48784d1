"""Turn a command line into validated configs: Hydra composes, and every fault is found before anything is loaded.

Hydra stops at the first fault and reports it in its own terms. Here each override is tried by itself, so that one
message has all faults, as sentences, with the keys as they were typed. All runs of a sweep are composed and checked
before the first of them starts.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from peftbench.config.conf_sources import CONFIG_NAME, compose_alone, open_hydra
from peftbench.config.idle import CHANGES_NOTHING, IN_A_SWEEP, find_idle_keys
from peftbench.config.overrides import (
    apply_override,
    describe_error,
    explain_hydra,
    get_key,
    list_hydra_words,
    parse_overrides,
    quote_path,
)
from peftbench.config.own_parts import FORM, METRIC, add_import_folder, is_own, name_own_parts, resolve_own
from peftbench.config.rows import GROUP, read_rows
from peftbench.config.schema import Run, find_conf_dir, resolve_config
from peftbench.config.sizes import merge_columns
from peftbench.config.task_validity import METRIC_NAMES
from peftbench.config.validity import find_faults
from peftbench.config.variants import Pattern, can_vary, is_free, vary
from peftbench.config.yaml_files import find_hydra_faults
from peftbench.utils.errors import UserError, describe_unknown

MOST_RUNS = 10_000  # of one grid
AND = "and"  # between the grids of one sweep
OF_SWEEP = ("jobs", "mps")  # keys that a sweep has once, whichever grid they are typed in

PLUGINS = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=rq": "hydra-rq-launcher",
    **dict.fromkeys(("hydra/launcher=submitit_local", "hydra/launcher=submitit_slurm"), "hydra-submitit-launcher"),
    **{f"hydra/sweeper={name}": f"hydra-{name}-sweeper" for name in ("optuna", "ax", "nevergrad")},
}

TypedRun = tuple[list[str], Run]  # the overrides that make a run, and the run


def compose_run(overrides: Sequence[str], *, config_dir: str | None = None, reads_data: bool = True) -> Run:
    """Return the validated run of a command line. Arguments and errors are those of `compose_points`."""
    ((_, run),) = compose_points(overrides, config_dir=config_dir, reads_data=reads_data)
    return run


def compose_points(
    overrides: Sequence[str], *, multirun: bool = False, config_dir: str | None = None, reads_data: bool = True
) -> list[TypedRun]:
    """Return the validated run, or with `multirun` all runs of a sweep, each with its overrides.

    Args:
        config_dir: a folder with the user's own groups.
        reads_data: see `validity.find_faults`.

    Raises:
        UserError: with a sentence for every fault.
    """
    if config_dir is not None:
        check_config_dir(Path(config_dir))
        add_import_folder(Path(config_dir))
    refuse_searchpath(overrides)
    overrides = [quote_path(word) for word in overrides]
    grids = _split_grids(overrides)
    if len(grids) > 1 and not multirun:
        raise UserError(f"{AND} joins grids into a sweep; add -m to run it.")
    with open_hydra(config_dir):
        composer = _Composer(config_dir, reads_data, multirun)
        found: list[str] = []
        runs: list[TypedRun] = []
        idle = 0  # points with a key that changes nothing there
        points = [point for grid in grids for point in _expand_grid(grid, multirun, composer)]
        for point in points:
            try:
                runs.append((point, composer.compose(point)))
            except UserError as error:
                found.extend(sentence for sentence in error.faults if sentence not in found)
                idle += any(CHANGES_NOTHING in sentence for sentence in error.faults)
        if found:
            raise UserError(*found, *([IN_A_SWEEP] if 0 < idle < len(points) else []))
        return runs


def refuse_searchpath(overrides: Sequence[str]) -> None:
    """Raise UserError if a command line names a folder of configs that `check_config_dir` does not see."""
    if unchecked := [word for word in overrides if get_key(word) == "hydra.searchpath"]:
        raise UserError(f"{unchecked[0]}: give a folder of your own groups as --config-dir FOLDER.")


def check_config_dir(folder: Path) -> None:
    """Check that `folder` is a folder without files that Hydra would ignore because peftbench has the same name.

    Raises:
        UserError: with a sentence for each such file, and for each that would configure Hydra itself. An exact copy of
            peftbench's file is allowed.
    """
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder} is not a folder; give one with method/, task/ ... below it.")
    ours = {file.relative_to(find_conf_dir()): file for file in find_conf_dir().rglob("*.yaml")}
    theirs = [name for name, file in ours.items() if (folder / name).is_file() and not _is_same(folder / name, file)]
    theirs += [name for name in (Path(GROUP, f"{row}.yaml") for row in read_rows()) if (folder / name).is_file()]
    if faults := list(find_hydra_faults(folder)):
        raise UserError(*faults)
    if theirs:
        own = "would not be read, because peftbench has a file with this name; give it another name."
        raise UserError(*(f"--config-dir {folder}: {name.as_posix()} {own}" for name in sorted(theirs)))


def _is_same(file: Path, other: Path) -> bool:
    return file.read_bytes() == other.read_bytes()


def _split_grids(words: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each grid of a sweep. A grid after an `and` has the first grid's overrides and its own,
    which replace those with the same key. `OF_SWEEP` belong to all grids."""
    grids: list[list[str]] = [[]]
    shared = list(dict.fromkeys(word for word in words if get_key(word) in OF_SWEEP))
    for word in words:
        if word == AND:
            grids.append([])
        elif word not in shared:
            grids[-1].append(word)
    if len(grids) == 1:
        return [list(words)]
    if not all(grids):
        raise UserError(f"{AND} must be between two grids, as in -m method=full {AND} method=lora,mam budget=1%.")
    if len(set(map(get_key, shared))) < len(shared):
        raise UserError(f"{', '.join(shared)}: a sweep has one value of {' and of '.join(OF_SWEEP)}, not several.")
    first, *others = grids
    grids = [
        first,
        *([*(word for word in first if get_key(word) not in set(map(get_key, own))), *own] for own in others),
    ]
    return [[*grid, *shared] for grid in grids]


def _expand_grid(grid: list[str], multirun: bool, composer: _Composer) -> list[list[str]]:
    """Return the override lists of a grid's runs."""
    parsed = composer.parse(grid)
    params = _read_experiment_sweep(parsed)
    if params and not multirun:
        raise UserError(f"An experiment that sweeps over {' and '.join(params)} is a sweep; add -m to run it.")
    if params:
        parsed = [*composer.parse(list(params.values())), *parsed]
    return _expand_overrides(parsed) if multirun else [grid]


def _check_sweeps(parsed: list[Override]) -> None:
    """Raise UserError with a sentence for each override over which nothing can be swept, or if it is too much."""
    found: list[str] = []
    counted = 1
    for override in parsed:
        if not override.is_sweep_override():
            continue
        try:
            number = _count_values(override)
        except (HydraException, ValueError, TypeError, ArithmeticError) as error:
            found.append(f"{override.input_line} cannot be swept over: {' '.join(str(error).split())}.")
            continue
        counted *= number
        if not number:
            found.append(f"{override.input_line} names no value; name some, as in {override.key_or_group}=A,B.")
        elif counted > MOST_RUNS:
            found.append(f"{override.input_line}: this sweep has more than {MOST_RUNS:,} runs; name fewer values.")
    if found:
        raise UserError(*found)


def _count_values(override: Override) -> int:
    """Return how many values a sweep names, or `MOST_RUNS` + 1 if there are more."""
    swept = override.value()
    if isinstance(swept, IntervalSweep):
        raise ValueError("an interval has no list of values, which only sweepers such as hydra/sweeper=optuna need")
    if isinstance(swept, RangeSweep):
        assert swept.start is not None and swept.stop is not None
        if not swept.step:
            raise ValueError("its step is 0")
        number = (swept.stop - swept.start) / swept.step
        return int(min(max(0, math.ceil(number)), MOST_RUNS + 1)) if math.isfinite(number) else MOST_RUNS + 1
    return sum(1 for _ in islice(override.sweep_iterator(), MOST_RUNS + 1))


def _expand_overrides(parsed: list[Override]) -> list[list[str]]:
    """Return the override lists of a sweep's runs. A sweeper that decides during the sweep (hydra/sweeper=optuna ...)
    has no list of points: then the overrides that are not swept are checked."""
    if any(override.key_or_group == "hydra/sweeper" for override in parsed):
        return [[o.input_line for o in parsed if not o.is_sweep_override() and o.input_line is not None]]
    _check_sweeps(parsed)
    batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [point for batch in batches for point in batch]


def _read_experiment_sweep(parsed: list[Override]) -> dict[str, str]:
    """Return the overrides, by key, over which an experiment's own YAML sweeps (hydra.sweeper.params). A key on the
    command line wins. Empty if the experiment cannot be composed: its faults are reported later."""
    chosen = [override for override in parsed if override.key_or_group == "experiment"]
    if not chosen or any(override.is_sweep_override() for override in chosen):
        return {}
    try:
        cfg = compose(CONFIG_NAME, overrides=[str(one.input_line) for one in chosen], return_hydra_config=True)
    except Exception:  # Hydra raises errors of every kind for values such as [[a]]
        return {}
    given = {override.key_or_group for override in parsed}
    params = cfg.hydra.sweeper.params or {}
    return {key: f"{key}={value}" for key, value in params.items() if key not in given}


def _list_options(loader: ConfigLoader, group: str) -> list[str]:
    """Return the options of a group; those in folders below it have names such as paper/table5."""
    below = [(folder, _list_options(loader, f"{group}/{folder}")) for folder in loader.list_groups(group)]
    return [*loader.get_group_options(group), *(f"{folder}/{option}" for folder, names in below for option in names)]


@cache
def _list_packaged_options(group: str) -> list[str]:
    return _list_options(GlobalHydra.instance().config_loader(), group)


def _is_of_hydra(group: str) -> bool:
    return group.lstrip("+~").startswith("hydra")


def _compose_groups(groups: tuple[str, ...]) -> bytes:
    """Return a composed config, pickled: that makes copies of it in half the time of deepcopy."""
    is_ours = not any(group.startswith("~") or _is_of_hydra(group) for group in groups)
    try:
        composed = compose_alone(groups) if is_ours else None
    except Exception:  # of any kind; then Hydra itself finds the fault, and its message has more of what it is about
        composed = None
    return pickle.dumps(compose(CONFIG_NAME, overrides=list(groups)) if composed is None else composed)


_compose_packaged = cache(_compose_groups)  # from conf/ alone, which does not change while a process runs


def _cache_compositions(config_dir: str | None) -> Callable[[tuple[str, ...]], bytes]:
    """Return `_compose_groups`, cached. Users may edit their own groups between two command lines of one process, as
    in a notebook, so that those are read anew for each command line."""
    anew = cache(_compose_groups)

    def compose_cached(groups: tuple[str, ...]) -> bytes:
        is_packaged = config_dir is None and not any(map(_is_of_hydra, groups))
        return _compose_packaged(groups) if is_packaged else anew(groups)

    return compose_cached


class _Composer:
    """Composes the runs of one command line, and does what they share once: a sweep often repeats the same choices."""

    def __init__(self, config_dir: str | None, reads_data: bool, multirun: bool) -> None:
        loader = GlobalHydra.instance().config_loader()
        self.reads_data, self.multirun = reads_data, multirun
        self.list_options = _list_packaged_options if config_dir is None else cache(partial(_list_options, loader))
        self.compose_groups = _cache_compositions(config_dir)
        self.parse_all = partial(parse_overrides, loader=loader)
        self.parse_one = cache(lambda word: parse_overrides([word], loader))
        self.patterns: dict[tuple[tuple[str, ...], ...], Pattern] = {}

    def parse(self, words: Sequence[str]) -> list[Override]:
        """Return the words as `parse_overrides` does, each of them parsed once."""
        try:
            return [override for word in words for override in self.parse_one(word)]
        except UserError:
            return self.parse_all(words)  # raises it for all words

    def compose(self, words: list[str]) -> Run:
        """Return the run of a point. Raises UserError with a sentence for every fault."""
        found, groups, values = self._sort(self.parse(words))
        free = [override for override in values if is_free(override)]
        rest = [override for override in values if not is_free(override)]
        alike = (_list_lines(groups), _list_lines(rest), tuple(override.key_or_group for override in free))
        run = vary(self.patterns[alike], free) if alike in self.patterns and not found else None
        if run is not None and not any(self._find_run_faults(groups, values, run)):
            return run
        composed = self._compose_whole(words, found, groups, values)  # names faults in the order of the words
        if can_vary(composed.cfg, free):
            self.patterns[alike] = composed
        return composed.run

    def _sort(self, parsed: Sequence[Override]) -> tuple[list[str], list[Override], list[Override]]:
        """Return the faults that overrides have by themselves, and of the others those for Hydra and those of keys."""
        found: list[str] = []
        groups: list[Override] = []
        values: list[Override] = []
        for override in parsed:
            options = self.list_options(override.key_or_group)
            if wrong := list(_find_override_faults(override, options)):
                found.extend(wrong)
            elif options or override.is_delete() or _is_hydra_key(override):
                groups.append(override)
            else:
                values.append(override)
        return found, groups, values

    def _compose_whole(
        self, words: list[str], found: list[str], groups: Sequence[Override], values: Sequence[Override]
    ) -> Pattern:
        """Return a point that is like no other. Raises UserError with `found` and all other faults."""
        try:
            cfg = pickle.loads(self.compose_groups(_list_lines(groups)))
            if any(get_key(line).startswith("sizes.") for line in _list_lines(values)):
                cfg.sizes = merge_columns(cfg)
            wrong = {id(override): sentence for override in values if (sentence := apply_override(cfg, override))}
            found.extend(wrong.values())
            run = resolve_run(cfg)
        except RecursionError:
            raise UserError(*found, "A value is nested too deep.") from None
        except (AssertionError, LookupError, TypeError, AttributeError) as error:
            if not (own := list_hydra_words(words)):
                raise
            raise UserError(*found, explain_hydra(own, error)) from error
        except (HydraException, OmegaConfBaseException, MarkedYAMLError, ValueError) as error:  # defaults are no list
            raise UserError(*found, describe_error(error)) from error
        found.extend(self._find_run_faults(groups, [one for one in values if id(one) not in wrong], run))
        if found:
            raise UserError(*found)
        return Pattern(cfg, run)

    def _find_run_faults(self, groups: Sequence[Override], values: Sequence[Override], run: Run) -> Iterator[str]:
        """Yield the faults of a run, which its overrides by themselves do not have."""
        yield from _find_misnamed_presets(groups, run)
        yield from find_faults(run, reads_data=self.reads_data)
        for override in values if run.budget is not None else ():
            if override.key_or_group.rpartition(".")[2] == "bottleneck":
                yield (
                    f"{override.input_line} with budget={run.budget}: the bottlenecks are computed from the budget; "
                    "give only one of the two."
                )
        typed = ((str(one.input_line), one.key_or_group) for one in values)
        yield from find_idle_keys(typed, run, in_sweep=self.multirun)


def _list_lines(overrides: Sequence[Override]) -> tuple[str, ...]:
    return tuple(str(override.input_line) for override in overrides)


def resolve_run(cfg: DictConfig) -> Run:
    """Return the composed config as a `Run`, with the dotted names of the user's own parts."""
    run = resolve_config(cfg)
    if run.task.metric not in METRIC_NAMES[run.task.kind]:
        run.task.metric = resolve_own(METRIC, run.task.metric)
    name_own_parts(run)
    return run


def _find_override_faults(override: Override, options: list[str]) -> Iterator[str]:
    """Yield the faults of an override by itself; `options` are those of its group, if it names one."""
    line, group = override.input_line, override.key_or_group
    if override.is_sweep_override():
        hint = " A decimal has a point, as in budget=6.7%." if group == "budget" else ""
        yield f"{line} names several values; add -m to run each of them.{hint}"
    elif options and "/" in group and not _is_hydra_key(override):
        above, _, folder = group.partition("/")
        named = f"{folder}/{override.value()}"
        yield f"{line}: {above} is the group, and the folder is part of an option's name; give {above}={named}."
    elif options and override.is_add() and override.package is None and _has_place(group):
        yield f"{line}: {group} is already in the config; leave out the +."
    elif options and isinstance(override.value(), list) and group != "mix":
        yield f"{line}: {group} takes one option; use -m and commas to train several."
    elif options and not override.is_delete():
        value = override.value()
        for option in value if isinstance(value, list) else [value]:
            if option is None:
                choices = ", ".join(options)
                yield f"{line} chooses nothing; leave {group} out for its default, or give one of: {choices}."
            elif group == "functional_form" and is_own(str(option)):
                yield f"{line}: a form of your own is typed {FORM}={option}, or is a file functional_form/NAME.yaml."
            elif str(option) not in options:
                yield describe_unknown_option(override.get_key_element().lstrip("+"), option, options)


def describe_unknown_option(group: str, option: object, options: Sequence[str]) -> str:
    """Return the sentence for an option that a group lacks; a plugin of Hydra may not be installed."""
    if (package := PLUGINS.get(f"{group}={option}")) is not None:
        return f"{group}={option} is of a plugin of Hydra, which is not installed: pip install {package}."
    return describe_unknown(group, option, options)


def _has_place(group: str) -> bool:
    """Return whether a group is one of peftbench's own, for which conf/train.yaml has an entry."""
    return group == GROUP or (find_conf_dir() / group).is_dir()


def _find_misnamed_presets(groups: Sequence[Override], run: Run) -> Iterator[str]:
    """Yield a fault for each copy of a preset that still has the name of the original, which tables would show."""
    names = {"method": ("method", run.method), "task": ("name", run.task.name)}
    given = {override.key_or_group: override.value() for override in groups}
    for group, (key, name) in names.items():
        if group in given and "row" not in given and given[group] != name:
            yield f"{group}/{given[group]}.yaml has {key}: {name}; write {key}: {given[group]}, the name of its file."


def _is_hydra_key(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"
