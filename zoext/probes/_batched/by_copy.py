"""Runs a module once for each copy, with that copy's weights, and joins what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from zoext._runtime.randomness import RandomState
from zoext.probes._batched import places
from zoext.probes._batched.displacements import Displacements
from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._batched.observed import Dims
from zoext.probes._batched.places import Leaves


@contextmanager
def swapped(own: list[Tensor], weights: Displacements) -> Iterator[Callable[[int], None]]:
    """A block in which weights may have the values of a copy; yields the function that assigns these."""
    moving = [weight for weight in own if weights.moves(weight)]
    values = weights.weights(moving)
    originals = [weight.data for weight in moving]

    def assign(copy: int) -> None:
        for weight, displaced in zip(moving, values, strict=True):
            weight.data = displaced[copy]

    try:
        yield assign
    finally:
        for weight, original in zip(moving, originals, strict=True):
            weight.data = original


def parts_of_outputs(
    forward: Callable[..., Any],
    leaves: Leaves,
    dims: Dims,
    copies: int,
    random: RandomState | None,
    begin: Callable[[int], None],
) -> list[Any]:
    """What ``forward`` returns for each copy, before which ``begin(copy)`` is called.

    Raises:
        BatchedProbeError: if it writes to a tensor that the copies share.
    """
    shared = [
        tensor
        for tensor, dim in zip(leaves.tensors, dims, strict=True)
        if dim is None and not tensor.is_inference()
    ]
    versions = [tensor._version for tensor in shared]
    found = []
    for copy in range(copies):
        if random is not None and copy:  # each copy has the dropout masks of the first
            random.restore()
        begin(copy)
        args, kwargs = leaves.map(partial(places.part_of, copy=copy, copies=copies), dims)
        found.append(forward(*args, **kwargs))
    if versions != [tensor._version for tensor in shared]:
        raise BatchedProbeError(f"{leaves.what()} has a tensor that all copies share, and is written to")
    return found


def check_shapes(output: Leaves, expected: Sequence[Any] | None) -> None:
    """Raises if the joined outputs of copies have other shapes than the output of all at once."""
    found = [tensor.shape for tensor in output.tensors]
    if expected is not None and found != list(expected):
        raise BatchedProbeError(
            f"{output.what()} has shapes {_shown(expected)} for all copies at once and {_shown(found)} copy "
            "by copy: the module compares examples, or its output has no copies; "
            "freeze its own weights with requires_grad_(False)"
        )


def _shown(shapes: Sequence[Any]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)
