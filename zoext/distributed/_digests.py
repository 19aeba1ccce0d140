"""Small numbers that tell whether ranks have the same weights and options."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoext._parameters import shards
from zoext._parameters.parameters import Parameters
from zoext._runtime.devices import moved
from zoext.noise import NOISE_FIELD

#: Options of a parameter group that ranks must have alike.
NUMBERS = ("lr", "mu", "weight_decay")
#: Elements that are added up at a time, as int64.
_CHUNK = 2**20


def of_weights(groups: Sequence[Parameters], device: torch.device) -> Tensor:
    """int64 []: a sum over the bits of all weights, with another factor for each chunk of each tensor.

    Sharded weights, of which ranks have different parts, are left out.
    """
    sums = [
        moved(chunk.sum(dtype=torch.int64), device)
        for group in groups
        for tensor, owner in zip(group.tensors, group.owners, strict=True)
        if not shards.is_distributed(owner)
        for chunk in _chunks(tensor.detach())
    ]
    factors = 2 * torch.arange(len(sums), device=device) + 1
    return (torch.stack(sums) * factors).sum() if sums else torch.zeros((), dtype=torch.int64, device=device)


def of_recipe(options: Sequence[Mapping[str, Any]]) -> int:
    """Of what a run has once: its recipe, seed and step, and the version of the noise field."""
    first = options[0]
    return _number_of([NOISE_FIELD, *(first[name] for name in ("recipe", "precision", "seed", "step"))])


def of_options(options: Sequence[Mapping[str, Any]]) -> int:
    """Of the options of all parameter groups, and how many parameters each has.

    Learning rates that are tensors are left out, since reading them may wait for the device.
    """
    return _number_of(
        [
            (
                len(group["params"]),
                [float(group[name]).hex() for name in NUMBERS if not isinstance(group[name], Tensor)],
            )
            for group in options
        ]
    )


def _number_of(plain: Sequence[Any]) -> int:
    return zlib.crc32(repr(plain).encode())


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The bits of a weight as integers, chunk by chunk, so that no copy is as large as a weight."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.view(kinds[tensor.element_size()])
    if tensor.is_contiguous():
        yield from bits.view(-1).split(_CHUNK)
    else:
        yield from bits  # row by row
