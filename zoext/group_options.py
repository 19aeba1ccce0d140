"""The numbers that a parameter group has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check(options: dict[str, Any]) -> None:
    """Raises for ``lr``, ``mu`` or ``weight_decay`` out of range."""
    for name, low, strict in (("lr", 0.0, False), ("mu", 0.0, True), ("weight_decay", 0.0, False)):
        value = options[name]
        if isinstance(value, Tensor):
            if name != "lr" or value.dim() or value.dtype not in (torch.float32, torch.float64):
                kind = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
                raise TypeError(f"{name} must be a float, or lr a float32 tensor of shape (), not {kind}")
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a float, not {value!r}")
        if not math.isfinite(value) or value < low or (strict and value == low):
            relation = ">" if strict else ">="
            raise ValueError(f"{name} must be finite and {relation} 0, not {value}")
