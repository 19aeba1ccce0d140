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

#: Steps from one comparison of the processes of a run to the next.
COMPARED_EVERY = 100
#: Options of a parameter group that ranks must have alike.
NUMBERS = ("lr", "mu", "weight_decay")
#: Elements that are added up at a time, as int64.
_CHUNK = 2**18


def of_weights(groups: Sequence[Parameters], device: torch.device) -> Tensor:
    """int64 []: a sum over the bits of all weights, with another factor for each element and each chunk.

    Sharded weights, of which ranks have different parts, are left out.
    """
    sums = [
        moved(_mixed(chunk), device)
        for group in groups
        for tensor, owner in zip(group.tensors, group.owners, strict=True)
        if not shards.is_distributed(owner)
        for chunk in _chunks(tensor.detach())
    ]
    if not sums:
        return torch.zeros((), dtype=torch.int64, device=device)
    total = (torch.stack(sums) * _factors(len(sums), device)).sum()
    return _scrambled(total)  # as its low bits are compared, which must depend on all bits


def of_recipe(options: Sequence[Mapping[str, Any]]) -> int:
    """Of what a run has once: its recipe, seed and step, and the version of the noise field."""
    first = options[0]
    return _number_of([NOISE_FIELD, *(first[name] for name in ("recipe", "precision", "seed", "step"))])


def of_options(options: Sequence[Mapping[str, Any]], *, may_wait: bool = False) -> int:
    """Of the options of all parameter groups, and how many parameters each has.

    Unless it ``may_wait`` for the device, learning rates that are tensors are left out.
    """
    return _number_of(
        [
            (
                len(group["params"]),
                [
                    float(group[name]).hex()
                    for name in NUMBERS
                    if may_wait or not isinstance(group[name], Tensor)
                ],
            )
            for group in options
        ]
    )


def _number_of(plain: Sequence[Any]) -> int:
    return zlib.crc32(repr(plain).encode())


def _mixed(chunk: Tensor) -> Tensor:
    """Of the bits of a chunk and their order."""
    bits = chunk.reshape(-1).to(torch.int64)
    return (_scrambled(bits) * _factors(bits.numel(), bits.device)).sum()


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers, as different as those of a hash function."""
    return _scrambled(torch.arange(1, count + 1, device=device)) | 1


def _scrambled(numbers: Tensor) -> Tensor:
    """Numbers whose low bits depend on all bits: the finalizer of SplitMix64, with arithmetic shifts."""
    numbers = (numbers ^ (numbers >> 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ (numbers >> 31)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The bits of a weight as integers, chunk by chunk, so that no copy is as large as a weight."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.view(kinds[tensor.element_size()])
    if tensor.is_contiguous():
        yield from bits.view(-1).split(_CHUNK)
    else:
        yield from bits  # row by row
