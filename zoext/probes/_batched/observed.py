"""The weights of a module, and what a forward at theta shows of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoext.probes._batched import layers

Dims = tuple[int | None, ...]
Shapes = tuple[torch.Size, ...]


class Own(NamedTuple):
    """A weight that moves, and the module that has it."""

    holder: nn.Module
    name: str
    parameter: Tensor


class Observed:
    """Where the copies lie in the tensors of a module, by the dimensions of those that it takes.

    Attributes:
        inputs, outputs: the dimension of each tensor; None where the copies share it.
        shapes: those of the outputs, by the shapes of the inputs.
        sizes: of the inputs, along the dimensions of the copies.
        first_dims: the numbers of dimensions of single inputs whose copies lie along the first dimension.
        takes_rows: whether a norm computes the same with a weight for each row.
    """

    def __init__(self) -> None:
        self.inputs: dict[tuple[int, ...], Dims] = {}
        self.outputs: dict[tuple[int, ...], Dims] = {}
        self.shapes: dict[Shapes, Shapes] = {}
        self.sizes: set[tuple[int, ...]] = set()
        self.first_dims: set[int] = set()
        self.takes_rows = True

    def forget(self) -> None:
        """Forgets what depends on the batch."""
        self.inputs.clear()
        self.outputs.clear()
        self.shapes.clear()
        self.sizes.clear()
        self.first_dims.clear()


def shapes_of(tensors: list[Tensor]) -> Shapes:
    return tuple(tensor.shape for tensor in tensors)


def sizes_of(tensors: list[Tensor], dims: Dims) -> tuple[int, ...]:
    """The sizes along the dimensions in which copies lie."""
    return tuple(t.shape[dim] for t, dim in zip(tensors, dims, strict=True) if dim is not None)


def takes_rows(module: nn.Module, forward: layers.Forward, input: Tensor, copies: int) -> bool:
    """Whether a norm that is known by its name computes the same with a weight for each row of its input."""
    if input.dim() < 2:
        return False
    weight = module._parameters["weight"]
    assert weight is not None
    scales = torch.linspace(0.5, 1.5, weight.numel() * copies, device=weight.device)
    values = weight.detach() * scales.to(weight.dtype).view(copies, -1)
    try:
        tried = layers.with_rows(module, forward, input, values)
        pairs = zip(input.chunk(copies), values.unsqueeze(1), strict=True)
        expected = torch.cat([layers.with_rows(module, forward, *pair) for pair in pairs])
    except RuntimeError:
        return False
    return tried.shape == expected.shape and torch.allclose(tried, expected, rtol=1e-2, atol=0)
