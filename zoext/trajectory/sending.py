"""Brings what is recorded of a step from its device to the host, without anybody waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from zoext._engine.applied_step import TakenStep
from zoext.directions import Frame


class Numbers(NamedTuple):
    """Those of a ``RecordedStep``, in its order."""

    seeds: tuple[int, ...]
    coefficients: tuple[float, ...]
    loss: float
    spread: float
    finite: bool
    forwards: int
    lr: tuple[float, ...]


class HostStep(NamedTuple):
    """A step in the host's memory."""

    numbers: Numbers
    frame: Frame


Fetch = Callable[[], HostStep]


def send(step: TakenStep, frame: Frame) -> Fetch:
    """Sends a step to the host; what is returned waits until it is there."""
    estimate = step.estimate
    names = ("seeds", "coefficients", "loss", "spread", "finite")
    seeds, coefficients, loss, spread, finite = (_sent(getattr(estimate, name)) for name in names)
    lr = [_sent(options.lr) if isinstance(options.lr, Tensor) else options.lr for options in step.options]
    on_host = Frame(left=_all_sent(frame.left), right=_all_sent(frame.right))
    arrival = _arrival(estimate.coefficients.device)

    def fetch() -> HostStep:
        if arrival is not None:
            arrival.synchronize()
        numbers = Numbers(
            tuple(seed % 2**64 for seed in seeds.tolist()),
            tuple(coefficients.tolist()),
            float(loss),
            float(spread),
            bool(finite),
            estimate.forwards,
            tuple(map(float, lr)),
        )
        return HostStep(numbers, on_host)

    return fetch


def _all_sent(factors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {key: _sent(factor) for key, factor in factors.items()}


def _sent(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, which may still be on its way there."""
    if not tensor.is_cuda:
        return tensor.detach().clone()  # a learning rate is overwritten by its scheduler
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)


def _arrival(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
