"""Features that devices other than CPUs and CUDA lack or name differently."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64, such as Apple's GPUs."""
    return torch.float64 if _has_float64(device.type) else torch.float32


@cache
def _has_float64(device_type: str) -> bool:
    if device_type in ("cpu", "cuda"):
        return True
    try:
        torch.zeros((), dtype=torch.float64, device=device_type)
    except (RuntimeError, TypeError):
        return False
    return True


def moved(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``. The host waits only for what it gets itself: a CPU reads at once."""
    if value.device == device:
        return value
    return value.to(device, non_blocking=device.type != "cpu")


def get_rng_state(device: torch.device) -> Tensor | None:
    """The state of the device's generator, or None if torch has no access to one."""
    read: Any = getattr(torch.get_device_module(device), "get_rng_state", None)
    if read is None:
        return None
    state: Tensor = read() if device.type == "mps" else read(device)
    return state


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Restores a state that ``get_rng_state`` returned."""
    write: Any = torch.get_device_module(device).set_rng_state
    write(state) if device.type == "mps" else write(state, device)


def check_not_captured() -> None:
    """Raises a RuntimeError while a CUDA graph is captured."""
    # Query only if CUDA is already initialized: the query must not initialize it.
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step cannot be captured in a CUDA graph from outside: its seeds come from the host, so every "
            "replay would use the same directions. Use zoext.GraphedStep(optimizer, closure), which "
            "captures the step and gives each replay its own seeds"
        )
