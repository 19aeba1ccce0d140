"""What a replay changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Difference(NamedTuple):
    """Tuned less base weights of the parameters that moved, float32, and how many elements were rounded."""

    tensors: dict[str, Tensor]
    elements: int
    rounded: int


@torch.no_grad()
def copies(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of the parameters with these names, those that there are."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name in names}


@torch.no_grad()
def of(model: nn.Module, before: Mapping[str, Tensor]) -> Difference:
    """The difference of ``model`` from the copies ``before``."""
    tensors, elements, rounded = {}, 0, 0
    for name, tensor in model.named_parameters():
        if name in before and not tensor.equal(before[name]):
            tensors[name], inexact = _subtract(tensor.cpu().double(), before[name].cpu().double())
            elements += tensor.numel()
            rounded += inexact
    return Difference(tensors, elements, rounded)


def _subtract(tuned: Tensor, base: Tensor) -> tuple[Tensor, int]:
    """``tuned - base``, both float64, as float32, and how many elements it does not hold exactly."""
    found = tuned - base
    # The rounding error of that subtraction: Knuth, The Art of Computer Programming, volume 2, 4.2.2.
    other = tuned - found
    error = (tuned - (found + other)) + (other - base)
    single = found.float()
    return single, int(((error != 0) | (single != found)).sum())
