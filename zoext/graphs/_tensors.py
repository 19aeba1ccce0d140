"""Tensors in plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_PLAIN = {int, float, bool, str, type(None)}


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Plain data with ``function`` of every tensor in its place.

    Not ``tree_map``: it would look at each of the hundreds of keys in the state of an update.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        if _PLAIN.issuperset(map(type, value)):
            return value
        entries = [map_tensors(function, entry) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in plain data, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found
