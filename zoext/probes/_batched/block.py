"""Runs a closure for several copies of a batch, in one of three ways.

- OBSERVED: at theta; finds out where the copies lie in what modules take and return.
- ALTERED: at theta; the outputs of the first copy are altered, so that only its loss may change.
- DISPLACED: each copy with its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from zoext._parameters import shards
from zoext._runtime.interrupts import Signals
from zoext._runtime.randomness import RandomState
from zoext.probes._batched import layers, places
from zoext.probes._batched.displacements import Displacements
from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._batched.places import Leaves
from zoext.probes._reads import ReadGuard


class Way(Enum):
    OBSERVED = "observed"
    ALTERED = "altered"
    DISPLACED = "displaced"


class Own(NamedTuple):
    """A weight that moves, and the module that has it."""

    holder: nn.Module
    name: str
    parameter: Tensor


class Observed:
    """What was seen of a module: where the copies lie in its tensors, by the dimensions of these."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[int, ...], tuple[int | None, ...]] = {}
        self.outputs: dict[tuple[int, ...], tuple[int | None, ...]] = {}
        self.takes_rows = True  # whether a weight for each row gives the same, see layers.is_rms_norm


class Block:
    """The closure of one batched forward.

    Args:
        root: the model.
        observed: what is known of each module; extended in ``Way.OBSERVED``.
        copies: how many copies, C.
        way: see above.
        weights: of the copies; None in the other ways.
        signals: are deferred while a module runs, whose weights may be others for that time.
        guard: sees reads of the weights that move, except by the module that owns them; None to see none.

    Attributes:
        visited: the modules that ran.
        is_unknown: whether a module took tensors of another kind than before.
        spread: the modules whose input all copies share, so that their output is made for each example.
        gathered: the names of weights that FSDP2 gathered for their modules, by their ids.
        running: the ids of those of the modules that run.
    """

    def __init__(
        self,
        root: nn.Module,
        observed: dict[nn.Module, Observed],
        copies: int,
        way: Way,
        signals: Signals,
        weights: Displacements | None = None,
        guard: ReadGuard | None = None,
    ) -> None:
        self.copies = copies
        self.way = way
        self.visited: set[nn.Module] = set()
        self.is_unknown = False
        self.spread: list[nn.Module] = []
        self.gathered: dict[int, str] = {}
        self.running: set[int] = set()
        self._observed = observed
        self._root = root
        self._weights = weights
        self._guard = guard
        self._signals = signals
        self._rows: int | None = None  # examples of all copies
        self._depth: set[nn.Module] = set()
        self._one: int | None = None  # the copy that a module above runs by itself

    def begin_root(self, args: Any, kwargs: Any) -> None:
        """Notes how many examples the model takes."""
        tensors = _tensors_of((args, kwargs))
        sizes = [len(tensor) for tensor in tensors if tensor.dim() and len(tensor) % self.copies == 0]
        if self._rows is None and sizes:
            self._rows = sizes[0]

    def run(self, module: nn.Module, own: list[Own], forward: layers.Forward, args: Any, kwargs: Any) -> Any:
        """A call of a module that owns displaced weights, ``own``."""
        if module in self._depth:  # a recursive call
            return forward(*args, **kwargs)
        if torch.is_grad_enabled():
            raise BatchedProbeError(
                f"{self.name(module)} runs with gradients enabled, whose derivatives would be those at theta"
            )
        self.visited.add(module)
        self._depth.add(module)
        parameters = [each.parameter for each in own]
        if self._guard is not None:
            self._guard.release(parameters)
        try:
            with self._signals.held():
                if not any(map(shards.is_distributed, parameters)):
                    return self._run(module, parameters, forward, args, kwargs)
                return self._run_gathered(module, own, forward, args, kwargs)
        finally:
            self._depth.discard(module)
            if self._guard is not None:
                self._guard.guard(parameters)

    def _run_gathered(
        self, module: nn.Module, own: list[Own], forward: layers.Forward, args: Any, kwargs: Any
    ) -> Any:
        """A call of a module whose sharded weights FSDP2 has gathered."""
        whole = [each.holder._parameters[each.name] for each in own]
        pairs = []
        for each, weight in zip(own, whole, strict=True):
            if weight is None or shards.is_distributed(weight):
                raise BatchedProbeError(f"{self.name(module)}.{each.name} is sharded while its module runs")
            self.gathered[id(weight)] = f"{self.name(module)}.{each.name}"
            pairs.append((weight, each.parameter))
        weights: list[Tensor] = [weight for weight, _ in pairs]
        self.running.update(map(id, weights))
        try:
            with self._weights.gathered(pairs) if self._weights is not None else nullcontext():
                return self._run(module, weights, forward, args, kwargs)
        finally:
            self.running.difference_update(map(id, weights))

    def _run(
        self, module: nn.Module, own: list[Tensor], forward: layers.Forward, args: Any, kwargs: Any
    ) -> Any:
        if self._one is not None:
            return self._of_one_copy(own, self._one, partial(forward, *args, **kwargs))
        seen = self._observed.setdefault(module, Observed())
        if self.way is Way.DISPLACED and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            key: tuple[int, ...] = (args[0].dim(),)
            known = seen.inputs.get(key)
            layer = self._layer_of(module, seen, key)
            if known == (0,) and layer is not None:  # as nearly always
                return layer(self._weights_of(), module, forward, args[0])
        leaves = Leaves((args, kwargs), partial(self._input_of, module))
        key = tuple(tensor.dim() for tensor in leaves.tensors)
        if self.way is Way.OBSERVED:
            return self._observe(module, seen, key, leaves, forward, args, kwargs)
        if key not in seen.inputs:
            self.is_unknown = self.copies > 1
            dims: tuple[int | None, ...] = tuple(
                0 if tensor.dim() and len(tensor) % self.copies == 0 else None for tensor in leaves.tensors
            )
        else:
            dims = seen.inputs[key]
        if all(dim is None for dim in dims):
            self.spread.append(module)
            spread = leaves.map(lambda tensor, _: self._spread(tensor), dims)
            leaves = Leaves(spread, partial(self._input_of, module))
            dims = (0,) * len(dims)
            outputs: tuple[int | None, ...] | None = None
            args, kwargs = leaves.with_tensors(leaves.tensors)
        else:
            outputs = seen.outputs.get(key)
        if self.way is Way.ALTERED:
            return self._altered(module, forward(*args, **kwargs), outputs)
        return self._displaced(module, own, seen, leaves, dims, outputs, forward)

    def _layer_of(self, module: nn.Module, seen: Observed, key: tuple[int, ...]) -> layers.Layer | None:
        if None in seen.outputs.get(key, ()):
            return None
        layer = layers.layer_of(module)
        return None if layer is layers.rms_norm and not seen.takes_rows else layer

    def _weights_of(self) -> Displacements:
        assert self._weights is not None  # in Way.DISPLACED
        return self._weights

    def _input_of(self, module: nn.Module) -> str:
        return f"the input of {self.name(module)}"

    def _output_of(self, module: nn.Module) -> str:
        return f"the output of {self.name(module)}"

    def name(self, module: nn.Module) -> str:
        """The name of a module in the model."""
        names = (name for name, part in self._root.named_modules() if part is module)
        return next(names, "") or type(module).__name__

    def _spread(self, tensor: Tensor) -> Tensor:
        """A tensor that all examples share, for each of them: its rows along a new first dimension."""
        rows = self._rows or self.copies
        if tensor.dim() and len(tensor) == 1:
            tensor = tensor[0]
        return tensor.expand(rows, *tensor.shape)

    def _observe(
        self,
        module: nn.Module,
        seen: Observed,
        key: tuple[int, ...],
        leaves: Leaves,
        forward: layers.Forward,
        args: Any,
        kwargs: Any,
    ) -> Any:
        output = forward(*args, **kwargs)
        if key in seen.inputs:
            return output
        if not leaves.tensors:
            raise BatchedProbeError(f"{self.name(module)} takes no tensor, so its output has no copies")
        found = tuple(places.find(tensor, self.copies) for tensor in leaves.tensors)
        seen.inputs[key] = found
        if any(dim is not None for dim in found):
            if layers.keeps_places(module):  # whose output may be large, as logits are
                seen.outputs[key] = found[:1]
            else:
                out = Leaves(output, partial(self._output_of, module))
                seen.outputs[key] = tuple(places.find(tensor, self.copies) for tensor in out.tensors)
            if self._rows is None and found[0] == 0:
                self._rows = len(leaves.tensors[0])
            if layers.is_rms_norm(module) and found[0] == 0:
                seen.takes_rows = seen.takes_rows and self._takes_rows(module, forward, leaves, output)
        return output

    def _takes_rows(self, module: nn.Module, forward: layers.Forward, leaves: Leaves, output: Any) -> bool:
        if len(leaves.tensors) != 1 or not isinstance(output, Tensor) or leaves.tensors[0].dim() < 2:
            return False
        weight = module._parameters["weight"]
        assert weight is not None
        values = weight.detach().unsqueeze(0).expand(self.copies, -1)
        try:
            tried = layers.with_rows(module, forward, leaves.tensors[0], values)
        except RuntimeError:
            return False
        return tried.shape == output.shape and bool((tried == output).all())

    def _altered(self, module: nn.Module, output: Any, dims: tuple[int | None, ...] | None) -> Any:
        """The output, with that of the first copy changed beyond any rounding."""
        leaves = Leaves(output, partial(self._output_of, module))
        known = dims if dims is not None else (0,) * len(leaves.tensors)

        def alter(tensor: Tensor, dim: int | None) -> Tensor:
            if not tensor.is_floating_point() or not tensor.dim():
                return tensor
            if dim is None:
                self.spread.append(module)
                tensor, dim = self._spread(tensor), 0
            tensor = tensor.clone()
            first = tensor.chunk(self.copies, dim)[0]
            first.copy_(0.5 - first)
            return tensor

        return leaves.map(alter, known)

    def _displaced(
        self,
        module: nn.Module,
        own: list[Tensor],
        seen: Observed,
        leaves: Leaves,
        dims: tuple[int | None, ...],
        outputs: tuple[int | None, ...] | None,
        forward: layers.Forward,
    ) -> Any:
        layer = self._layer_of(module, seen, tuple(tensor.dim() for tensor in leaves.tensors))
        if layer is not None and len(leaves.tensors) == 1 and dims[0] is not None:
            dim = dims[0]
            input = places.front(leaves.tensors[0], dim)
            return places.back(layer(self._weights_of(), module, forward, input), dim)
        if layer is layers.embedding and all(dim in (0, None) for dim in dims):
            args, kwargs = leaves.with_tensors(leaves.tensors)
            return layers.looked_up(self._weights_of(), module, partial(forward, *args, **kwargs))
        return self._copy_by_copy(module, own, leaves, dims, outputs, forward)

    def _of_one_copy(self, own: list[Tensor], copy: int, forward: Callable[[], Any]) -> Any:
        """A call within a module that runs copy by copy."""
        weights = self._weights_of()
        moving = [weight for weight in own if weights.moves(weight)]
        originals = [weight.data for weight in moving]
        try:
            for weight, displaced in zip(moving, weights.weights(moving), strict=True):
                weight.data = displaced[copy]
            return forward()
        finally:
            for weight, original in zip(moving, originals, strict=True):
                weight.data = original

    def _copy_by_copy(
        self,
        module: nn.Module,
        own: list[Tensor],
        leaves: Leaves,
        dims: tuple[int | None, ...],
        outputs: tuple[int | None, ...] | None,
        forward: layers.Forward,
    ) -> Any:
        weights = self._weights_of()
        moving = [weight for weight in own if weights.moves(weight)]
        values = weights.weights(moving)
        originals = [weight.data for weight in moving]
        devices = {weight.device for weight in moving}
        random = RandomState(*devices) if module.training and self.copies > 1 else None
        found = []
        try:
            for copy in range(self.copies):
                if random is not None and copy:  # each copy has the dropout masks of the first
                    random.restore()
                for weight, displaced in zip(moving, values, strict=True):
                    weight.data = displaced[copy]
                self._one = copy
                args, kwargs = leaves.map(partial(places.part_of, copy=copy, copies=self.copies), dims)
                found.append(forward(*args, **kwargs))
        finally:
            self._one = None
            for weight, original in zip(moving, originals, strict=True):
                weight.data = original
        what = partial(self._output_of, module)
        if outputs is None:
            outputs = (0,) * len(Leaves(found[0], what).tensors)
        return places.joined(found, outputs, what, (self._rows or self.copies) // self.copies)


def _tensors_of(structure: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(structure) if isinstance(leaf, Tensor)]
