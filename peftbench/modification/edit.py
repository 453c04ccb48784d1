"""One modification at one place of an unmodified model: h <- compose(h, f(read(h, x)), x).

An edit is a child module of the module whose output (or input) it changes, and its hooks are its own bound methods.
Therefore deepcopy, pickling and state_dict treat it like any other part of the model. Hooks are only put on leaf
modules (Linear, Conv1D, Dropout, LayerNorm), because these take one tensor and return one in every family.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from peftbench.backbones.sites import Part
from peftbench.modification.functional_form import FunctionalForm
from peftbench.modification.insertion import InsertionForm


class Modifier(nn.Module):
    """The four axes at one site: a functional form, an insertion form and a composition, at the representation h.

    Args:
        function: f, the functional form.
        insertion: selects what f reads from (h, x).
        composition: how h and Δh are combined.
    """

    def __init__(self, function: FunctionalForm, insertion: InsertionForm, composition: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.insertion = insertion
        self.composition = composition
        self.quick: Callable[[Tensor, Tensor], Tensor] | None = None  # the same in fewer operations; see inference.py

    def modify(self, h: Tensor, x: Tensor) -> Tensor:
        """Return the modified h, with the shape and dtype of h."""
        if self.quick is not None:
            return self.quick(h, x)
        seen = self.insertion(h, x)
        modified: Tensor = self.composition(h, self.function(seen), seen)
        return modified


class Edit(Modifier):
    """A modification of a leaf module's output or input, of shape (..., width).

    `attach` puts it on `target`. If x is not the target's own input, it is the input of `source`, which runs before the
    target in the same layer: `read` keeps x until `edit_output` or `edit_input` takes it.
    """

    _x: Tensor | None = None
    part: Part | None = None

    def attach(self, name: str, target: nn.Module, source: nn.Module, at: str, part: Part | None = None) -> None:
        """Become `target.<name>` and hook onto the target's `output` or `input`.

        With a `part`, become `target.<part>.<name>` and change only that slice of the output.
        """
        holder = target
        if part is not None:
            if not hasattr(target, part.name):
                target.add_module(part.name, nn.ModuleDict())
            holder = target.get_submodule(part.name)
        holder.add_module(name, self)
        self.part = part
        self.own_input = source is target
        if not self.own_input:
            source.register_forward_pre_hook(self.read)
        if at == "output":
            target.register_forward_hook(self.edit_output)
        else:
            target.register_forward_pre_hook(self.edit_input)

    def read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep x (forward pre-hook of the source)."""
        self._x = args[0]

    def edit_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Modify the target's output h, or a slice of it (forward hook of the target)."""
        return self.change(output, args[0] if self.own_input else self._take())

    def change(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the output with h, all of it or a slice, modified."""
        if self.part is None:
            return self.modify(output, x)
        return self.part.put(output, self.modify(self.part.take(output), x))

    def edit_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Modify the target's input h (forward pre-hook of the target)."""
        return (self.modify(args[0], args[0] if self.own_input else self._take()),)

    def _take(self) -> Tensor:
        assert self._x is not None, "the source module of a site must run before its target"
        x, self._x = self._x, None  # released at once: it would keep the graph of the whole layer alive
        return x


class SublayerDropout(nn.Dropout):
    """A layer's functional dropout as a module, so that Δh can be added after it.

    BART's layers call F.dropout on a sub-layer's output, and the paper's code adds the FFN's Δh after that
    (modeling_bart.py at 3222ce2, lines 460-479). The layer's own rate is set to 0. This module, hooked onto the
    sub-layer's last Linear, draws the same random numbers in the same order.
    """

    def drop(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Apply the dropout (forward hook of the sub-layer's last Linear). Calls __call__, so that edits of this module
        run."""
        dropped: Tensor = self(output)
        return dropped
