"""The columns of conf/sizes.yaml, and the backbones for which each was made; `counts/shares.py` measures others."""

from __future__ import annotations

from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError

from peftbench.config.schema import Model, Run, find_conf_dir
from peftbench.config.yaml_files import load_packaged
from peftbench.utils.files import expand_home


def list_sizes_taken(run: Run) -> dict[str, int]:
    """Return, by prefix, the bottlenecks from the run's column that may have to be fitted to its backbone.

    There are none if all bottlenecks were typed; if there is a budget, for which sizes are only a ratio; if the column
    does not say which backbones it is `of`; and if the run's backbone is one of these.
    """
    if run.budget is not None or not isinstance(run.size, dict):
        return {}
    made_for = list_column_backbones(run)
    if not made_for or any(_is(run.model, model) for model in made_for.values()):
        return {}
    taken: dict[str, int] = run.size.get("taken", {})
    return taken


def list_column_backbones(run: Run) -> dict[str, Model]:
    """Return the backbones for which the sizes of a run's column were made, by their names in conf/model."""
    return {name: _load_preset(name) for name in run.size.get("of", ())} if isinstance(run.size, dict) else {}


def select_column(key: str, *, _root_: DictConfig) -> Any:
    """Return the column that a key of a config names, as ${column:model.sizes} in it.

    conf/sizes.yaml is no part of a config, whose values it would outnumber. Columns that the user's own files have
    under `sizes`, or parts of them, count first.
    """
    name = str(OmegaConf.select(_root_, key, throw_on_missing=True))
    ours, own = _read_columns(), _list_own(_root_)
    if name in own:
        return OmegaConf.merge(ours.get(name, {}), own[name])
    if name not in ours:
        raise InterpolationKeyError(f"{key}={name}: conf/sizes.yaml has {', '.join(map(str, ours))}")
    return ours[name]


def merge_columns(config: DictConfig) -> DictConfig:
    """Return the columns of conf/sizes.yaml with those of a config in their place.

    Raises:
        InterpolationResolutionError: its `sizes` is no mapping.
    """
    merged = OmegaConf.merge(_read_columns(), _list_own(config))
    assert isinstance(merged, DictConfig)
    OmegaConf.set_readonly(merged, None)
    return merged


def _list_own(config: DictConfig) -> DictConfig:
    own = config.sizes
    if own is not None and not isinstance(own, DictConfig):
        raise InterpolationResolutionError(f"sizes={own} is not a mapping")
    return OmegaConf.create() if own is None else own


@cache
def _read_columns() -> DictConfig:
    columns = load_packaged(find_conf_dir() / "sizes.yaml")
    OmegaConf.set_readonly(columns, True)  # all configs share it
    return columns


@cache
def _load_preset(name: str) -> Model:
    preset = load_packaged(find_conf_dir() / "model" / f"{name}.yaml")
    apart = {"sizes": ""}  # it refers to a task, and there is none here
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), preset, apart))
    assert isinstance(merged, Model)
    return merged


def _is(model: Model, other: Model) -> bool:
    """Return whether two configs name the same backbone, without reading it."""
    if model.path is None or other.path is None:
        return model.path == other.path and model.hub_id == other.hub_id
    return expand_home(model.path).resolve() == expand_home(other.path).resolve()
