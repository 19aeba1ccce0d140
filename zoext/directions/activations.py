"""Observes the inputs of linear layers, and keeps only their leading subspaces."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoext import ops
from zoext._parameters import shards, wrappers
from zoext._runtime.compiled import runs_compiled, uncompiled
from zoext._runtime.devices import moved
from zoext.directions._layers import Layer, Stack
from zoext.directions._products import Product
from zoext.directions._subspaces import Found, Subspace, kind_of
from zoext.directions._watched import ProductWatch, can_watch
from zoext.directions.base import Frame


class ActivationObserver:
    """Runs a power iteration on the input of each layer when the layer is called.

    A weight that is multiplied elsewhere, such as that of an idle module or of experts in a stack, is
    observed where it is multiplied. Its basis is also used if the weight is read in other ways besides. One
    that is only read in other ways has dense directions, and one that is not used has zero ones. All of this
    depends on the observed forward only, so that a run can be resumed.

    If ``is_part``, the forward sees a part of the batch. The observer then keeps more vectors than the rank,
    from which ``merged`` finds the subspaces of the whole batch.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[Layer],
        stacks: Sequence[Stack],
        seed: Tensor,
        *,
        rank: int,
        iterations: int,
        mask: str | None,
        match_norms: bool,
        is_part: bool,
    ) -> None:
        self._root = wrappers.unwrapped(root)
        self._layers = layers
        self._sides = {layer.key: layer.side for layer in layers}
        self._stacks = {stack.key: stack.weight.shape[0] for stack in stacks}
        weights = {each.key: each.weight for each in layers} | {each.key: each.weight for each in stacks}
        self._shapes = {key: weight.shape for key, weight in weights.items()}
        self._watched = {key: weight for key, weight in weights.items() if can_watch(weight)}
        self._watch = ProductWatch(self._watched, self._see_product)
        self._seed = seed
        self._rank = rank
        self._kept = _kept_of_part(rank) if is_part else rank  # vectors
        self._iterations = iterations
        self._mask_name = mask
        self._match_norms = match_norms
        self._mask: Tensor | None = None
        self._found: dict[int, Found] = {}
        self._last: tuple[weakref.ref[Tensor], int, Subspace] | None = None
        self.ran_uncompiled = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager that keeps hooks on the layers, and runs compiled code as it is written."""
        self._found.clear()  # left by a forward that raised
        with ExitStack() as stack:
            stack.callback(self._forget_forward)
            stack.enter_context(uncompiled())
            if self._mask_name is not None:
                hook = self._root.register_forward_pre_hook(self._see_mask, with_kwargs=True)
                stack.callback(hook.remove)
            for layer in self._layers:
                hook = layer.module.register_forward_pre_hook(self._hook_of(layer), with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(self._watch.watching())
            yield

    # The frame of the activations that this process has seen

    def frame(self) -> tuple[Frame, Tensor]:
        sides: dict[str, dict[int, Tensor]] = {"left": {}, "right": {}}
        unused = set()
        for key, uses in self.uses.items():
            kind = kind_of(uses)
            if kind in sides:
                sides[kind][key] = self._scaled(self._found[key].basis(self._stacks.get(key)))
            elif kind == "unused":
                unused.add(key)
        return Frame(sides["left"], sides["right"], frozenset(unused)), self.finite

    @property
    def finite(self) -> Tensor:
        values = [
            moved(subspace.values, self._seed.device)
            for found in self._found.values()
            for subspace in found.entries.values()
        ]
        if not values:
            return torch.ones((), dtype=torch.bool, device=self._seed.device)
        return torch.isfinite(torch.cat(values)).all()

    @property
    def uses(self) -> Mapping[int, Set[str]]:
        return {key: self._uses_of(key) for key in (*self._sides, *self._stacks)}

    def _uses_of(self, key: int) -> set[str]:
        found = self._found.get(key)
        is_read = key not in self._watched or key in self._watch.read
        return (found.sides if found is not None else set()) | ({"other"} if is_read else set())

    # The frame of the activations that several processes have seen

    def sketch(self, key: int, side: str) -> Tensor:
        found = self._found.get(key)
        if found is not None and found.sides == {side}:
            return moved(found.rows(self._stacks.get(key)), self._seed.device)
        *entries, m, n = self._shapes[key]
        width = n if side == "right" else m
        return torch.zeros((*entries, min(self._kept, width), width), device=self._seed.device)

    def merged(self, sketches: Tensor) -> tuple[Tensor, Tensor]:
        is_stack = sketches.dim() == 4
        matrices = sketches.unbind(1) if is_stack else (sketches,)
        found = [self._iterate(parts.flatten(0, 1), None) for parts in matrices]
        bases = [each.basis[: self._rank] for each in found]
        finite = torch.isfinite(torch.cat([each.values for each in found])).all()
        return self._scaled(torch.stack(bases) if is_stack else bases[0]), finite

    # While the forward runs

    def _scaled(self, basis: Tensor) -> Tensor:
        return basis * (basis.shape[-1] / basis.shape[-2]) ** 0.5 if self._match_norms else basis

    def _forget_forward(self) -> None:
        self._mask, self._last = None, None

    def _see_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(module.forward).parameters if args else ()
        given = {**dict(zip(names, args, strict=False)), **kwargs}.get(str(self._mask_name))
        # An encoder and its decoder have different positions: the mask applies to only one of them.
        both = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        self._mask = given != 0 if isinstance(given, Tensor) and not both else None

    def _hook_of(self, layer: Layer) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not layer.module:  # a copy that the closure made
                return
            if shards.is_distributed(layer.weight):  # FSDP2 has gathered its own by now
                raise ValueError(
                    f"ActivationSubspace: {layer.name} is a DTensor while its layer runs, as with tensor "
                    "parallelism, so that no rank sees all of the activations; use FSDP2 or another direction"
                )
            self._watch.forget(layer.key)  # the call tells its activations
            self.ran_uncompiled = self.ran_uncompiled or runs_compiled()
            entering = args[0] if args else next(iter(kwargs.values()))
            with torch._C.DisableTorchFunction():  # the watch need not see the functions of the observer
                self._add(layer.key, layer.side, None, self._subspace_of(entering))

        return before

    def _see_product(self, product: Product) -> None:
        if self._sides.get(product.key, product.side) != product.side:
            self._watch.read.add(product.key)
            return
        self.ran_uncompiled = self.ran_uncompiled or runs_compiled()
        if product.entries is None:
            self._add(product.key, product.side, None, self._subspace_of(product.rows))
            return
        for number, entry in enumerate(product.entries):
            if product.mask is None:
                subspace = self._subspace_of(product.rows, is_masked=False)
            else:
                subspace = self._iterate(product.rows, product.mask[number].contiguous())
            self._add(product.key, product.side, entry, subspace)

    def _add(self, key: int, side: str, entry: int | None, subspace: Subspace) -> None:
        found = self._found.setdefault(key, Found())
        found.sides.add(side)
        seen = found.entries.get(entry)
        if seen is not None and seen is not subspace:  # the layer runs again, or shares its weight
            subspace = self._joined(seen, subspace) if seen.basis.shape == subspace.basis.shape else seen
        found.entries[entry] = subspace

    def _subspace_of(self, activations: Tensor, is_masked: bool = True) -> Subspace:
        if activations.is_inference():  # has no version counter to detect changes by
            return self._iterate(activations, self._mask_of(activations) if is_masked else None)
        # Query, key and value projections have the same input: one power iteration serves them all. The
        # reference is weak, so that it does not keep the activations alive.
        version = activations._version
        if self._last is not None and self._last[0]() is activations and self._last[1] == version:
            return self._last[2]
        found = self._iterate(activations, self._mask_of(activations) if is_masked else None)
        self._last = (weakref.ref(activations), version, found)
        return found

    def _mask_of(self, activations: Tensor) -> Tensor | None:
        """The mask for a layer whose rows are the batch's positions, as they are or flattened."""
        rows = activations.shape[:-1]
        if self._mask is None or (rows != self._mask.shape and rows != (self._mask.numel(),)):
            return None
        mask = self._mask.reshape(rows).contiguous()
        return mask.to(activations.device, non_blocking=True)

    def _iterate(self, activations: Tensor, mask: Tensor | None) -> Subspace:
        rank = min(self._kept, activations.shape[-1])
        basis, values = ops.power_iteration(
            activations.detach().contiguous(),
            mask,
            moved(self._seed, activations.device),
            rank=rank,
            iterations=self._iterations,
        )
        return Subspace(basis, values)

    def _joined(self, *parts: Subspace) -> Subspace:
        """The leading subspace of several inputs combined, approximated from that of each input."""
        device = parts[0].basis.device
        rows = torch.cat([moved(part.rows, device) for part in parts])
        return self._iterate(rows, None)


def _kept_of_part(rank: int) -> int:
    """How many vectors of a part of a batch are kept: what leads in the batch need not lead in each part."""
    return 2 * rank + 6
