"""Plain data with tensors in it, as JSON beside a dictionary of tensors: what safetensors can hold."""

from __future__ import annotations

from typing import Any

from torch import Tensor

TENSOR, TUPLE, PAIRS = "$tensor", "$tuple", "$pairs"


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` in JSON's types; its tensors go into ``tensors``, with their names in their place.

    Raises:
        TypeError: for anything but None, bool, int, float, str, list, tuple, dict and Tensor.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {TENSOR: name}
    if isinstance(value, list):
        return [pack(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {TUPLE: [pack(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {PAIRS: [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
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
