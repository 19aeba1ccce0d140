"""Tries which arguments of a module have copies, where their contents leave doubts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zoext._runtime.randomness import RandomState
from zoext.probes._batched import places
from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._batched.observed import Dims
from zoext.probes._batched.places import Leaves


def settled(
    forward: Callable[..., Any],
    leaves: Leaves,
    output: Leaves,
    dims: tuple[Dims, Dims],
    outputs: Dims,
    copies: int,
    random: RandomState | None,
) -> Dims:
    """The one of two choices of ``dims`` with which the first copy alone has its part of the ``output``.

    ``random`` is the state of the generators before the forward of all copies, if it draws random numbers.

    Raises:
        BatchedProbeError: if it is neither.
    """
    part = partial(places.part_of, copy=0, copies=copies)
    expected = list(map(part, output.tensors, outputs))
    for each in dims:
        args, kwargs = leaves.map(part, each)
        if random is not None:
            random.restore()
        try:
            found = Leaves(forward(*args, **kwargs), output.what).tensors
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError):
            continue
        # Unseen by the modes that watch the forward, of whose operators these are none.
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            if len(found) == len(expected) and all(map(places.are_alike, found, expected)):
                return each
    shapes = [
        tuple(tensor.shape) for tensor, one, other in zip(leaves.tensors, *dims, strict=True) if one != other
    ]
    raise BatchedProbeError(
        f"{leaves.what()} has a tensor of shape {shapes[0]}, and it is unknown whether the copies share it; "
        "freeze the module with requires_grad_(False)"
    )
