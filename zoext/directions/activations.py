"""Observes the inputs of linear layers, and keeps only an orthonormal basis of each."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle

from zoext import ops
from zoext._parameters import wrappers
from zoext._parameters.parameters import Parameters
from zoext._runtime.devices import moved
from zoext.directions.base import Frame


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer with a trainable weight."""

    module: nn.Module
    name: str  # of its weight
    key: int
    transposed: bool  # the weight is [d_in, d_out], not [d_out, d_in]

    @property
    def width(self) -> int:
        """d_in."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0 if self.transposed else 1]


def linear_layers(module: nn.Module, groups: Sequence[Parameters]) -> list[Layer]:
    """The linear layers in ``module`` whose weights are in ``groups`` and only used by linear layers."""
    names = {
        id(tensor): (key, name)
        for group in groups
        for tensor, key, name in zip(group.owners, group.keys, group.names, strict=True)
    }
    layers, used_otherwise = [], set()
    for part in module.modules():
        linear = _is_linear(part)
        for own, parameter in part._parameters.items():
            if linear is None or own != "weight":
                used_otherwise.add(id(parameter))
            elif id(parameter) in names:
                key, name = names[id(parameter)]
                layers.append(Layer(part, name, key, linear == "transposed"))
    return [layer for layer in layers if id(layer.module.weight) not in used_otherwise]


def _is_linear(module: nn.Module) -> str | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):  # attention reads its weight and never calls it
        return None
    if isinstance(module, nn.Linear):
        return "plain"
    return "transposed" if isinstance(module, wrappers.conv1d()) else None


class ActivationObserver:
    """Runs a power iteration on the input of each layer when the layer is called."""

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[Layer],
        seed: Tensor,
        *,
        rank: int,
        iterations: int,
        mask: str | None,
        match_norms: bool,
    ) -> None:
        self._root = root
        self._layers = layers
        self._seed = seed
        self._rank = rank
        self._iterations = iterations
        self._mask_name = mask
        self._match_norms = match_norms
        self._mask: Tensor | None = None
        self._found: dict[int, _Subspace] = {}
        self._last: tuple[weakref.ref[Tensor], int, _Subspace] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager that keeps hooks on the layers."""
        handles: list[RemovableHandle] = []
        self._found.clear()  # left by a forward that raised
        try:
            if self._mask_name is not None:
                handles.append(self._root.register_forward_pre_hook(self._see_mask, with_kwargs=True))
            for layer in self._layers:
                handles.append(layer.module.register_forward_pre_hook(self._hook_of(layer), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._mask, self._last = None, None

    def frame(self) -> tuple[Frame, Tensor]:
        if not self._found:
            raise ValueError(
                "ActivationSubspace: the forward called no linear layer of the module; have the closure run "
                "that module. A model compiled by torch.compile that has run before does not see new hooks: "
                "compile it after the first step, or train the model it was made from"
            )
        for layer in self._layers:
            if layer.key not in self._found:
                raise ValueError(
                    f"ActivationSubspace: the forward did not call the linear layer of {layer.name}, so "
                    "nothing is known of its activations; freeze it with requires_grad_(False), or have the "
                    "model call the layer instead of reading its weight"
                )
        left: dict[int, Tensor] = {}
        right: dict[int, Tensor] = {}
        for layer in self._layers:
            basis = moved(self._found[layer.key].basis, layer.module.weight.device)  # type: ignore[arg-type]
            (left if layer.transposed else right)[layer.key] = self._scaled(basis)
        values = [moved(subspace.values, self._seed.device) for subspace in self._found.values()]
        finite = torch.isfinite(torch.cat(values)).all()
        return Frame(left=left, right=right), finite

    def _scaled(self, basis: Tensor) -> Tensor:
        return basis * (basis.shape[1] / basis.shape[0]) ** 0.5 if self._match_norms else basis

    def _see_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(module.forward).parameters if args else ()
        given = {**dict(zip(names, args, strict=False)), **kwargs}.get(str(self._mask_name))
        # An encoder and its decoder have different positions: the mask applies to only one of them.
        both = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        self._mask = given != 0 if isinstance(given, Tensor) and not both else None

    def _hook_of(self, layer: Layer) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering = args[0] if args else next(iter(kwargs.values()))
            subspace = self._subspace_of(entering)
            seen = self._found.get(layer.key)
            if seen is not None and seen is not subspace:  # the layer runs again, or shares its weight
                subspace = self._merged(seen, subspace)
            self._found[layer.key] = subspace

        return before

    def _subspace_of(self, activations: Tensor) -> _Subspace:
        if activations.is_inference():  # has no version counter to detect changes by
            return self._iterate(activations, self._mask_of(activations))
        # Query, key and value projections have the same input: one power iteration serves them all. The
        # reference is weak, so that it does not keep the activations alive.
        version = activations._version
        if self._last is not None and self._last[0]() is activations and self._last[1] == version:
            return self._last[2]
        found = self._iterate(activations, self._mask_of(activations))
        self._last = (weakref.ref(activations), version, found)
        return found

    def _mask_of(self, activations: Tensor) -> Tensor | None:
        """The mask for a layer whose rows are the batch's positions, as they are or flattened."""
        rows = activations.shape[:-1]
        if self._mask is None or (rows != self._mask.shape and rows != (self._mask.numel(),)):
            return None
        mask = self._mask.reshape(rows).contiguous()
        return mask.to(activations.device, non_blocking=True)

    def _iterate(self, activations: Tensor, mask: Tensor | None) -> _Subspace:
        rank = min(self._rank, activations.shape[-1])
        basis, values = ops.power_iteration(
            activations.detach().contiguous(),
            mask,
            moved(self._seed, activations.device),
            rank=rank,
            iterations=self._iterations,
        )
        return _Subspace(basis, values)

    def _merged(self, *parts: _Subspace) -> _Subspace:
        """The leading subspace of several inputs combined, approximated from that of each input."""
        device = parts[0].basis.device
        rows = torch.cat([moved(part.values.unsqueeze(1) * part.basis, device) for part in parts])
        return self._iterate(rows, None)


@dataclass(frozen=True, slots=True)
class _Subspace:
    basis: Tensor
    values: Tensor
