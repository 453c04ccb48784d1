"""From a command line to validated configs: Hydra composes, and every fault is found before anything is loaded.

Hydra stops at the first fault and reports it in its own terms. Here each override is tried by itself, so that all
faults come out in one message, as sentences, with the key as it was typed. A sweep's points are all composed and
checked before the first of them runs. Imports no torch.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra import compose, version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError

from peftbench.config import Modification, Run, conf_dir, resolve
from peftbench.errors import UserError, meant, unknown
from peftbench.validity import faults

CONFIG_NAME = "train"
AND = "and"  # between the grids of one sweep
ConfigStore.instance().store("schema", Run)


def compose_runs(args: Namespace, *, reads_data: bool = True) -> list[Run]:
    """The validated run, or all runs of a sweep, of a command line that Hydra's own parser has split.

    Args:
        reads_data: see `validity.faults`.

    Raises:
        UserError: with a sentence for every fault.
    """
    return [run for _, run in compose_points(args, reads_data=reads_data)]


def compose_points(args: Namespace, *, reads_data: bool = True) -> list[tuple[list[str], Run]]:
    """Like `compose_runs`, each run with the overrides that make it."""
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir} is not a folder; give one with method/, task/ ... below it.")
    grids = _grids(args.overrides)
    if len(grids) > 1 and not args.multirun:
        raise UserError(f"{AND} joins grids to a sweep; add -m to run it.")
    with _hydra(args.config_dir):
        loader = GlobalHydra.instance().config_loader()
        found: list[str] = []
        runs: list[tuple[list[str], Run]] = []
        for point in [point for grid in grids for point in _points_of(grid, args.multirun, loader)]:
            try:
                runs.append((point, _compose_one(point, loader, reads_data)))
            except UserError as error:
                found.extend(sentence for sentence in error.faults if sentence not in found)
        if found:
            raise UserError(*found)
        return runs


def _grids(words: Sequence[str]) -> list[list[str]]:
    """The overrides of each grid of a sweep: the first one's, and behind each `and` the first one's with others in the
    place of those of the same key, or beside them."""
    grids: list[list[str]] = [[]]
    for word in words:
        if word == AND:
            grids.append([])
        else:
            grids[-1].append(word)
    if len(grids) > 1 and not all(grids):
        raise UserError(f"{AND} stands between two grids, as in -m method=full {AND} method=lora,mam budget=1%.")
    first, *others = grids
    return [first, *([*(word for word in first if _key(word) not in set(map(_key, own))), *own] for own in others)]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _points_of(grid: list[str], multirun: bool, loader: ConfigLoader) -> list[list[str]]:
    """The override lists of a grid's runs."""
    parsed = _parsed(grid, loader)
    params = _sweep_of_experiment(parsed)
    if params and not multirun:
        raise UserError(f"An experiment that goes over {' and '.join(params)} is a sweep; add -m to run it.")
    if params:
        parsed = [*_parsed(list(params.values()), loader), *parsed]
    return _points(parsed) if multirun else [grid]


def _parsed(overrides: list[str], loader: ConfigLoader) -> list[Override]:
    """Raises UserError with a sentence for each word that is no override."""
    parser, found, parsed = OverridesParser.create(config_loader=loader), [], []
    for line in overrides:
        try:
            parsed.extend(parser.parse_overrides([line]))
        except HydraException:
            key = line.partition("=")[0]
            if key and "=" in line:
                found.append(
                    f"{line} cannot be read; where the value has commas, quotes, brackets, braces or = of its own, put "
                    f"it in both kinds of quotes, '{key}=\"...\"'."
                )
            else:
                found.append(f"{line} is no KEY=VALUE, such as method=lora; leave no spaces around the =.")
    if found:
        raise UserError(*found)
    return parsed


@contextmanager
def _hydra(config_dir: str | None) -> Iterator[None]:
    """Hydra's compose API over conf/ and the user's --config-dir, cleared afterwards: hydra.main starts from nothing.

    `initialize_config_dir`, the public way, takes one folder only.
    """
    search_path = create_config_search_path(str(conf_dir()))
    if config_dir is not None:
        search_path.prepend("command-line", f"file://{Path(config_dir).resolve()}", anchor="schema")
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    Hydra.create_main_hydra2("peftbench", search_path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def _points(parsed: list[Override]) -> list[list[str]]:
    """The override lists of a sweep's runs. A sweeper that decides as it goes (hydra/sweeper=optuna ...) has no list
    of points: then what is not swept is checked."""
    if any(override.key_or_group == "hydra/sweeper" for override in parsed):
        return [[o.input_line for o in parsed if not o.is_sweep_override() and o.input_line is not None]]
    batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [point for batch in batches for point in batch]


def _sweep_of_experiment(parsed: list[Override]) -> dict[str, str]:
    """The overrides, by key, over which an experiment's own YAML sweeps (hydra.sweeper.params); on the command line the
    same key wins. Nothing where the experiment cannot be composed: what is wrong with it is said later."""
    chosen = [override for override in parsed if override.key_or_group == "experiment"]
    if not chosen or any(override.is_sweep_override() for override in chosen):
        return {}
    try:
        cfg = compose(CONFIG_NAME, overrides=[str(one.input_line) for one in chosen], return_hydra_config=True)
    except HydraException:
        return {}
    given = {override.key_or_group for override in parsed}
    params = cfg.hydra.sweeper.params or {}
    return {key: f"{key}={value}" for key, value in params.items() if key not in given}


def _all_options(loader: ConfigLoader, group: str) -> list[str]:
    """The options of a group, those in folders below it as paper/table5."""
    below = [(folder, _all_options(loader, f"{group}/{folder}")) for folder in loader.list_groups(group)]
    return [*loader.get_group_options(group), *(f"{folder}/{option}" for folder, names in below for option in names)]


def _compose_one(overrides: list[str], loader: ConfigLoader, reads_data: bool) -> Run:
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    found: list[str] = []
    groups: list[str] = []
    values: list[Override] = []
    for line, override in zip(overrides, parsed, strict=True):
        if override.is_sweep_override():
            hint = " A decimal has a point, as in budget=6.7%." if override.key_or_group == "budget" else ""
            found.append(f"{line} names several values; add -m to run each of them.{hint}")
            continue
        options = _all_options(loader, override.key_or_group)
        if options and override.is_add() and override.package is None and (conf_dir() / override.key_or_group).is_dir():
            found.append(f"{line}: {override.key_or_group} has its place in the config; leave out the +.")
            continue
        if options and isinstance(override.value(), list) and override.key_or_group != "mix":
            found.append(f"{line}: {override.key_or_group} takes one option; -m with commas trains several.")
            continue
        if options and not override.is_delete():
            wrong = [unknown(_group_key(override), o, options) for o in _options(override) if o not in options]
            found.extend(wrong)
            if not wrong:
                groups.append(line)
        elif override.is_delete() or _is_hydras(override):
            groups.append(line)
        else:
            values.append(override)
    try:
        cfg = compose(CONFIG_NAME, overrides=groups)
        for override in values:
            sentence = apply(cfg, override)
            found.extend([sentence] if sentence else [])
        run = resolve(cfg)
    except (HydraException, OmegaConfBaseException, MarkedYAMLError, ValueError) as error:  # defaults that are no list
        raise UserError(*found, _plain(error)) from error
    found.extend(_misnamed([override for override in parsed if override.input_line in groups], run))
    found.extend(faults(run, reads_data=reads_data))
    if run.budget is not None:
        found.extend(
            f"{override.input_line} with budget={run.budget}: the budget is what the bottlenecks are solved for; give "
            "one of the two."
            for override in values
            if override.key_or_group.rpartition(".")[2] == "bottleneck"
        )
    if found:
        raise UserError(*found)
    return run


def _misnamed(parsed: list[Override], run: Run) -> Iterator[str]:
    """A copy of a preset that still has its name, by which folders and tables would know its runs."""
    names = {"method": ("method", run.method), "task": ("name", run.task.name)}
    given = {override.key_or_group: override.value() for override in parsed}
    for group, (key, name) in names.items():
        if group in given and "row" not in given and given[group] != name:
            yield f"{group}/{given[group]}.yaml has {key}: {name}; write {key}: {given[group]}, the name of its file."


def _is_hydras(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


def _group_key(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def _options(override: Override) -> list[str]:
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    return ["null" if option is None else str(option) for option in chosen]


def apply(cfg: DictConfig, override: Override) -> str | None:
    """Set one key of `cfg`; the sentence that says what is wrong with it, or None."""
    return put(cfg, override.key_or_group, override.value(), force_add=_may_grow(cfg, override))


def put(cfg: DictConfig, key: str, value: Any, force_add: bool = False) -> str | None:
    """Like `apply`, of a key and its value."""
    group = key.partition(".")[0]
    if group != key and group in cfg and OmegaConf.select(cfg, group) is None:
        return f"{key}={value} needs a {group}; give {group}= as well."
    try:
        OmegaConf.update(cfg, key, value, merge=True, force_add=force_add)
    except (ConfigKeyError, ConfigAttributeError):
        return _unknown_key(cfg, key, value)
    except OmegaConfBaseException as error:
        return _bad_value(cfg, key, value, error)
    return None


def _may_grow(cfg: DictConfig, override: Override) -> bool:
    """Whether +KEY=VALUE adds to a mapping of free keys, such as task.data_files; in a schema + adds nothing."""
    parent = OmegaConf.select(cfg, override.key_or_group.rpartition(".")[0])
    is_mapping = isinstance(parent, DictConfig) and not is_dataclass(OmegaConf.get_type(parent))
    return is_mapping and (override.is_add() or override.is_force_add())


def _unknown_key(cfg: DictConfig, key: str, value: object) -> str:
    """`key` is in no schema: name the part that is wrong and what stands at its level."""
    parts = key.split(".")
    for depth in range(len(parts)):
        parent = cfg if depth == 0 else OmegaConf.select(cfg, ".".join(parts[:depth]))
        if not isinstance(parent, DictConfig):
            return f"{key}={value}: {'.'.join(parts[:depth])} is a single value and has no keys below it."
        if parts[depth] not in parent:
            choices = sorted(str(name) for name in parent if depth or name not in ("sizes", "size"))
            if parts[0] == "mix" and depth == 1 and not choices:
                return f"{key}={value}: there is no {parts[1]} in the mixture; add one, such as mix=[prefix]."
            at = f" (in {'.'.join(parts[:depth])})" if depth else ""
            return f"{key} is no key of the config{at}{_one_level_below(cfg, key) or meant(parts[depth], choices)}"
    return f"{key}={value} does not fit the config."


def _one_level_below(cfg: DictConfig, key: str) -> str | None:
    """How the sentence ends where `key` is one of the trainer, the task or the model, typed without that name."""
    for group in ("trainer", "task", "model"):
        if key.partition(".")[0] in list(cfg[group]):  # those without a value too
            return f"; did you mean {group}.{key}?"
    return None


WANTED: dict[type | None, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _bad_value(cfg: DictConfig, key: str, value: object, error: OmegaConfBaseException) -> str:
    kind, is_list = _type_of(cfg, key)
    if is_list and isinstance(value, (str, int, float)):
        return f"{key}={value}: a list is expected, as in {key}=[{value}]."
    if kind is not None and issubclass(kind, Enum):
        return unknown(key, value, kind.__members__)
    if kind in WANTED:
        return f"{key}={value}: {WANTED[kind]} is expected."
    return f"{key}={value}: {_plain(error)}"


def _wrong_in_file(file: str, fault: str, key: str) -> str:
    """The sentence for a file of a group of which Hydra cannot take a key.

    Args:
        key: "" where Hydra does not name it.
    """
    if file.startswith("search/"):
        return f"{file}: {fault}; each of its keys has times: [...] or values: [...], as in conf/search/lr3.yaml."
    schema = OmegaConf.structured(Run)
    if found := re.match(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", fault):
        (group,) = [name for name in schema if getattr(OmegaConf.get_type(schema, name), "__name__", None) == found[1]]
        return f"{file}: {group}: {found[2]} has its place among the defaults, as - override /{group}: {found[2]}."
    if not key:
        return f"{file}: {fault}."
    if key.startswith("mix."):
        schema.mix[key.split(".")[1]] = Modification()
    group, last = file.partition("/")[0], key.rpartition(".")[2]
    if last in ("method", "model", "task", "trainer") and key in (last, f"{group}.{last}"):
        return f"{file}: its keys are taken for {group}'s own; a file with {last}: begins with # @package _global_."
    if fault.startswith("Key "):
        return f"{file}: {_unknown_key(schema, key, '')}"
    kind, is_list = _type_of(schema, key)
    if kind in WANTED:
        return f"{file}: {key}: {'a list, such as [a, b],' if is_list else WANTED[kind]} is expected."
    return f"{file}: {key}: {fault}."


def _type_of(cfg: DictConfig, key: str) -> tuple[type | None, bool]:
    """The type that the schema gives a key, where the key exists, and whether it is that of the elements of a list."""
    node = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
    if not isinstance(node, DictConfig):
        return None, False
    child = node._get_node(key.rpartition(".")[2])
    declared = getattr(getattr(child, "_metadata", None), "ref_type", None)
    kind = next(iter(get_args(declared)), declared)
    return kind if isinstance(kind, type) else None, get_origin(declared) is list


def _plain(error: Exception) -> str:
    """A message of Hydra or OmegaConf as one sentence."""
    if isinstance(error, InterpolationKeyError) and "task.paper" in str(error):
        return "trainer=paper: this task has no settings in the paper; use trainer=quick."
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark
        where = f"{mark.name.removeprefix('file://')}:{mark.line + 1}" if mark is not None else "A file"
        return f"{where} is no YAML: {error.problem}."
    if found := re.match(r"In '(.+)': \w+ raised while composing config:\n(.*)\n +full_key: (.*)", str(error)):
        file, fault, key = found.groups()
        return _wrong_in_file(f"{file}.yaml", fault, key)
    if isinstance(error, InterpolationKeyError):
        return f"{error.full_key}: {_one_line(error)}."
    if found := re.match(r"In '.*': Could not find '(.+)/(.+)'\n\nAvailable options in .+:\n([\w\s]*)\n", str(error)):
        return unknown(found[1], found[2], found[3].split())
    if "Could not override" in str(error) and "@" in str(error):
        return f"{_one_line(error)} A file that overrides groups begins with the line # @package _global_."
    if isinstance(error, MissingMandatoryValue):
        key = str(getattr(error, "full_key", ""))
        own = " A task's file may begin with defaults: [text_classification] or [text_to_text], and change some keys."
        return f"{key} has no value; give one.{own if key.startswith('task.') else ''}"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    text = str(error).split("\n    full_key:")[0].split("\nConfig search path")[0]
    return re.sub(r"\s+", " ", text).strip()
