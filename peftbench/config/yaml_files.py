"""YAML files from elsewhere: their size is bounded before they are built, and none of them configures Hydra."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader

from peftbench.utils.errors import UserError

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C implementation, if PyYAML was built with it
MOST_BYTES = 1 << 20
MOST_NODES = 100_000  # with each alias replaced by what it stands for
DEEPEST = 50
# What a group file may set of Hydra's own config: the grid of an experiment. Anything else, such as a callback or a
# handler of the log, can name a function that is then called.
SWEPT = ("sweeper", "params")
PLUGINS = ("hydra/launcher", "hydra/sweeper")  # groups in which a user may have settings of an installed plugin
LOADED = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "null")}  # the roots that OmegaConf takes
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.MULTILINE)


def read_yaml_text(file: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        UserError: it cannot be read, is too large or too deep, or its aliases stand for too much.
    """
    text = _read_text(file)
    find_root(file, text)
    return text


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file} is larger than {MOST_BYTES:,} bytes, and no config of peftbench.")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{file} cannot be read: {reason}.") from error


def read_yaml(file: Path) -> Any:
    """Return the content of a file of plain YAML, fast: OmegaConf.load takes fifteen times as long.

    Raises:
        UserError: as `read_yaml_text`.
    """
    root = find_root(file, _read_text(file))
    try:
        return None if root is None else LOADER("").construct_document(root)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not plain YAML: {getattr(error, 'problem', error)}.") from error


def parse_config(text: str | bytes) -> DictConfig | ListConfig:
    """Return what OmegaConf.create returns of a YAML text, in a tenth of the time. Raises an error where that does."""
    found = yaml.load(text, _make_omegaconf_loader())
    return OmegaConf.create({} if found is None else {found: None} if isinstance(found, str) else found)


def load_packaged(file: Path) -> DictConfig:
    """Return what OmegaConf.load returns of a file of conf/."""
    config = parse_config(file.read_bytes())
    assert isinstance(config, DictConfig)
    return config


@cache
def _make_omegaconf_loader() -> Any:
    """Return OmegaConf's YAML loader in the C implementation, if PyYAML was built with it."""
    reference = get_yaml_loader()
    if not hasattr(yaml, "CSafeLoader"):
        return reference

    class Loader(yaml.CSafeLoader):
        yaml_implicit_resolvers = reference.yaml_implicit_resolvers
        yaml_constructors = reference.yaml_constructors

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            known: set[Any] = set()
            for key, _ in node.value:
                if key.tag == yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG and key.value in known:
                    fault = f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError("while constructing a mapping", node.start_mark, fault)
                known.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return super().construct_mapping(node, deep=deep)

    return Loader


def format_config(plain: dict[str, Any]) -> str:
    """Return what OmegaConf.to_yaml returns of a config with these plain values."""
    text: str = yaml.dump(
        plain, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=get_omega_conf_dumper()
    )
    return text


def find_root(file: Path, text: str) -> yaml.Node | None:
    """Return the root of a YAML file's tree, in which an alias is the node that it stands for; None if it is empty.

    Raises:
        UserError: it is no YAML, too deep, or its aliases stand for too much.
    """
    try:
        root = yaml.compose(text, Loader=LOADER)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        raise UserError(
            f"{where} is not YAML: {getattr(error, 'problem', None) or 'it is nested too deep'}."
        ) from error
    if root is not None:
        _count_nodes(file, root, {}, ())
    return root


def _count_nodes(file: Path, node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Return the number of nodes of a tree, with each alias replaced by what it stands for."""
    if id(node) in above or len(above) > DEEPEST:
        raise UserError(f"{file} is nested more than {DEEPEST} levels deep, and no config of peftbench.")
    if id(node) not in known:
        below = (*above, id(node))
        known[id(node)] = 1 + sum(_count_nodes(file, child, known, below) for child in _list_children(node))
    if known[id(node)] > MOST_NODES:
        raise UserError(f"{file} has aliases (*) that stand for more than {MOST_NODES:,} values.")
    return known[id(node)]


def _list_children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def find_hydra_faults(folder: Path) -> Iterator[str]:
    """Yield a sentence for each file of a --config-dir that would configure Hydra itself, and so could run a command,
    or that Hydra could not load.

    Raises:
        UserError: a file cannot be read.
    """
    for file in sorted(folder.rglob("*.yaml")):
        group = file.relative_to(folder).parent.as_posix()
        text = read_yaml_text(file)
        root = find_root(file, text)
        if root is not None and root.tag not in LOADED:
            kind = root.tag.rpartition(":")[2]
            yield f"{file} holds a value of type {kind}; a file of a group has lines of KEY: VALUE."
        elif (found := _find_hydra_keys(root, text, group)) is not None:
            yield (
                f"{file}: {found} would change Hydra itself, which a file must not do, because it could run a command; "
                "of hydra: only sweeper.params is taken from a file, and type other keys on the command line."
            )


def _find_hydra_keys(root: yaml.Node | None, text: str, group: str) -> str | None:
    """Return what in a file of a group configures Hydra, or None."""
    for package in _PACKAGE.findall(text):
        if "hydra" in package:
            return f"@package {package}"
    if group.split("/")[0] == "hydra":
        if group not in PLUGINS:
            return f"a file in {group}/"
        return "_target_" if root is not None and _has_target(root, set()) else None
    for key, value in _list_pairs(root):
        if key == "defaults":
            names = [text for text in _list_scalars(value) if re.search(r"hydra", text.replace("override ", ""))]
            if odd := [name for name in names if name.replace("override ", "").strip("/ ") not in PLUGINS]:
                return f"{odd[0]} among its defaults"
        elif key == "hydra" and (odd_key := _find_unswept(value)) is not None:
            return odd_key
        elif key.startswith(("hydra.", "hydra/", "hydra@", "${")):
            return key
    return None


def _find_unswept(hydra: yaml.Node) -> str | None:
    """Return the first key below hydra: other than sweeper.params, or None."""
    node, path = hydra, "hydra"
    for part in SWEPT:
        pairs = _list_pairs(node)
        if not isinstance(node, yaml.MappingNode):
            return path
        for key, value in pairs:
            if key != part:
                return f"{path}.{key}"
            node = value
        path = f"{path}.{part}"
    return None


def _list_pairs(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    """Return the keys of a mapping with their values, those of a merge (<<) included."""
    found: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    found.extend(_list_pairs(merged))
            else:
                found.append((str(key.value), value))
    return found


def _list_scalars(node: yaml.Node) -> Iterator[str]:
    if isinstance(node, yaml.ScalarNode):
        yield str(node.value)
    for child in _list_children(node):
        yield from _list_scalars(child)


def _has_target(node: yaml.Node, seen: set[int]) -> bool:
    if id(node) in seen:
        return False
    seen.add(id(node))
    return any(key == "_target_" for key, _ in _list_pairs(node)) or any(
        _has_target(child, seen) for child in _list_children(node)
    )
