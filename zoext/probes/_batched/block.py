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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from zoext._parameters import shards
from zoext._runtime.interrupts import Signals
from zoext._runtime.randomness import RandomState
from zoext.probes._batched import by_copy, layers, places, trials
from zoext.probes._batched.displacements import Displacements
from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._batched.known_layer import KnownLayer
from zoext.probes._batched.observed import Dims, Observed, Own, shapes_of, sizes_of, takes_rows
from zoext.probes._batched.places import Leaves
from zoext.probes._reads import ReadGuard


class Way(Enum):
    OBSERVED = "observed"
    ALTERED = "altered"
    DISPLACED = "displaced"


class Block:
    """The closure of one batched forward.

    Args:
        root: the model.
        observed: what is known of each module; extended in ``Way.OBSERVED``.
        copies: how many copies, C.
        way: see above.
        signals: are deferred while a module runs, whose weights may be others for that time.
        guard: sees reads of the weights that move, except by the module that owns them.
        weights: of the copies; None in the other ways.

    Attributes:
        visited: the modules that ran.
        outermost: those that were called within no other.
        unknown: the modules that took tensors of another kind than before.
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
        guard: ReadGuard,
        weights: Displacements | None = None,
    ) -> None:
        self.copies = copies
        self.way = way
        self.visited: set[nn.Module] = set()
        self.outermost: dict[nn.Module, None] = {}
        self.unknown: set[nn.Module] = set()
        self.spread: list[nn.Module] = []
        self.gathered: dict[int, str] = {}
        self.running: set[int] = set()
        self._observed = observed
        self._root = root
        self._weights = weights
        self.guard = guard
        self._signals = signals
        self._rows: int | None = None  # examples of all copies
        self._depth: set[nn.Module] = set()
        self._within = 0  # how many of the modules that may be outermost run
        self._one: int | None = None  # the copy that a module above runs by itself
        self._is_trying = False  # which arguments of a module above have copies

    @property
    def is_of_one_copy(self) -> bool:
        """Whether a module runs copy by copy, so that those within it take one copy."""
        return self._one is not None

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Called before the forward of a module that may be outermost: notes how many examples it takes."""
        self._within += 1
        if self._within > 1:
            return
        self.outermost[module] = None
        tensors = _tensors_of((args, kwargs))
        sizes = [len(tensor) for tensor in tensors if tensor.dim() and len(tensor) % self.copies == 0]
        self._rows = sizes[0] if sizes else self._rows

    def end(self) -> None:
        """Called after the forward of a module for which ``begin`` was called."""
        self._within -= 1

    def runner(self, module: nn.Module, own: list[Own], forward: layers.Forward) -> Callable[..., Any]:
        """What runs in place of the forward of a module that owns displaced weights, ``own``."""
        layer = layers.layer_of(module) if self.way is Way.DISPLACED else None
        seen = self._observed.get(module)
        if layer in layers.READING and seen is not None and seen.first_dims:
            parameters = [each.parameter for each in own]
            if not any(map(shards.is_distributed, parameters)):
                return KnownLayer(self, module, own, forward, layer, seen.first_dims, parameters)
        return lambda *args, **kwargs: self.run(module, own, forward, args, kwargs)

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
        self.guard.release(parameters)
        try:
            with self._signals.held():
                if not any(map(shards.is_distributed, parameters)):
                    return self._run(module, parameters, forward, args, kwargs)
                return self._run_gathered(module, own, forward, args, kwargs)
        finally:
            self._depth.discard(module)
            self.guard.guard(parameters)

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
        if self._is_trying:
            return forward(*args, **kwargs)
        if self._one is not None:
            return self._of_one_copy(own, self._one, partial(forward, *args, **kwargs))
        seen = self._observed.setdefault(module, Observed())
        leaves = Leaves((args, kwargs), partial(self._input_of, module))
        key = tuple(tensor.dim() for tensor in leaves.tensors)
        if self.way is Way.OBSERVED:
            return self._observe(module, seen, key, leaves, forward, args, kwargs)
        if key not in seen.inputs:
            self.unknown.update([module] if self.copies > 1 else ())
            dims: Dims = tuple(
                0 if tensor.dim() and len(tensor) % self.copies == 0 else None for tensor in leaves.tensors
            )
        else:
            dims = seen.inputs[key]
        if all(dim is None for dim in dims):
            self.spread.append(module)
            spread = leaves.map(lambda tensor, _: self._spread(tensor), dims)
            leaves = Leaves(spread, partial(self._input_of, module))
            dims = (0,) * len(dims)
            outputs: Dims | None = None
            args, kwargs = leaves.with_tensors(leaves.tensors)
        else:
            outputs = seen.outputs.get(key)
        if self.way is Way.ALTERED:
            if not self.spread and sizes_of(leaves.tensors, dims) not in seen.sizes:
                raise BatchedProbeError(
                    f"{self._input_of(module)} has more or fewer rows if the values before it are others, as "
                    "where experts or scores pick them: it is unknown which copy a row belongs to; "
                    "freeze it with requires_grad_(False)"
                )
            return self._altered(module, forward(*args, **kwargs), outputs)
        return self._displaced(module, own, seen, leaves, dims, outputs, forward)

    def _layer_of(self, module: nn.Module, seen: Observed, key: tuple[int, ...]) -> layers.Layer | None:
        if None in seen.outputs.get(key, ()):
            return None
        layer = layers.layer_of(module)
        return None if layer is layers.rms_norm and not seen.takes_rows else layer

    @property
    def weights(self) -> Displacements:
        """Those of the copies, in ``Way.DISPLACED``."""
        assert self._weights is not None
        return self._weights

    def takes(self, input: Any, dims: set[int]) -> bool:
        """Whether an input is a plain tensor of one of these dimensions, whose copies lie along the first."""
        return (
            type(input) is Tensor
            and input.dim() in dims
            and not len(input) % self.copies
            and self._one is None
            and not torch.is_grad_enabled()
        )

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
        random = RandomState(*{each.device for each in leaves.tensors}) if module.training else None
        output = forward(*args, **kwargs)
        taken = shapes_of(leaves.tensors)
        if taken in seen.shapes:
            return output
        if not leaves.tensors:
            raise BatchedProbeError(
                f"{self.name(module)} takes no tensor, so its output has no copies; "
                "freeze it with requires_grad_(False)"
            )
        is_plain = layers.keeps_places(module)  # whose output may be large, as logits are
        out = None if is_plain else Leaves(output, partial(self._output_of, module))
        seen.shapes[taken] = shapes_of(out.tensors) if out is not None else ()
        if key in seen.inputs:
            seen.sizes.add(sizes_of(leaves.tensors, seen.inputs[key]))
            return output
        found = tuple(places.find(tensor, self.copies, self._rows) for tensor in leaves.tensors)
        likely = places.without_doubtful(leaves.tensors, found)
        if out is not None and likely != found and self.copies > 1:
            places_of_out = tuple(places.find(each, self.copies, self._rows) for each in out.tensors)
            self._is_trying = True
            try:
                found = trials.settled(
                    forward, leaves, out, (found, likely), places_of_out, self.copies, random
                )
            finally:
                self._is_trying = False
        seen.inputs[key] = found
        seen.sizes.add(sizes_of(leaves.tensors, found))
        if any(dim is not None for dim in found):
            if out is None:
                seen.outputs[key] = found[:1]
            else:
                seen.outputs[key] = tuple(
                    places.find(tensor, self.copies, self._rows) for tensor in out.tensors
                )
            if self._rows is None and found[0] == 0:
                self._rows = len(leaves.tensors[0])
            if found == (0,) and None not in seen.outputs[key]:
                seen.first_dims.add(key[0])
            if layers.is_rms_norm(module) and found[0] == 0:
                seen.takes_rows = seen.takes_rows and takes_rows(
                    module, forward, leaves.tensors[0], self.copies
                )
        return output

    def _altered(self, module: nn.Module, output: Any, dims: Dims | None) -> Any:
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
        dims: Dims,
        outputs: Dims | None,
        forward: layers.Forward,
    ) -> Any:
        layer = self._layer_of(module, seen, tuple(tensor.dim() for tensor in leaves.tensors))
        self._check_divides(module, leaves, dims)
        if layer is not None and len(leaves.tensors) == 1 and dims[0] is not None:
            dim = dims[0]
            input = places.front(leaves.tensors[0], dim)
            try:
                return places.back(layer(self.weights, module, forward, input), dim)
            except layers.NotLookedUp:
                pass
        elif layer is layers.embedding and all(dim in (0, None) for dim in dims):
            args, kwargs = leaves.with_tensors(leaves.tensors)
            try:
                return layers.looked_up(self.weights, module, partial(forward, *args, **kwargs))
            except layers.NotLookedUp:
                pass
        return self._copy_by_copy(module, own, seen, leaves, dims, outputs, forward)

    def _check_divides(self, module: nn.Module, leaves: Leaves, dims: Dims) -> None:
        for size in sizes_of(leaves.tensors, dims):
            if size % self.copies:
                raise BatchedProbeError(
                    f"{self._input_of(module)} has {size} rows, not a multiple of {self.copies} copies; "
                    "freeze it with requires_grad_(False)"
                )

    def _of_one_copy(self, own: list[Tensor], copy: int, forward: Callable[[], Any]) -> Any:
        """A call within a module that runs copy by copy."""
        with by_copy.swapped(own, self.weights) as assign:
            assign(copy)
            return forward()

    def _copy_by_copy(
        self,
        module: nn.Module,
        own: list[Tensor],
        seen: Observed,
        leaves: Leaves,
        dims: Dims,
        outputs: Dims | None,
        forward: layers.Forward,
    ) -> Any:
        random = (
            RandomState(*{weight.device for weight in own}) if module.training and self.copies > 1 else None
        )
        with by_copy.swapped(own, self.weights) as assign:

            def begin(copy: int) -> None:
                assign(copy)
                self._one = copy

            try:
                parts = by_copy.parts_of_outputs(forward, leaves, dims, self.copies, random, begin)
            finally:
                self._one = None
        what = partial(self._output_of, module)
        if outputs is None:
            outputs = (0,) * len(Leaves(parts[0], what).tensors)
        joined = places.joined(parts, outputs, what, (self._rows or self.copies) // self.copies)
        if None not in outputs:
            by_copy.check_shapes(Leaves(joined, what), seen.shapes.get(shapes_of(leaves.tensors)) or None)
        return joined


def _tensors_of(structure: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(structure) if isinstance(leaf, Tensor)]
