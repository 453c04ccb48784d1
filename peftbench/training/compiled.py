"""torch.compile, layer by layer.

The repeated layers of a backbone share their code, so that two graphs per stack serve all of them: one for the first
layer, whose input needs no gradient, and one for the others. Hooks and the registered attention function are traced
with the layer that they belong to. Only training runs the compiled layers: an evaluation has other shapes, a cache and
no gradients, and would compile everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shapes
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_sites
from peftbench.training.hashed_dropout import add_hashed_dropout

# Versions of a layer's code in one process: stacks x with or without a gradient at the input x shapes that are not
# dynamic, for each method of a sweep.
VARIANTS = 256


class CompiledLayers:
    """The layers of `model`, which run compiled inside `active` and uncompiled outside.

    Args:
        backend: the backend of torch.compile, by default torch's inductor. Use one object for all runs of a process,
            because another object compiles all code again. Its graphs have the dropouts of `hashed_dropout`.
    """

    def __init__(self, model: PreTrainedModel, *, backend: Callable[..., Any] | None = None) -> None:
        self.layers: Sequence[nn.Module] = [layer.module for layer in find_sites(model).layers]
        rewriting = add_hashed_dropout(backend or _load_inductor())
        self.calls: list[Callable[..., Any]] = []
        for layer in self.layers:
            layer.compile(backend=rewriting, dynamic=True)
            self.calls.append(layer._compiled_call_impl)  # type: ignore[arg-type]  # None until compile is called
        self._set(active=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the layers compiled."""
        self._set(active=True)
        settings: Any = shapes
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        # A layer's scales and rates never change: `dynamic` would make them symbols, and trace them twice.
        tracing = torch._dynamo.config.patch({limit: VARIANTS, "specialize_float": True})
        try:
            # Without duck shapes, a width that happens to equal the batch size or a layer's width is not a special
            # case.
            with tracing, settings.patch(use_duck_shape=False):
                yield
        finally:
            self._set(active=False)

    def _set(self, *, active: bool) -> None:
        """Set the attribute that `Module.compile` sets: torch offers no way to undo that call."""
        for layer, call in zip(self.layers, self.calls, strict=True):
            layer._compiled_call_impl = call if active else None


def _load_inductor() -> Callable[..., Any]:
    """Return torch's inductor, whose import takes a second that a run without compiled layers need not wait."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx
