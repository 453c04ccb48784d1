"""Which backbones a column of conf/sizes.yaml was made for; `counts/shares.py` measures others. Imports no torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from peftbench.config.schema import Model, Run, conf_dir


def sizes_taken(run: Run) -> dict[str, int]:
    """By prefix the bottlenecks that the run has from its column, where they may have to be fitted to its backbone.

    None are, where all were typed; where there is a budget, to which they are but a ratio; where it is not known what
    the column is `of`; and where the backbone is one of these.
    """
    if run.budget is not None or not isinstance(run.size, dict):
        return {}
    made_for = column_backbones(run)
    if not made_for or any(_is(run.model, model) for model in made_for.values()):
        return {}
    taken: dict[str, int] = run.size.get("taken", {})
    return taken


def column_backbones(run: Run) -> dict[str, Model]:
    """The backbones that the sizes of a run's column were made for, by their names in conf/model."""
    return {name: _preset(name) for name in run.size.get("of", ())} if isinstance(run.size, dict) else {}


@cache
def _preset(name: str) -> Model:
    preset = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")
    apart = {"sizes": ""}  # which refers to a task, of which there is none here
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Model), preset, apart))
    assert isinstance(merged, Model)
    return merged


def _is(model: Model, other: Model) -> bool:
    """Whether two configs name one backbone, without looking into it."""
    if model.path is None or other.path is None:
        return model.path == other.path and model.hub_id == other.hub_id
    return Path(model.path).expanduser().resolve() == Path(other.path).expanduser().resolve()
