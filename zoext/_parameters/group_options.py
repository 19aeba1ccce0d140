"""Checks the hyperparameters of a parameter group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_POSITIVE = {"lr": False, "mu": True, "weight_decay": False}  # the others may be zero


def check(options: Mapping[str, Any]) -> None:
    """Raises for ``lr``, ``mu`` or ``weight_decay`` out of range."""
    check_on_host(options)
    if isinstance(lr := options["lr"], Tensor):
        if lr.dim() or lr.dtype not in (torch.float32, torch.float64):
            kind = f"a {lr.dtype} tensor of shape {tuple(lr.shape)}"
            raise TypeError(f"lr must be a float, or a float32 tensor of shape (), not {kind}")
        _check("lr", float(lr))


def check_on_host(*groups: Mapping[str, Any]) -> None:
    """Like ``check``, but skips an lr on another device, which it would have to wait for."""
    for name, value in ((name, options[name]) for options in groups for name in _POSITIVE):
        if name != "lr" or not isinstance(value, Tensor):
            _check(name, value)
        elif value.device.type == "cpu" and value.numel() == 1:
            _check(name, float(value))


def _check(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = f"a {value.dtype} tensor" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a float, not {kind}")
    if not math.isfinite(value) or value < 0 or (_POSITIVE[name] and value == 0):
        raise ValueError(f"{name} must be finite and {'>' if _POSITIVE[name] else '>='} 0, not {value}")
