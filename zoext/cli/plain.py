"""Plain data with tensors in it, as JSON beside a dictionary of tensors: what safetensors can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TENSOR, TUPLE, PAIRS = "$tensor", "$tuple", "$pairs"


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` in JSON's types; copies of its tensors go into ``tensors``, with their names in their place.

    A tensor that occurs several times, as a basis that layers share, is kept once.

    Raises:
        TypeError: for anything but None, bool, int, float, str, list, tuple, dict and Tensor.
    """
    return _pack(value, tensors, {})


def _pack(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = name = str(len(tensors))
            # Copies: safetensors refuses tensors that share memory.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: names[id(value)]}
    if isinstance(value, list):
        return [_pack(item, tensors, names) for item in value]
    if isinstance(value, tuple):
        return {TUPLE: [_pack(item, tensors, names) for item in value]}
    if isinstance(value, dict):
        pairs = [[_pack(key, tensors, names), _pack(item, tensors, names)] for key, item in value.items()]
        return {PAIRS: pairs}
    raise TypeError(
        f"optimizer state holds a {type(value).__name__}; only plain data and tensors can be saved"
    )


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``pack``."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == TENSOR:
            return tensors[content]
        items = unpack(content, tensors)
        return tuple(items) if kind == TUPLE else dict(items)
    return value
