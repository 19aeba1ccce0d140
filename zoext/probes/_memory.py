"""Where tensors of any kind have their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter


def storage_of(tensor: Tensor) -> int:
    """The address of its storage; 0 for tensors that have none, such as packed, sparse and offloaded ones."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a wrapper of other tensors
        return 0


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have addresses in common."""
    (start, end), (its_start, its_end) = interval_of(one), interval_of(other)
    return start > 0 and its_start > 0 and start < its_end and its_start < end


def interval_of(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first element, and behind its last; zeros for tensors that have none."""
    if not tensor.numel() or not storage_of(tensor):
        return 0, 0
    places = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in places)
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def distinct(output: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """The values in a nested structure that ``wanted`` selects, each object once."""
    return list({id(value): value for value in tree_iter(output) if wanted(value)}.values())
