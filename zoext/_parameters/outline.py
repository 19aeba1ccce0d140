"""Parameter groups in a line each, to be printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_FIRST = ("lr", "mu", "weight_decay")
#: Options of a group that its line does not show: long ones, and those of the whole optimizer.
_NOT_SHOWN = frozenset({"params", "param_names", "recipe", "update_state", "seed", "precision"})


def outline(group: Mapping[str, Any]) -> str:
    """The size of a group and its options, such as ``3 tensors (1 frozen), 41 elements, lr 1e-06, mu 0.001``.

    Waits for the device if an option is a tensor there, as lr may be.
    """
    tensors = group["params"]
    frozen = sum(not tensor.requires_grad for tensor in tensors)
    size = f"{len(tensors):,} {'tensor' if len(tensors) == 1 else 'tensors'}"
    elements = f"{sum(tensor.numel() for tensor in tensors):,} elements"
    names = [*_FIRST, *(name for name in group if name not in (*_FIRST, *_NOT_SHOWN))]
    options = [f"{name} {_shown(group[name])}" for name in names]
    return ", ".join([size + (f" ({frozen:,} frozen)" if frozen else ""), elements, *options])


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return f"{value:g}" if isinstance(value, float) else str(value)
