"""What Hydra composes a run from: conf/, the user's own groups, the schema and the rows of the paper's tables.

Hydra reads each file again for every config, and composes its own config beside each: 300 ms for a run. Here a file of
conf/, which does not change while a process runs, is read once, and Hydra's own config is left out where nothing asks
for it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from peftbench.config.rows import GROUP, read_rows
from peftbench.config.schema import Run, find_conf_dir
from peftbench.config.sizes import select_column
from peftbench.config.yaml_files import load_packaged

CONFIG_NAME = "train"


class _Shared(dict[str, Any]):
    """The content of ConfigStore, which is not copied with it.

    Hydra copies all of its sources for each config that it composes and for each group that it lists, which would take
    longer than everything else. It copies what it loads from a source anyway.
    """

    def __deepcopy__(self, memo: object) -> _Shared:
        return self


class _ConfSource(FileConfigSource):
    """The folder conf/."""

    @staticmethod
    def scheme() -> str:
        return "conf"

    def load_config(self, config_path: str) -> ConfigResult:
        copied: ConfigResult = pickle.loads(_read(self.provider, self.path, config_path))  # Hydra changes it
        return copied


@cache
def _read(provider: str, folder: str, config_path: str) -> bytes:
    """Return a pickled config, of which a copy is made faster than by deepcopy."""
    file = Path(folder, FileConfigSource._normalize_file_name(config_path))
    if not file.is_file():
        return pickle.dumps(FileConfigSource(provider, folder).load_config(config_path))  # which says so
    text = file.read_text(encoding="utf-8")
    header = FileConfigSource._get_header_dict(text[:512])
    return pickle.dumps(ConfigResult(provider, f"{_ConfSource.scheme()}://{folder}", load_packaged(file), header))


Plugins.instance().register(_ConfSource)


def _store_configs() -> None:
    """Register with Hydra what has no config file: the schema and the rows of the paper's tables."""
    store = ConfigStore.instance()
    store.repo = _Shared(store.repo)
    store.store("schema", Run)
    for name, row in read_rows().items():
        store.store(name, row.config, group=GROUP, package="_global_")


_store_configs()
OmegaConf.register_new_resolver("column", select_column, replace=True)


@contextmanager
def open_hydra(config_dir: str | None) -> Iterator[None]:
    """Provide Hydra's compose API over conf/ and the user's --config-dir, and clear it afterwards for hydra.main.

    `initialize_config_dir`, the public way, takes only one folder.
    """
    search_path = create_config_search_path(f"{_ConfSource.scheme()}://{find_conf_dir()}")
    if config_dir is not None:
        search_path.prepend("command-line", f"file://{Path(config_dir).resolve()}", anchor="schema")
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    Hydra.create_main_hydra2("peftbench", search_path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


class _RunsAlone(CachingConfigRepository):
    """The configs of a Hydra that is open, without what they say of Hydra itself."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        is_known = f"config_path={config_path}" in self.cache
        found = super().load_config(config_path)
        if found is not None and not is_known and isinstance(found.config, DictConfig):
            if "hydra" in found.config:
                found.config.pop("hydra")
            own = found.defaults_list or []
            found.defaults_list = [one for one in own if not str(getattr(one, "group", "")).startswith("hydra/")]
        return found


def compose_alone(groups: Sequence[str]) -> DictConfig:
    """Return what `hydra.compose` returns, in half the time: Hydra's own config, which that drops, is not made.

    Args:
        groups: overrides of groups, none of which is Hydra's own.

    Raises:
        Exception: any, where `hydra.compose` raises one, which is about the same fault, and more readable.
    """
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    configs = _RunsAlone(loader.repository)
    chosen = create_defaults_list(
        repo=configs,
        config_name=CONFIG_NAME,
        overrides_list=OverridesParser.create().parse_overrides(list(groups)),
        prepend_hydra=False,
        skip_missing=False,
    )
    assert not chosen.config_overrides  # those are for keys
    composed = loader._compose_config_from_defaults_list(defaults=chosen.defaults, repo=configs)
    OmegaConf.set_struct(composed, True)
    return composed
