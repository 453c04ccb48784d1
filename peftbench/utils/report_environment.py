"""What a bug report needs to say about a machine: versions, devices, caches and settings of the environment."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

import peftbench
from peftbench.utils.cache_dir import find_cache_dir

Section = dict[str, str]

# Variables that change what the libraries do. A value that may be a secret is not shown.
VARIABLES = re.compile(
    r"(PEFTBENCH|HF|HUGGINGFACE|TRANSFORMERS|DATASETS|TORCH|PYTORCH|CUDA|NVIDIA|NCCL|OMP|MKL|TOKENIZERS|WANDB|MLFLOW)_\w+"
)
SECRETS = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
ABSENT = "not installed"


def describe_environment(git: dict[str, Any] | None = None) -> dict[str, Section]:
    """Return lines by section. The home folder is written as ~, and of secrets it is only said that they are set.

    Args:
        git: the state of the checkout, `{"commit": ..., "dirty": ...}`; None if there is none.
    """
    found = {"peftbench": _describe_package(git), "packages": dict(_list_packages(None))}
    for extra in _list_extras():
        found[f"extra {extra}"] = dict(_list_packages(extra))
    return {
        **found,
        "machine": _describe_machine(),
        "devices": _describe_devices(),
        "folders": dict(_describe_folders()),
        "variables": dict(_list_variables()),
    }


def _describe_package(git: dict[str, Any] | None) -> Section:
    changed = "" if git is None else " with changes" if git["dirty"] else ""
    return {
        "version": peftbench.__version__,
        "commit": "no checkout" if git is None else f"{git['commit']}{changed}",
        "location": _shorten(Path(peftbench.__file__).parent),
    }


def _read_requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires("peftbench") or []]
    except metadata.PackageNotFoundError:  # it runs from a folder
        return []


def _list_extras() -> list[str]:
    try:
        return metadata.metadata("peftbench").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []


def _list_packages(extra: str | None) -> Iterator[tuple[str, str]]:
    """Yield the packages that peftbench needs, or that an extra of it needs, with their versions."""
    for requirement in _read_requirements():
        belongs = {"extra": extra or ""}
        if requirement.marker is not None and not requirement.marker.evaluate(belongs):
            continue
        if (extra is None) == (requirement.marker is None or "extra" not in str(requirement.marker)):
            yield requirement.name, _find_version(requirement)


def _find_version(requirement: Requirement) -> str:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return ABSENT
    fits = requirement.specifier.contains(version, prereleases=True)
    return version if fits else f"{version}, but peftbench needs {requirement.specifier}"


def _describe_machine() -> Section:
    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "processor": f"{platform.processor() or platform.machine()}, {_count_cores()} cores",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
    }


def _count_cores() -> int:
    """Return how many cores this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe_devices() -> Section:
    import torch

    found = {
        "torch": f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}",
        "threads": str(torch.get_num_threads()),
    }
    if not torch.cuda.is_available():
        return {**found, "GPU": "none that torch can use"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        found[f"GPU {index}"] = f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"
    found["bfloat16"] = "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    found["MPS daemon"] = _shorten(shutil.which("nvidia-cuda-mps-control") or ABSENT)
    return found


def _describe_folders() -> Iterator[tuple[str, str]]:
    from datasets import config as datasets_config
    from huggingface_hub import constants

    places = {
        "hub cache": constants.HF_HUB_CACHE,
        "data set cache": datasets_config.HF_DATASETS_CACHE,
        "peftbench's cache": find_cache_dir(),
        "here": Path.cwd(),
    }
    for name, place in places.items():
        folder = Path(place)
        there = folder if folder.exists() else next(parent for parent in folder.absolute().parents if parent.exists())
        free = f"{shutil.disk_usage(there).free / 2**30:.1f} GiB free"
        access = "" if os.access(there, os.W_OK) else ", not writable"
        yield name, f"{_shorten(folder)}: {free}{access}" + ("" if folder.exists() else ", does not exist yet")


def _list_variables() -> Iterator[tuple[str, str]]:
    for name in sorted(filter(VARIABLES.fullmatch, os.environ)):
        yield name, "set (not shown)" if SECRETS.search(name) else _shorten(os.environ[name])


def _shorten(place: object) -> str:
    """Return a path, or a text with paths, with ~ for the home folder, whose name may be that of a person."""
    home = os.path.expanduser("~")
    return str(place) if home == os.sep else re.sub(rf"{re.escape(home)}(?=$|[/\\:;,])", "~", str(place))
