"""Where the runs of a sweep are trained: `hydra/launcher=NAME`, and its settings `hydra.launcher.KEY=`.

A preset is a file of conf/hydra/launcher, or of the user's own folder. Those with a `kind` are peftbench's: the kind
names the dataclass of their settings. Those without are plugins of Hydra.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftbench.config.compose import check_config_dir, describe_unknown_option, refuse_searchpath
from peftbench.config.conf_sources import CONFIG_NAME, open_hydra
from peftbench.config.overrides import describe_error, parse_overrides, set_key
from peftbench.utils.errors import UserError, describe_unknown

GROUP = "hydra/launcher"
KEYS = "hydra.launcher"
SWEEPER = "hydra/sweeper="


def _require_at_least(settings: Slurm | Ray, least: dict[str, float]) -> None:
    """Raise UserError for each number that is lower than is possible, or is none."""
    found = []
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value is not None and not lowest <= value < math.inf:
            found.append(f"{KEYS}.{name}={value:g}: it must be a number of at least {lowest:g}.")
    if found:
        raise UserError(*found)


@dataclass
class Local:
    """Runs on this machine: one after another, or `jobs` at once."""

    kind: str = "local"


@dataclass
class Slurm:
    """Runs as tasks of Slurm's job arrays, which submitit submits."""

    kind: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: str | None = None
    cpus: int = 4
    memory: str | None = None
    time: str = "4:00:00"
    timeouts: int = 10
    signal_s: int = 120
    at_once: int | None = None
    poll_s: float = 15.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = [self.partition, self.account, self.qos, self.gpus, self.memory, *self.options, *self.options.values()]
        for text in texts:  # they become lines of a shell script
            if text is not None and not str(text).isprintable():
                raise UserError(f"{KEYS}: {str(text)!r} has control characters.")
        _require_at_least(self, {"cpus": 1, "timeouts": 0, "signal_s": 1, "at_once": 1, "poll_s": 0.01})
        if (limit := 60 * parse_minutes(self.time)) <= self.signal_s:
            raise UserError(
                f"{KEYS}.signal_s={self.signal_s} with {KEYS}.time={self.time}: a run would be told to stop when it "
                f"starts; give fewer than the {limit} seconds of its limit."
            )


@dataclass
class Ray:
    """Runs as tasks of a Ray cluster."""

    kind: str = "ray"
    address: str | None = None
    gpus: float | None = None
    cpus: float = 1.0
    resources: dict[str, float] = field(default_factory=dict)
    at_once: int | None = None
    restarts: int = 10
    runtime_env: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_at_least(self, {"gpus": 0, "cpus": 0, "at_once": 1, "restarts": 0})


def parse_minutes(time: str) -> int:
    """Return the minutes of a time as Slurm writes it: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS,
    DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS; parts of a minute count as one.

    Raises:
        UserError: it is none of these, or no time at all.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if all(part.isdecimal() for part in parts) and len(parts) <= 3 and (days.isdecimal() if dash else not days):
        numbers = [int(part) for part in parts]
        if dash:
            hours, minutes, seconds = [*numbers, 0, 0][:3]
        else:
            hours, minutes, seconds = [0, *numbers, 0] if len(numbers) == 1 else [*[0, *numbers][-3:]]
        total = int(days or 0) * 1440 + hours * 60 + minutes + -(-seconds // 60)
        if total > 0:
            return total
    raise UserError(f"{KEYS}.time={time} is no time of Slurm; give minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS.")


@dataclass
class HydraLauncher:
    """A launcher of one of Hydra's plugins."""

    name: str  # as typed
    words: list[str] = field(default_factory=list)  # the overrides that configure it
    config_dir: str | None = None


KINDS: dict[str, type] = {"local": Local, "slurm": Slurm, "ray": Ray}
TYPED = ("runtime_env",)  # settings that can run a command, and so come from no file


def read_launcher(words: Sequence[str], config_dir: str | None = None) -> tuple[list[str], Any]:
    """Take the words that say where runs are trained out of a command line.

    With `hydra/sweeper=`, Hydra itself reads all words.

    Args:
        config_dir: a folder with the user's own groups.

    Returns:
        The other words; and a dataclass of `KINDS`, a `HydraLauncher`, or None if no launcher was asked for.

    Raises:
        UserError: the launcher, or a setting of it, is unknown.
    """
    own = [word for word in words if word.lstrip("+~").startswith((f"{GROUP}=", f"{KEYS}."))]
    if not own or any(word.startswith(SWEEPER) for word in words):
        return list(words), None
    if config_dir is not None:
        check_config_dir(Path(config_dir))
    refuse_searchpath(words)
    rest = [word for word in words if word not in own]
    names = list(dict.fromkeys(word.partition("=")[2] for word in own if word.startswith(f"{GROUP}=")))
    settings = [word for word in own if not word.startswith(f"{GROUP}=")]
    if not names:
        raise UserError(f"{settings[0]} is a setting of a launcher; name it, as in {GROUP}=slurm.")
    if len(names) > 1 or "," in names[0]:
        raise UserError(f"{GROUP}={','.join(names)}: a sweep has one launcher; give one.")
    (name,) = names
    with open_hydra(config_dir):
        loader = GlobalHydra.instance().config_loader()
        options = loader.get_group_options(GROUP)
        if name not in options:
            raise UserError(describe_unknown_option(GROUP, name, options))
        preset = loader.load_configuration(CONFIG_NAME, [f"{GROUP}={name}"], RunMode.MULTIRUN).hydra.launcher
        if "kind" not in preset:
            plugin = [word for word in rest if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
            rest = [word for word in rest if word not in plugin]
            return rest, HydraLauncher(name, [*own, *plugin], config_dir)
        try:
            return rest, _read_settings(name, preset, settings)
        except OmegaConfBaseException as error:  # a setting refers to something else
            raise UserError(describe_error(error)) from error


def _read_settings(name: str, preset: DictConfig, words: Sequence[str]) -> Any:
    """Return the settings of a preset with those of `words` in their place."""
    values = OmegaConf.to_container(preset, resolve=True)
    assert isinstance(values, dict)
    kind = str(values.pop("kind"))
    if kind not in KINDS:
        raise UserError(f"{GROUP}/{name}.yaml: {describe_unknown('kind', kind, KINDS)}")
    config = OmegaConf.create({"hydra": {"launcher": OmegaConf.structured(KINDS[kind])}})
    OmegaConf.set_struct(config, True)
    found = [
        f"{GROUP}/{name}.yaml: {fault}"
        for key, value in values.items()
        if (fault := set_key(config, f"{KEYS}.{key!s}", value))
    ]
    found += [f"{GROUP}/{name}.yaml: {key} is taken from the command line only." for key in TYPED if values.get(key)]
    for override in parse_overrides(words):
        if override.is_sweep_override():
            found.append(
                f"{override.input_line} names several values; a sweep has one launcher with one value of each setting."
            )
        elif fault := set_key(config, override.key_or_group, override.value(), force_add=override.is_add()):
            found.append(fault)
    if found:
        raise UserError(*found)
    return OmegaConf.to_object(config.hydra.launcher)
