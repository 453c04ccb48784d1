"""The backbones for which a column of conf/sizes.yaml was made; `counts/shares.py` measures others."""

from __future__ import annotations

from functools import cache

from omegaconf import OmegaConf

from peftbench.config.schema import Model, Run, find_conf_dir
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


@cache
def _load_preset(name: str) -> Model:
    preset = OmegaConf.load(find_conf_dir() / "model" / f"{name}.yaml")
    apart = {"sizes": ""}  # it refers to a task, and there is none here
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), preset, apart))
    assert isinstance(merged, Model)
    return merged


def _is(model: Model, other: Model) -> bool:
    """Return whether two configs name the same backbone, without reading it."""
    if model.path is None or other.path is None:
        return model.path == other.path and model.hub_id == other.hub_id
    return expand_home(model.path).resolve() == expand_home(other.path).resolve()
