"""What a run has trained, as a file: fold, save and load.

A checkpoint holds only the trained tensors (modifications, task head, unfrozen backbone parameters) under their names
in the model, as safetensors, and what was neither trained nor came with the backbone: a task head that stayed as it
was drawn. The prefix's MLP is folded away first: what is stored is the prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.reparameterization import PrefixMLP
from peftbench.utils.errors import UserError

FILE_NAME = "adapter.safetensors"


def bottlenecks(model: nn.Module) -> list[Bottleneck]:
    """Every functional form attached to the model."""
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def fold(model: nn.Module) -> None:
    """Replace every prefix's MLP by the prefix that it makes. The model computes what it computed before."""
    for bottleneck in bottlenecks(model):
        bottleneck.fold()


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Inside the block prefixes are plain tensors, so that a long generation does not run their MLP at every step;
    afterwards the MLPs are back, untouched."""
    generators: list[tuple[Bottleneck, PrefixMLP]] = []
    try:
        for bottleneck in bottlenecks(model):
            if bottleneck.generator is not None:
                generators.append((bottleneck, bottleneck.generator))
                bottleneck.fold()
        yield
    finally:
        for bottleneck, generator in generators:
            bottleneck.generator, bottleneck.down, bottleneck.up = generator, None, None


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name and value of each tensor that is trained; fold first for the stored form."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(model: nn.Module, folder: Path, untrained: Collection[str] = ()) -> None:
    """Write the trained tensors of a folded model to `folder`.

    Args:
        untrained: names of parameters that the backbone's files do not have, as `attach` takes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(_needed(model, untrained), folder / FILE_NAME)


def size(folder: Path) -> int:
    """Bytes of what `save` wrote."""
    return (folder / FILE_NAME).stat().st_size


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors, from any device, as safetensors. Raises OSError where the disk is full.

    By way of bytes: safetensors' own writing gives a file that nobody else may read, and an error of its own.
    """
    path.write_bytes(serialised({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load(model: nn.Module, folder: Path, untrained: Collection[str] = ()) -> None:
    """Read what `save` wrote into a model to which the same modifications are attached. Folds the model.

    Args:
        untrained: as `save` was given it.

    Raises:
        UserError: the file is missing, or its names or shapes are not the model's.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} is missing; a finished run keeps its trained tensors there.")
    fold(model)
    read_tensors(model, path, untrained)


@torch.no_grad()
def read_tensors(model: nn.Module, path: Path, untrained: Collection[str] = ()) -> None:
    """Read the trained tensors of `model`, as it stands, and the `untrained` ones from a file that holds just these.

    Raises:
        UserError: the file's names or shapes are not the model's.
    """
    saved = load_file(path)
    trained = _needed(model, untrained)
    if saved.keys() != trained.keys():
        odd = sorted(saved.keys() ^ trained.keys())
        raise UserError(
            f"{path} was trained with other settings: {len(odd)} tensors stand on one side only, such as {odd[0]}."
        )
    for name, parameter in trained.items():  # all of them before the first is changed
        if parameter.shape != saved[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, the model wants {tuple(parameter.shape)}; "
                "attach it with the settings that it was trained with."
            )
    for name, parameter in trained.items():
        parameter.copy_(saved[name])


def _needed(model: nn.Module, untrained: Collection[str]) -> dict[str, nn.Parameter]:
    """What of the model is nowhere but in a checkpoint."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad or name in untrained}
