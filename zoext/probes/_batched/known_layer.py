"""The forward of a layer of which everything is known, as nearly all are in nearly all steps."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from zoext.probes._batched import layers
from zoext.probes._batched.displacements import Displacements
from zoext.probes._batched.observed import Own
from zoext.probes._reads import ReadGuard


class Block(Protocol):
    """The closure that the layer runs in."""

    visited: set[nn.Module]
    guard: ReadGuard

    @property
    def weights(self) -> Displacements: ...

    def takes(self, input: Any, dims: set[int]) -> bool: ...

    def run(
        self, module: nn.Module, own: list[Own], forward: layers.Forward, args: Any, kwargs: Any
    ) -> Any: ...


class KnownLayer:
    """The forward of a layer of a known kind, which swaps nothing, so that nothing has to be restored.

    A class, since the variables of a function would be ten objects for each layer in every step.
    """

    __slots__ = ("_block", "_dims", "_forward", "_layer", "_module", "_own", "_parameters")

    def __init__(
        self,
        block: Block,
        module: nn.Module,
        own: list[Own],
        forward: layers.Forward,
        layer: layers.Layer,
        dims: set[int],
        parameters: list[Tensor],
    ) -> None:
        self._block, self._module, self._own = block, module, own
        self._forward, self._layer, self._dims, self._parameters = forward, layer, dims, parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block, module = self._block, self._module
        if kwargs or len(args) != 1 or not block.takes(args[0], self._dims):
            return block.run(module, self._own, self._forward, args, kwargs)
        block.visited.add(module)
        block.guard.release(self._parameters)
        try:
            return self._layer(block.weights, module, self._forward, args[0])
        finally:
            block.guard.guard(self._parameters)
