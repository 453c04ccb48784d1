"""The trained tensors of a run as a file: fold, save and load.

A checkpoint is a safetensors file. It holds the trained tensors (modifications, task head, unfrozen backbone
parameters) under their names in the model, and the tensors that were neither trained nor part of the backbone's files:
a task head that stayed at its random initialisation. The prefix's MLP is folded away first: the file stores the prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

from peftbench.modification.functional_form import Bottleneck
from peftbench.modification.peft_method import list_added
from peftbench.modification.reparameterization import PrefixMLP
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_bytes

FILE_NAME = "adapter.safetensors"


def list_bottlenecks(model: nn.Module) -> list[Bottleneck]:
    """Return every functional form attached to the model."""
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def fold(model: nn.Module) -> None:
    """Replace every prefix's MLP by the prefix that it computes. The model's output does not change."""
    for bottleneck in list_bottlenecks(model):
        bottleneck.fold()


@contextmanager
def fold_tensors(model: nn.Module) -> Iterator[None]:
    """Inside the block prefixes are plain tensors, so that a long generation does not run their MLP at every step;
    afterwards the MLPs are restored, unchanged."""
    generators: list[tuple[Bottleneck, PrefixMLP]] = []
    try:
        for bottleneck in list_bottlenecks(model):
            if bottleneck.generator is not None:
                generators.append((bottleneck, bottleneck.generator))
                bottleneck.fold()
        yield
    finally:
        for bottleneck, generator in generators:
            bottleneck.generator, bottleneck.down, bottleneck.up = generator, None, None


def list_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by name. Fold the model first to get the stored form."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(model: nn.Module, folder: Path, untrained: Collection[str] = ()) -> None:
    """Write the trained tensors of a folded model to `folder`.

    Args:
        untrained: names of parameters that the backbone's files do not have, as `attach` takes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(list_needed(model, untrained), folder / FILE_NAME)


def size(folder: Path) -> int:
    """Return the size in bytes of the file that `save` wrote."""
    return (folder / FILE_NAME).stat().st_size


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors, from any device, as safetensors. Raises OSError if the disk is full.

    They are converted to bytes first: safetensors' own writing creates a file that no other user may read, and raises
    its own kind of error.
    """
    write_bytes(path, serialised({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load(model: nn.Module, folder: Path, untrained: Collection[str] = ()) -> None:
    """Read the file that `save` wrote into a model to which the same modifications are attached. Folds the model.

    Args:
        untrained: the same as for `save`.

    Raises:
        UserError: the file is missing, or its names or shapes do not match the model's.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} is missing; a finished run stores its trained tensors there.")
    fold(model)
    read_tensors(model, path, untrained)


@torch.no_grad()
def read_tensors(model: nn.Module, path: Path, untrained: Collection[str] = ()) -> None:
    """Read the trained tensors of `model`, in its present form, and the `untrained` ones from a file with just these.

    Raises:
        UserError: the file is damaged, or its names or shapes do not match the model's.
    """
    saved = load_tensors(path)
    trained = list_needed(model, untrained)
    if saved.keys() != trained.keys():
        odd = sorted(saved.keys() ^ trained.keys())
        raise UserError(
            f"{path} was trained with other settings: {len(odd)} tensors are only in the file or only in the model, "
            f"such as {odd[0]}."
        )
    for name, parameter in trained.items():  # check all shapes before the first tensor is changed
        if parameter.shape != saved[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, but the model needs {tuple(parameter.shape)}; "
                "attach it with the settings that it was trained with."
            )
    for name, parameter in trained.items():
        parameter.copy_(saved[name])


def list_needed(model: nn.Module, untrained: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of the model that are stored nowhere but in a checkpoint: those that are trained, the
    `untrained` ones, and all that peft added, of which some methods have frozen parts."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad or name in untrained}
    return {**own, **list_added(model)}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises UserError if it is missing or damaged."""
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} is damaged ({reason}); restore the file, or train the run again with rerun=true."
        ) from error
    return found
