"""torch.compile, layer by layer.

The repeated layers of a backbone share their code, so that two graphs a stack serve all of them: one for the first
layer, whose input needs no gradient, and one for the others. Hooks and the registered attention function are traced
with the layer they belong to. Only training runs the compiled layers: an evaluation has other shapes, a cache, and no
gradients, and would compile everything anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx.experimental import _config as shapes
from transformers import PreTrainedModel

from peftbench.sites import find_sites
from peftbench.training.hashed_dropout import with_hashed_dropout

# Of a layer's code in one process: stacks x with or without a gradient at the input x shapes that are no free ones, for
# each method of a sweep.
VARIANTS = 256


@cache
def _backend(graphs: bool) -> Callable[..., Any]:
    """Inductor: one object, since code is compiled anew for another one, in each layer and in each run of a sweep."""
    return partial(compile_fx, config_patches=list_mode_options("reduce-overhead") if graphs else {})


class CompiledLayers:
    """The layers of `model`, which run compiled inside `active` and as they are outside.

    Args:
        graphs: replay CUDA graphs, which saves small backbones the launch of each kernel; every shape of a batch is
            then a graph of its own.
        backend: of torch.compile; None: its own. It is given graphs whose dropouts are `hashed_dropout`'s.
    """

    def __init__(
        self, model: PreTrainedModel, *, graphs: bool = False, backend: Callable[..., Any] | None = None
    ) -> None:
        self.layers: Sequence[nn.Module] = [layer.module for layer in find_sites(model).layers]
        self.graphs = graphs
        rewriting = with_hashed_dropout(backend or _backend(graphs))
        self.calls: list[Callable[..., Any]] = []
        for layer in self.layers:
            layer.compile(backend=rewriting, dynamic=not graphs)
            self.calls.append(layer._compiled_call_impl)  # type: ignore[arg-type]  # None until compile is called
        self._set(active=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the layers compiled."""
        self._set(active=True)
        if self.graphs:
            compiler: Any = torch.compiler
            compiler.cudagraph_mark_step_begin()
        settings: Any = shapes
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        try:
            # Without duck shapes a width that happens to equal the batch size or a layer's width is no case of its own.
            with torch._dynamo.config.patch({limit: VARIANTS}), settings.patch(use_duck_shape=False):
                yield
        finally:
            self._set(active=False)

    def _set(self, *, active: bool) -> None:
        """torch offers no way to take `Module.compile` back: what it sets is this attribute."""
        for layer, call in zip(self.layers, self.calls, strict=True):
            layer._compiled_call_impl = call if active else None
