"""Set keys of a config, and turn faults of a key, a value or a YAML file into sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_args, get_origin

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError

from peftbench.config.schema import Modification, Run
from peftbench.utils.errors import UserError, describe_unknown, suggest


def parse_overrides(words: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parse words of a command line, each of which is one override.

    Args:
        loader: knows the groups of the config; without it, no glob can be swept over.

    Raises:
        UserError: with a sentence for each word that is no override.
    """
    parser, found, parsed = OverridesParser.create(config_loader=loader), [], []
    for word in words:
        try:
            parsed.extend(parser.parse_overrides([word]))
        except RecursionError:
            found.append(f"{word[:40]}... is nested too deep.")
        except (HydraException, ValueError):  # a ValueError of antlr's
            key = word.partition("=")[0]
            if key and "=" in word:
                found.append(
                    f"{word} cannot be read; if the value itself has commas, quotes, brackets, braces, ~ or =, another "
                    "sign such as # or ; or a letter other than A to Z, put it in both kinds of quotes, "
                    f"'{key}=\"...\"'."
                )
            else:
                found.append(f"{word} is not KEY=VALUE, such as method=lora; write no spaces around the =.")
    if found:
        raise UserError(*found)
    return parsed


def get_key(word: str) -> str:
    """Return the key of a word KEY=VALUE as it is typed, without the + or ~ of Hydra before it."""
    return word.partition("=")[0].lstrip("+~")


MAY_BE_EMPTY = ("task.source_join",)  # texts that follow each other without a sign between them


def apply_override(cfg: DictConfig, override: Override) -> str | None:
    """Set the key of an override in `cfg`. Return what is wrong with it as a sentence, or None."""
    key, value = override.key_or_group, override.value()
    if value == "" and key not in MAY_BE_EMPTY and _get_type(cfg, key)[0] is str:  # such as output_dir=$UNSET
        return f"{key}= has no value; give one, or leave it out."
    if value == {} and OmegaConf.select(cfg, key):
        return f"{key}={{}} changes nothing, because a mapping is added to; leave it out."
    force_add = _has_free_name(key) or _is_addition(cfg, override)
    return set_key(cfg, key, value, force_add=force_add)


def _has_free_name(key: str) -> bool:
    """Return whether a key may be absent from the config: those of peft are checked by find_peft_faults, the settings
    of own parts by those who build them."""
    return key.startswith("peft.") or ".settings." in key


def set_key(cfg: DictConfig, key: str, value: Any, force_add: bool = False) -> str | None:
    """Set a key, like `apply_override`, to a value; `force_add` adds a key that does not exist."""
    group = key.partition(".")[0]
    if group != key and group in cfg and OmegaConf.select(cfg, group) is None:
        return f"{key}={value} needs a {group}; give {group}= as well."
    if group == "size":
        own = f", or change one with sizes.COLUMN{key.removeprefix('size')}=" if group != key else ""
        return f"{key}={value}: size is a column of conf/sizes.yaml; choose one with model.sizes=COLUMN{own}."
    try:
        OmegaConf.update(cfg, key, value, merge=True, force_add=force_add)
    except (ConfigKeyError, ConfigAttributeError):
        return _describe_unknown_key(cfg, key, value)
    except (OmegaConfBaseException, ArithmeticError, ValueError, TypeError) as error:  # OmegaConf passes some through
        return _describe_bad_value(cfg, key, value, error)
    except RecursionError:
        return f"{key}: its value is nested too deep."
    if type(value) in (int, float) and value not in (0, 1) and _get_type(cfg, key) == (bool, False):
        return f"{key}={value}: {WANTED[bool]} is expected."  # OmegaConf takes any number for true
    return None


def list_hydra_words(words: Iterable[str]) -> list[str]:
    """Return the words of a command line that configure Hydra itself."""
    return [word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/", "hydra="))]


def explain_hydra(words: Sequence[str], error: Exception) -> str:
    """Return the sentence for what Hydra raises about keys of its own, which have no schema."""
    return f"{' '.join(words)}: Hydra refuses this ({describe_error(error).rstrip('.') or type(error).__name__})."


PATHS = ("output_dir", "retention", "model.path", "model.chat_template", "task.data_dir")
FILES = ("task.train_file", "task.validation_file", "task.test_file")


def quote_path(word: str) -> str:
    """Return an override whose value is a path that Hydra cannot read, such as output_dir=a/é, with the path in quotes.

    Any other override is returned as it is.
    """
    key, equals, value = word.partition("=")
    bare = key.lstrip("+")
    if not equals or (bare not in (*PATHS, *FILES) and not bare.startswith("task.data_files.")):
        return word
    try:
        OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):
        return f"{key}={QuotedString(value, Quote.double).with_quotes()}"
    return word


def address_hydra(word: str) -> str:
    """Return an override as Hydra itself takes it, to which a key that may be absent must be announced by ++."""
    key = get_key(word)
    return f"++{word}" if word.startswith(key) and (_has_free_name(key) or key.startswith("sizes.")) else word


def _is_addition(cfg: DictConfig, override: Override) -> bool:
    """Return whether an override adds to a mapping with free keys: +task.data_files.SPLIT=FILE or
    +task.data_files={SPLIT:FILE}. In a schema, + adds nothing."""
    key = override.key_or_group
    grown = OmegaConf.select(cfg, key if isinstance(override.value(), dict) else key.rpartition(".")[0])
    is_mapping = isinstance(grown, DictConfig) and not is_dataclass(OmegaConf.get_type(grown))
    return is_mapping and (override.is_add() or override.is_force_add())


def _describe_unknown_key(cfg: DictConfig, key: str, value: object) -> str:
    """Return the sentence for a key that is not in the schema: the wrong part, and the choices at its level."""
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
            if depth and not choices:
                return f"{key} is not a key of the config{at}; +{key}=... adds it."
            hint = _suggest_group(cfg, key) or _suggest_keys(parts[depth], choices, ".".join(parts[:depth]))
            return f"{key} is not a key of the config{at}{hint}"
    if isinstance(value, dict):
        node = OmegaConf.select(cfg, key)
        for name in value:
            if isinstance(node, DictConfig) and name not in node:
                return _describe_unknown_key(cfg, f"{key}.{name}", value[name])
    return f"{key}={value} does not fit the config."


def _suggest_keys(name: str, choices: list[str], group: str) -> str:
    """Return the end of that sentence: the closest keys or, if there is none, where all of them are listed."""
    if len(choices) <= FEW:
        return suggest(name, choices)
    close = get_close_matches(name, choices, n=1, cutoff=0.8) or get_close_matches(name, choices, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    named = f" {group}" if group in ("trainer", "task", "model", "fidelity") else ""
    return f"; peftbench ls keys{named} lists all."


def _suggest_group(cfg: DictConfig, key: str) -> str | None:
    """Return the end of that sentence if the key is one of trainer, task or model, typed without this prefix."""
    for group in ("trainer", "task", "model"):
        if key.partition(".")[0] in list(cfg.get(group, {})):  # includes keys without a value
            return f"; did you mean {group}.{key}?"
    return "; did you mean trainer.learning_rate?" if key == "lr" else None


FEW = 8  # keys that a sentence can list
WANTED: dict[type | None, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _describe_bad_value(cfg: DictConfig, key: str, value: object, error: Exception) -> str:
    kind, is_list = _get_type(cfg, key)
    if is_list and isinstance(value, (str, int, float)):
        return f"{key}={value}: a list is expected, as in {key}=[{value}]."
    if kind is not None and issubclass(kind, Enum):
        return describe_unknown(key, value, kind.__members__)
    if kind in WANTED:
        return f"{key}={value}: {WANTED[kind]} is expected."
    if kind is not None and is_dataclass(kind) and not isinstance(value, dict):
        first = fields(kind)[0].name
        instead = f"{key}.name={value}" if first == "name" else f"one of them, such as {key}.{first}=..."
        return f"{key}={value}: it has no value of its own, but keys below it; give {instead}."
    return f"{key}={value}: {describe_error(error)}"


def _describe_file_fault(file: str, fault: str, key: str) -> str:
    """Return the sentence for a file of a group with a key that Hydra refuses.

    Args:
        key: "" if Hydra does not name it.
    """
    if file.startswith("search/"):
        return f"{file}: {fault}; each of its keys has times: [...] or values: [...], as in conf/search/lr3.yaml."
    schema = OmegaConf.structured(Run)
    if found := re.match(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", fault):
        (group,) = [name for name in schema if getattr(OmegaConf.get_type(schema, name), "__name__", None) == found[1]]
        return f"{file}: {group}: {found[2]} belongs in the defaults, as - override /{group}: {found[2]}."
    if not key:
        return f"{file}: {fault}."
    if key.startswith("mix."):
        schema.mix[key.split(".")[1]] = Modification()
    group, last = file.partition("/")[0], key.rpartition(".")[2]
    if last in ("method", "model", "task", "trainer") and key in (last, f"{group}.{last}"):
        return f"{file}: its keys are read as {group}'s own; a file with {last}: begins with # @package _global_."
    if fault.startswith("Key "):
        return f"{file}: {_describe_unknown_key(schema, key, '')}"
    kind, is_list = _get_type(schema, key)
    if kind in WANTED:
        return f"{file}: {key}: {'a list, such as [a, b],' if is_list else WANTED[kind]} is expected."
    return f"{file}: {key}: {fault}."


def _get_type(cfg: DictConfig, key: str) -> tuple[type | None, bool]:
    """Return the type of a key in the schema, if the key exists, and whether it is the type of a list's elements."""
    node = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
    if not isinstance(node, DictConfig):
        return None, False
    child = node._get_node(key.rpartition(".")[2])
    declared = getattr(getattr(child, "_metadata", None), "ref_type", None)
    kind = next(iter(get_args(declared)), declared)
    return kind if isinstance(kind, type) else None, get_origin(declared) is list


def describe_error(error: Exception) -> str:
    """Return a message of Hydra or OmegaConf as one sentence."""
    if isinstance(error, InterpolationKeyError) and "task.paper" in str(error):
        return "trainer=paper: this task has no settings in the paper; use trainer=quick."
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark
        where = f"{mark.name.removeprefix('file://')}:{mark.line + 1}" if mark is not None else "A file"
        return f"{where} is not YAML: {error.problem}."
    if found := re.match(r"In '(.+)': \w+ raised while composing config:\n(.*)\n +full_key: (.*)", str(error)):
        file, fault, key = found.groups()
        return _describe_file_fault(f"{file}.yaml", fault, key)
    if isinstance(error, InterpolationResolutionError):
        return f"{error.full_key}: {_join_lines(error).rstrip('.')}."
    if found := re.match(r"In '.*': Could not find '(.+)/(.+)'\n\nAvailable options in .+:\n([\w\s]*)\n", str(error)):
        return describe_unknown(found[1], found[2], found[3].split())
    if "Could not override" in str(error) and "@" in str(error):
        return f"{_join_lines(error)} A file that overrides groups begins with the line # @package _global_."
    if isinstance(error, MissingMandatoryValue):
        key = str(getattr(error, "full_key", ""))
        own = " A task's file may begin with defaults: [text_classification] or [text_to_text], and change some keys."
        return f"{key} has no value; give one.{own if key.startswith('task.') else ''}"
    return _join_lines(error)


def _join_lines(error: Exception) -> str:
    text = str(error).split("\n    full_key:")[0].split("\nConfig search path")[0]
    return re.sub(r"\s+", " ", text).strip()
